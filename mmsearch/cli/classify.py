"""`mmsearch classify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmsearch.cli.common import (
    DeviceOption,
    IndexOption,
    LanguageOption,
    ModelOption,
    PrecisionOption,
    engine_for,
    printable,
    progress_bar,
    shown_path,
)
from mmsearch.errors import UsageError


def classify(
    labels: Annotated[
        Path, typer.Option("--labels", metavar="FILE", help="The labels, one a line.")
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FOLDER]", help="Pictures, read into no index; default: those of the index."
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            metavar="TEXT",
            help="A sentence with {} for the label, instead of mmsearch's own. Repeatable.",
        ),
    ] = None,
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    language: LanguageOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print only JSON.")] = False,
) -> None:
    """Give each picture the label that fits best, without training.

    Prints a line for each: path, label, cosine. Where pictures lie in folders that are called like
    labels, also how many are right, and which labels are taken for which.
    """
    from mmsearch.evaluation.classification import TEMPLATES, read_labels, to_json, to_text

    if folder is None and model:
        raise UsageError("--model goes with a FOLDER: an index has its own")
    engine = engine_for(index, model=model, device=device, precision=precision, language=language)
    with engine, progress_bar() as bar:
        found = engine.classify(
            read_labels(labels), folder, templates=template or TEMPLATES, on_progress=bar
        )
    if json_:
        print(json.dumps(to_json(found)))
        return
    for path, label, scores in zip(found.paths, found.predicted, found.scores, strict=True):
        print(f"{shown_path(path)}\t{printable(found.labels[label])}\t{scores[label]:.3f}")
    if told := to_text(found):
        print()
        print("\n".join(map(printable, told.splitlines())))

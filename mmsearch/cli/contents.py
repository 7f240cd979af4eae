"""`mmsearch status`, `errors`, `remove`, `export`, `import` and `models`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from mmsearch.cli.common import (
    IndexOption,
    JsonLinesOption,
    JsonOption,
    ModelOption,
    engine_for,
    print_table,
    printable,
    progress_bar,
    say,
    shown_path,
)
from mmsearch.errors import UsageError


def status(index: IndexOption = None, json_: JsonOption = False) -> None:
    """Show what the index holds."""
    with engine_for(index) as engine:
        found = engine.status()
    if json_:
        paths = {
            "path": str(found.path),
            "roots": [str(root) for root in found.roots],
            "exclude": {str(root): globs for root, globs in found.exclude.items()},
        }
        print(json.dumps(dataclasses.asdict(found) | paths))
        return
    model = f"{found.model} ({found.dim} numbers, space {found.space[:8]})" if found.model else "-"
    print(f"index     {shown_path(found.path)} (format {found.format_version})")
    print(f"model     {model}")
    if found.pending:
        done = found.images - found.missing
        print(
            f"pending   {printable(found.pending)}: {done} of {found.images} images; "
            f"'mmsearch index --model {printable(found.pending)}' resumes"
        )
    print(f"images    {found.images}")
    print(f"captions  {found.captions}")
    if found.patches:
        print(f"patches   of {found.patches} images")
    print(f"failed    {found.failures}")
    print(f"size      {found.bytes / 1e6:.1f} MB")
    for place, root in enumerate(found.roots):
        globs = ", ".join(map(printable, found.exclude.get(root, ())))
        without = f" (without {globs})" if globs else ""
        gone = "" if root.is_dir() else " (missing)"
        print(f"{'folders' if place == 0 else '':<9} {shown_path(root)}{without}{gone}")


def errors(
    index: IndexOption = None,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry", help="Try them again now, though they have not changed, in a rescan."
        ),
    ] = False,
    json_: JsonLinesOption = False,
) -> None:
    """List the files that could not be indexed, and why."""
    with engine_for(index) as engine:
        if retry:
            with progress_bar() as bar:
                report = engine.retry(on_progress=bar)
            say(
                f"{report.added} added, {report.updated} updated, {report.removed} removed, "
                f"{report.failed} failed"
            )
        failures = engine.errors()
    for failure in failures:
        if json_:
            row = {"path": str(failure.path), "reason": failure.reason, "at": failure.failed_at}
            print(json.dumps(row))
        else:
            print(f"{shown_path(failure.path)}\t{printable(failure.reason)}")
    if not failures and not json_:
        say("no file has failed")


def remove(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Folders and files.")],
    index: IndexOption = None,
) -> None:
    """Take folders and files out of the index; the files themselves stay.

    A folder that was indexed as such is forgotten. A part of one comes back when that is
    indexed again, unless --exclude leaves it out.
    """
    if not all(paths):
        raise UsageError("an empty path: a variable in the command is not set?")
    with engine_for(index) as engine:
        print(f"{engine.remove(paths)} removed")


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    index: IndexOption = None,
) -> None:
    """Write vectors and metadata as clip-retrieval does (npy and parquet)."""
    with engine_for(index) as engine:
        print(f"{engine.export_embeddings(folder)} images exported")


def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where img_emb/ lies.")],
    index: IndexOption = None,
    model: ModelOption = None,
) -> None:
    """Add images with ready-made vectors in clip-retrieval's layout (npy and parquet)."""
    with engine_for(index, model=model) as engine, progress_bar() as bar:
        print(f"{engine.import_embeddings(folder, on_progress=bar)} images imported")


def models(
    index: IndexOption = None,
    available: Annotated[
        bool,
        typer.Option(
            "--available",
            help="List those that can be fetched and need no torch, with published figures.",
        ),
    ] = False,
    json_: JsonLinesOption = False,
) -> None:
    """List the models: the built-in names, and those that were used on this machine."""
    if available:
        _list_available(json_=json_)
        return
    with engine_for(index) as engine:
        found = engine.models()
    if json_:
        for model in found:
            print(json.dumps(dataclasses.asdict(model)))
        return
    rows = [
        [
            model.name,
            str(model.dim or "-"),
            f"{model.parameters / 1e6:.1f}M" if model.parameters else "-",
            "yes" if model.cached else "no",
            model.indexed or "-",
            model.licence,
        ]
        for model in found
    ]
    print_table(["name", "dim", "parameters", "cached", "index", "licence"], rows)


def _list_available(*, json_: bool) -> None:
    from mmsearch.encoders.published import RECALLS, published_models
    from mmsearch.encoders.registry import listed_name

    found = published_models()
    if json_:
        for model in found:
            print(json.dumps(dataclasses.asdict(model)))
        return
    rows = [
        [
            *(
                f"{model.recall[language]:.1f}" if language in model.recall else "-"
                for language in RECALLS
            ),
            str(model.megabytes),
            str(model.memory_mib or "-"),
            model.languages,
            listed_name(model.name),
            model.licence,
        ]
        for model in found
    ]
    head = [*RECALLS, "MB", "memory, MiB", "languages", "name", "licence"]
    print_table(head, rows, right=len(RECALLS) + 2)
    say(
        "recall in percent: the mean of Recall@1, @5 and @10, text to image, on Crossmodal-3600, "
        "where some languages are easier than others; memory: in immich; both as immich's "
        "documentation has them. Those with 201 languages take --language"
    )

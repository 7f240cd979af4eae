"""`mmsearch bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli.common import (
    DeviceOption,
    IndexOption,
    JsonOption,
    LanguageOption,
    LimitOption,
    ModelOption,
    PrecisionOption,
    engine_for,
    one_of,
    printable,
    progress_bar,
    say,
    write_page,
)
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.evaluation.retrieval import BenchReport


def bench(
    dataset: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATASET]",
            help="A captions file, a folder with one, or a set with its pictures inside "
            "(WebDataset's .tar, .parquet); default: the index's own captions.",
        ),
    ] = None,
    index: IndexOption = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="The folder of the images, if it is not that of the labels.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", help="Default: test where there is one, else all."),
    ] = None,
    model: ModelOption = None,
    limit: LimitOption = None,
    fusion: Annotated[
        list[str] | None,
        typer.Option(
            "--fusion",
            metavar="HOW",
            help="Measure text -> image with captions in the index too: as in search. Repeatable: "
            "the others are compared with the first.",
        ),
    ] = None,
    hold_out: Annotated[
        int | None,
        typer.Option(
            "--hold-out",
            min=1,
            metavar="N",
            help="With --fusion: how many captions of each image are queries and not in the index. "
            "Default: 1; with --rerank alone, all.",
        ),
    ] = None,
    rerank: Annotated[
        int,
        typer.Option(
            "--rerank",
            min=0,
            metavar="N",
            help="Measure text -> image with the first N re-ranked too, as in search; with "
            "--fusion image unless one is named.",
        ),
    ] = 0,
    qrels: Annotated[
        Path | None,
        typer.Option(
            "--qrels",
            metavar="FILE",
            help="People's judgments, as TREC has them: lines of 'IMAGE#N 0 OTHER GRADE' for the "
            "N-th caption of an image, from 0.",
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="DIR", help="Write the vectors that were compared."),
    ] = None,
    run_out: Annotated[
        Path | None,
        typer.Option("--run-out", metavar="DIR", help="Write TREC runs and qrels."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with examples.")
    ] = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    language: LanguageOption = None,
    json_: JsonOption = False,
) -> None:
    """Measure Recall@1/5/10, text to image and image to text, on a labelled set.

    The model is that of the index, where there is one, unless --model names another.
    """
    if dataset is None and (images or split or limit or model or qrels):
        raise UsageError("--images, --split, --limit, --model and --qrels go with a DATASET")
    if hold_out and not (fusion or rerank):
        raise UsageError("--hold-out goes with --fusion and --rerank")
    if (fusion or rerank) and (export or run_out or html or qrels):
        raise UsageError(
            "--export, --run-out, --html and --qrels do not go with --fusion or --rerank"
        )
    engine = engine_for(index, model=model, device=device, precision=precision, language=language)
    if fusion or rerank:
        from mmsearch.evaluation import comparison
        from mmsearch.types import FUSIONS

        chosen = list(
            dict.fromkeys(one_of("--fusion", how, FUSIONS) for how in fusion or ["image"])
        )
        if "auto" in chosen:
            raise UsageError("--fusion auto is one of the others: name that")
        with engine, progress_bar() as bar:
            compared = engine.compare_fusions(
                chosen, dataset, rerank=rerank, hold_out=hold_out or (1 if fusion else 0),
                images=images, split=split, limit=limit, on_progress=bar,
            )  # fmt: skip
        document, text = comparison.to_json(compared), comparison.to_text(compared)
    else:
        from mmsearch.evaluation import retrieval

        with engine, progress_bar() as bar:
            report = engine.bench(
                dataset, images=images, split=split, limit=limit, qrels=qrels, on_progress=bar
            )
        _write(report, export, run_out, html)
        if report.missing:
            names = ", ".join(printable(name) for name in report.missing[:5])
            say(
                f"{len(report.missing)} images of the set could not be indexed (missing, damaged, "
                f"or several of that name): {names}"
            )
        document, text = retrieval.to_json(report), retrieval.to_text(report)
    if json_:
        print(json.dumps(document))
    else:
        print("\n".join(map(printable, text.splitlines())))


def _write(
    report: BenchReport, export: Path | None, run_out: Path | None, html: Path | None
) -> None:
    from mmsearch.evaluation import retrieval as out

    try:
        if export is not None:
            out.export_vectors(report, export)
        if run_out is not None:
            out.write_runs(report, run_out)
        if html is not None:
            paths = dict(enumerate(map(Path, report.corpus.image_names)))
            write_page(html, out.to_html(report, paths))
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be written: {error.strerror}") from error

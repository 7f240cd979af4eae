"""`mmsearch index`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli.common import (
    DeviceOption,
    IndexOption,
    JsonOption,
    LanguageOption,
    ModelOption,
    PrecisionOption,
    engine_for,
    printable,
    progress_bar,
    say,
    shown_path,
)
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.types import IngestReport

_SHOWN_UNMATCHED = 5


def index(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...", help="Folders and images. Default: all that were indexed before."
        ),
    ] = None,
    index: IndexOption = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            "--captions",
            metavar="FILE",
            help="Captions: Karpathy or COCO JSON, Flickr token file, image,caption CSV, "
            "metadata.csv or metadata.jsonl. What FILE no longer has is removed. "
            "Sidecar files (name.txt) are always read.",
        ),
    ] = None,
    model: ModelOption = None,
    prune: Annotated[
        bool | None,
        typer.Option(
            "--prune/--no-prune",
            help="Remove what is gone from the disk. Default: yes, but not from a folder that is "
            "missing or empty.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="GLOB",
            help="Leave out names or relative paths, now and in later runs; --exclude '' ends "
            "that. Repeatable.",
        ),
    ] = None,
    patches: Annotated[
        bool | None,
        typer.Option(
            "--patches/--no-patches",
            help="Keep the patch embeddings that search --rerank needs, now and in later runs "
            "(21 KB an image with tiny); --no-patches drops them.",
        ),
    ] = None,
    reread: Annotated[
        bool,
        typer.Option(
            "--reread",
            help="Read every file again, even if its size and time have not changed.",
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="Threads that read and decode.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if files could not be used.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Fetch the model 'base' without asking.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    language: LanguageOption = None,
    json_: JsonOption = False,
) -> None:
    """Index folders of images: adds what is new, re-embeds what changed, removes what is gone."""
    if not all(paths or []):
        raise UsageError("an empty path: a variable in the command is not set?")
    with (
        engine_for(
            index,
            model=model,
            device=device,
            precision=precision,
            language=language,
            workers=workers,
            yes=yes,
        ) as engine,
        progress_bar() as bar,
    ):
        report = engine.index(
            paths or [],
            captions=captions,
            prune=prune,
            exclude=[glob for glob in exclude if glob] if exclude else None,
            patches=patches,
            reread=reread,
            dry_run=dry_run,
            on_progress=bar,
        )
    if json_:
        document = {
            **dataclasses.asdict(report),
            "seconds": round(report.seconds, 3),
            "images_per_second": round(report.images_per_second, 2),
            "stages": {name: round(value, 3) for name, value in report.stages.items()},
            "kept_roots": [str(path) for path in report.kept_roots],
        }
        print(json.dumps(document))
    else:
        _print(report)
    if strict and (report.failed or report.known_bad or report.missing):
        if report.known_bad and not report.failed:
            say(f"{report.known_bad} known as bad and unchanged: see 'mmsearch errors'")
        raise typer.Exit(1)


def _print(report: IngestReport) -> None:
    counts = (
        f"{report.added} added, {report.updated} updated, {report.unchanged} unchanged, "
        f"{report.moved} moved, {report.removed} removed, {report.failed} failed"
    )
    if report.dry_run:
        print(f"would do: {counts}")
    else:
        speed = f" ({report.images_per_second:.0f} images/s)" if report.images_per_second else ""
        removed = f" added, {report.captions_removed} removed" if report.captions_removed else ""
        print(f"{counts}, {report.captions} captions{removed} in {report.seconds:.1f} s{speed}")
    if report.replaced:
        print(
            f"{report.embedded_again} images embedded again in {report.stages['again']:.1f} s; "
            f"the index is now in '{printable(report.model)}', no longer in "
            f"'{printable(report.replaced)}'"
        )
    elif report.embedded_again:
        print(f"{report.embedded_again} images embedded again in {report.stages['again']:.1f} s")
    if report.missing:
        say(
            f"{report.missing} images could not be embedded with '{printable(report.model)}', so "
            "the index keeps its model: 'mmsearch errors' has those that are damaged; a run "
            "without PATH takes in what changed, and with --prune leaves out what is gone for good"
        )
    if report.patches:
        print(f"patches of {report.patches} images kept in {report.stages['patches']:.1f} s")
    if report.failed:
        say(f"{report.failed} could not be used: see 'mmsearch errors'")
    for root in report.kept_roots:
        say(
            f"{shown_path(root)}: missing, empty or not readable, so nothing was removed for it; "
            "if that is right, run again with --prune"
        )
    if report.unread_sidecars:
        more = len(report.unread_sidecars) - 1
        say(
            f"{report.unread_sidecars[0]}{f' and {more} more' if more else ''}: not text in UTF-8, "
            "so no captions were taken from there; save as UTF-8 and run again"
        )
    if report.unmatched_captions:
        names = ", ".join(printable(name) for name in report.unmatched_captions[:_SHOWN_UNMATCHED])
        more = len(report.unmatched_captions) - _SHOWN_UNMATCHED
        say(
            f"{len(report.unmatched_captions)} captioned images match no file here, or several of "
            f"that name: {names}" + (f" and {more} more" if more > 0 else "")
        )

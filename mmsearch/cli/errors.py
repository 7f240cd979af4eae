"""`mmsearch errors`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mmsearch.cli.common import (
    IndexOption,
    JsonLinesOption,
    engine_for,
    printable,
    progress_bar,
    say,
    shown_path,
)


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

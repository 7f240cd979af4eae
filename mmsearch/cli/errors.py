"""`mmsearch errors`."""

from __future__ import annotations

import json

from mmsearch.cli.common import IndexOption, JsonOption, engine_for, printable, say, shown_path


def errors(index: IndexOption = None, json_: JsonOption = False) -> None:
    """List the files that could not be indexed, and why."""
    with engine_for(index) as engine:
        failures = engine.errors()
    for failure in failures:
        if json_:
            row = {"path": str(failure.path), "reason": failure.reason, "at": failure.failed_at}
            print(json.dumps(row))
        else:
            print(f"{shown_path(failure.path)}\t{printable(failure.reason)}")
    if not failures and not json_:
        say("no file has failed")

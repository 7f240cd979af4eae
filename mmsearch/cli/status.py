"""`mmsearch status`."""

from __future__ import annotations

import dataclasses
import json

from mmsearch.cli.common import IndexOption, JsonOption, engine_for, printable, shown_path


def status(index: IndexOption = None, json_: JsonOption = False) -> None:
    """Show what the index holds."""
    with engine_for(index) as engine:
        found = engine.status()
    if json_:
        document = dataclasses.asdict(found)
        document["path"] = str(found.path)
        document["roots"] = [str(root) for root in found.roots]
        document["exclude"] = {str(root): globs for root, globs in found.exclude.items()}
        print(json.dumps(document))
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

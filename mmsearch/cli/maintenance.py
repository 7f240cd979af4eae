"""`mmsearch verify`, `repair`, `compact`, `backup` and `restore`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from mmsearch.cli.common import (
    IndexOption,
    JsonOption,
    engine_for,
    printable,
    progress_bar,
    say,
    shown_path,
)
from mmsearch.errors import DamageError, UsageError

_SHOWN = 20


def verify(
    index: IndexOption = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Compare the whole index with its checksums. Without: only its structure, and "
            "that nothing is missing.",
        ),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Check whether the index is what was written: exit 0 if so, 5 if not. Changes nothing."""
    with engine_for(index) as engine:
        found = engine.verify(deep=deep)
    if json_:
        print(json.dumps({**dataclasses.asdict(found), "sound": not found.damages}))
    else:
        for damage in found.damages:
            print(printable(damage.what))
        if not found.damages:
            what = "sound" if found.deep else "no damage in structure"
            more = "" if found.deep else "; --deep compares contents with checksums"
            print(
                f"{what}: {found.images} images, {found.captions} captions "
                f"({found.seconds:.1f} s{more})"
            )
    if found.damages:
        raise DamageError(
            f"damage found ({len(found.damages)}); 'mmsearch repair' repairs what it can"
        )


def repair(index: IndexOption = None, json_: JsonOption = False) -> None:
    """Repair a damaged index, and list what could not be saved.

    Vectors come from their copies, or are computed again from the files. Exit 5 if damage is left.
    """
    with engine_for(index) as engine, progress_bar() as bar:
        done = engine.repair(on_progress=bar)
        after = engine.verify(deep=True)
    if json_:
        more = {"kept": str(done.kept) if done.kept else None, "sound": not after.damages}
        print(json.dumps(dataclasses.asdict(done) | more))
    else:
        for damage in done.found[:_SHOWN]:
            print(f"found: {printable(damage.what)}")
        if len(done.found) > _SHOWN:
            print(f"found: {len(done.found) - _SHOWN} more")
        for what in done.lost:
            print(f"lost: {printable(what)}")
        if done.embedded:
            print(f"{done.embedded} vectors computed again")
        print(f"{'sound' if not after.damages else 'not sound'}: {after.images} images, "
              f"{after.captions} captions")  # fmt: skip
    if done.kept is not None:
        say(f"the damaged catalog is kept as {shown_path(done.kept)}")
    if done.lost:
        say("'mmsearch index PATH' takes lost files in again where they are there")
    if after.damages:
        hint = (
            ": where a folder is missing or its model is missing, see to that and repair again"
            if after.damages[0].kind == "missing" else ""
        )  # fmt: skip
        raise DamageError(f"still damaged: {printable(after.damages[0].what)}{hint}")


def compact(index: IndexOption = None) -> None:
    """Fold what is new into the vector files, and free unused disk space."""
    with engine_for(index) as engine:
        freed = engine.compact()
    print(f"compacted; {max(0, freed) / 1e6:.1f} MB given back")


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.")],
    index: IndexOption = None,
) -> None:
    """Copy the index into one file, even while another process writes to it."""
    with engine_for(index) as engine:
        size = engine.backup(file)
    print(f"{size / 1e6:.1f} MB written to {shown_path(file)}")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What 'backup' wrote.")],
    index: IndexOption = None,
    root: Annotated[
        list[str] | None,
        typer.Option(
            "--root",
            metavar="OLD=NEW",
            help="A folder that has moved, with all that was indexed below it. Repeatable.",
        ),
    ] = None,
) -> None:
    """Restore an index from a backup, here or on another machine."""
    roots: dict[str, str] = {}
    for one in root or []:
        old, equals, new = one.partition("=")
        if not (old and equals and new):
            raise UsageError(f"--root is OLD=NEW, not '{one}'")
        roots[old] = new
    with engine_for(index) as engine:
        found = engine.restore(file, roots)
    print(f"{found.images} images, {found.captions} captions in {shown_path(found.path)}")
    for folder in found.roots:
        if not folder.is_dir():
            say(f"{shown_path(folder)}: not here; where it lies elsewhere, restore with --root")

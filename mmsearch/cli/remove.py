"""`mmsearch remove`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmsearch.cli.common import IndexOption, engine_for
from mmsearch.errors import UsageError


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

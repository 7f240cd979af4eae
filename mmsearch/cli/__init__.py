"""The command line. `main` is the program; each command has a file of its own."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # see mmsearch/__init__.py
if TYPE_CHECKING:
    from types import FrameType

__all__ = ["main", "quit_at_once"]


def main() -> None:
    """The program `mmsearch`."""
    # Until a command has begun there is nothing to end with care.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, quit_at_once)
    from mmsearch.cli.app import run

    run()


def quit_at_once(_signal: int, _frame: FrameType | None) -> None:
    """What Ctrl-C does while the program starts."""
    os.write(2, b"mmsearch: interrupted\n")
    os._exit(130)

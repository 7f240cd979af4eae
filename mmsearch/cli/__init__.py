"""The command line. `main` is the program; each command has a file of its own."""

from __future__ import annotations

from mmsearch.cli.app import main

__all__ = ["main"]

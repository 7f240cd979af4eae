"""Where media files are read from."""

from __future__ import annotations

import os
from typing import Protocol


class MediaSource(Protocol):
    """Opens media files by their absolute paths."""

    def open(self, path: bytes) -> int:
        """A descriptor to read a file by, which the caller closes.

        Raises:
            OSError: it cannot be read.
        """
        ...


class LocalFiles:
    """The files of this machine."""

    def open(self, path: bytes) -> int:
        # O_NONBLOCK: a FIFO that took a file's place since the walk must not hang us.
        return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))

"""Tells whether a file changed, and whether two files are the same."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import NamedTuple

LEAST, MOST = -(2**63), 2**63 - 1
HASH_BYTES = 16
#: The largest file that is read into memory.
MAX_FILE_BYTES = 512 * 1024 * 1024


class Stamp(NamedTuple):
    """Size in bytes and modification time in nanoseconds: equal means "did not change"."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """What `stat` says, within what the catalog can hold: a time in 1677 to 2262."""
        return cls(
            *(max(LEAST, min(value, MOST)) for value in (status.st_size, status.st_mtime_ns))
        )


def content_hash(content: bytes) -> bytes:
    """BLAKE2b-128 over the whole content: two files with one hash share one embedding."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()


#: The stamp of a file that could not even be read: no file has it, so it is tried again.
NEVER = Stamp(-1, 0)


def content_of(descriptor: int) -> tuple[Stamp, bytes, str]:
    """The stamp of a file that is open, and its bytes, or why they cannot be had."""
    try:
        status = os.fstat(descriptor)
        stamp = Stamp.of(status)
        if not stat.S_ISREG(status.st_mode):
            return NEVER, b"", "cannot be read: not a regular file"
        if stamp.size > MAX_FILE_BYTES:
            return stamp, b"", f"too large: {stamp.size >> 20} MiB"
        with open(descriptor, "rb", closefd=False) as file:
            return stamp, file.read(), ""
    except OSError as error:
        return NEVER, b"", unreadable(error)


def unreadable(error: OSError) -> str:
    """Why a file cannot be read, in words."""
    return f"cannot be read: {error.strerror or error}"

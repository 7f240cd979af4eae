"""Tells whether a file changed, and whether two files are the same."""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple


class Stamp(NamedTuple):
    """Size in bytes and modification time in nanoseconds: equal means "did not change"."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_size, status.st_mtime_ns)


def content_hash(content: bytes) -> bytes:
    """BLAKE2b-128 over the whole content: two files with one hash share one embedding."""
    return hashlib.blake2b(content, digest_size=16).digest()

"""Checksums of what an index keeps: they tell what a disk has changed, not what a person has.

XXH3 (Collet 2019) rather than a cryptographic hash: nothing hides a change on purpose here, and a
search checks all that it reads, at the speed of memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

_PART = 4 << 20


def of_vector(content: bytes | memoryview, item_id: int) -> int:
    """The checksum of an item's vector, as SQLite's signed 64 bits: it fits no other item."""
    found: int = xxhash.xxh3_64_intdigest(content, item_id)
    return found - (1 << 64) if found >= 1 << 63 else found


def of_parts(*parts: bytes) -> bytes:
    """The checksum of parts one after the other, 16 bytes."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return bytes(digest.digest())


def of_file(path: Path) -> bytes:
    """The checksum of a file, 16 bytes.

    It is read, not mapped: a disk that fails then raises an error instead of ending the process.

    Raises:
        OSError: the file is not there, or cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        return of_descriptor(file.fileno())


def of_descriptor(descriptor: int) -> bytes:
    """The checksum of a file that is open, from its start, 16 bytes.

    Raises:
        OSError: it cannot be read.
    """
    digest, buffer, done = xxhash.xxh3_128(), bytearray(_PART), 0
    view = memoryview(buffer)
    while size := os.preadv(descriptor, [buffer], done):
        digest.update(view[:size])
        done += size
    return bytes(digest.digest())

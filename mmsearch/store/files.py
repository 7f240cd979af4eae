"""Files that survive a power cut: written aside, synced, renamed, the folder synced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened
        sync_file(path)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it; a power cut does not unmake them."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    with suppress(PermissionError):  # a folder that may be written to and not be read
        sync_folder(path.parent)


def draft_of(path: Path) -> Path:
    """Where the new content of a file is written before it takes the file's name."""
    return path.with_name(f".{path.name}.new")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes a file's place: after a crash it is the old one or the new one."""
    draft = draft_of(path)
    try:
        yield draft
        sync_file(draft)
        draft.replace(path)
    except BaseException:
        with suppress(OSError):  # half a file of no use takes room on a full disk
            draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Replaces a file: after a crash it has the old content or the new, never a part."""
    with replacing(path) as draft:
        draft.write_bytes(content)

"""Files that survive a power cut: written aside, synced, renamed, the folder synced."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def sync_file(path: Path) -> None:
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it; a power cut does not unmake them."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    with suppress(PermissionError):  # a folder that may be written to and not be read
        sync_folder(path.parent)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def draft_of(path: Path) -> Path:
    """Where the new content of a file is written before it takes the file's name."""
    return path.with_name(f".{path.name}.new")


def write_durably(path: Path, content: bytes) -> None:
    """Replaces a file: after a crash it has the old content or the new, never a part."""
    draft = draft_of(path)
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # half a file of no use takes room on a full disk
            draft.unlink(missing_ok=True)
        raise
    os.replace(draft, path)
    sync_folder(path.parent)

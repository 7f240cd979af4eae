"""Paths as the catalog keeps them: bytes, relative to a root."""

from __future__ import annotations

import os
from pathlib import Path


def relative(path: bytes, root: bytes) -> bytes | None:
    """`path` relative to `root` ("" where they are the same), or None where it lies outside."""
    if path == root:
        return b""
    top = root.rstrip(b"/") + b"/"
    return path[len(top) :] if path.startswith(top) else None


def canonical(path: bytes) -> bytes:
    """An absolute path without symbolic links in its folders: a folder has one such path.

    A link to a file keeps its name, since that is the name that the file is indexed under.
    """
    if os.path.isdir(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def join(root: bytes, path: bytes) -> bytes:
    return os.path.join(root, path)


def to_path(path: bytes) -> Path:
    """A path for people and for `open`; bytes that are not text survive the round trip."""
    return Path(os.fsdecode(path))

"""Walks folders for media files."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmsearch.media.fingerprint import Stamp
from mmsearch.media.media_types import PICTURES, MediaTypes

SKIPPED_FOLDERS = frozenset((b"node_modules", b"@eaDir"))


class FoundFile(NamedTuple):
    """A media file: its path relative to the root, and what `stat` says of it."""

    path: bytes
    stamp: Stamp
    sidecar: Stamp | None = None
    """The stamp of `name.txt` beside `name.jpg`, if there is one."""


@dataclass(frozen=True)
class Unreadable:
    """A folder or a file that could not be looked at."""

    path: bytes
    reason: str


def walk(
    root: bytes,
    start: bytes = b"",
    exclude: Sequence[str] = (),
    others: Sequence[bytes] = (),
    types: MediaTypes = PICTURES,
) -> Iterator[FoundFile | Unreadable]:
    """The media files below `root/start`, in a stable order.

    Hidden names, `node_modules` and `@eaDir` are left out, and whatever matches a glob of
    `exclude` by its name or its path relative to `root`. Folders behind symbolic links are
    walked after all others and each folder only once, so loops end and a file is found
    under its real place rather than under a link to it.

    Args:
        root: an absolute path, as bytes because file names need not be text.
        start: where to start, relative to `root`; a folder or a single file.
        exclude: shell globs.
        others: folders that are walked on their own, without symbolic links in their paths:
            links that lead there are left out.
        types: which files are media.
    """
    top = os.path.join(root, start) if start else root
    try:
        status = os.stat(top)
    except OSError as error:
        yield Unreadable(start, error.strerror or str(error))
        return
    if not stat.S_ISDIR(status.st_mode):
        yield from _single_file(root, start)
        return
    walker = _Walker(root, [os.fsencode(glob) for glob in exclude], others, types)
    yield from walker.run(start, status)


def _single_file(root: bytes, path: bytes) -> Iterator[FoundFile | Unreadable]:
    try:
        yield _file(root, path, os.stat(os.path.join(root, path)), has_sidecar=True)
    except OSError as error:
        yield Unreadable(path, error.strerror or str(error))


def _file(
    root: bytes, path: bytes, status: os.stat_result, *, has_sidecar: bool
) -> FoundFile | Unreadable:
    if not stat.S_ISREG(status.st_mode):
        return Unreadable(path, "not a regular file")
    sidecar = _sidecar_stamp(os.path.join(root, path)) if has_sidecar else None
    return FoundFile(path, Stamp.of(status), sidecar)


def _sidecar_stamp(full: bytes) -> Stamp | None:
    try:
        status = os.stat(sidecar_path(full))
    except OSError:
        return None
    return Stamp.of(status) if stat.S_ISREG(status.st_mode) else None


def sidecar_path(image: bytes) -> bytes:
    return os.path.splitext(image)[0] + b".txt"


class _Walker:
    def __init__(
        self, root: bytes, exclude: Iterable[bytes], others: Sequence[bytes], types: MediaTypes
    ) -> None:
        self._root = root
        self._exclude = tuple(exclude)
        self._others = others
        self._types = types
        self._seen: set[tuple[int, int]] = set()
        self._linked: deque[bytes] = deque()

    def run(self, start: bytes, status: os.stat_result) -> Iterator[FoundFile | Unreadable]:
        self._is_first_visit(status)
        for other in self._others:
            with contextlib.suppress(OSError):
                self._is_first_visit(os.stat(other))
        yield from self._folder(start)
        while self._linked:
            path = self._linked.popleft()
            full = os.path.join(self._root, path)
            try:
                target = os.stat(full)
            except OSError as error:
                yield Unreadable(path, error.strerror or str(error))
                continue
            if not self._is_walked_elsewhere(full) and self._is_first_visit(target):
                yield from self._folder(path)

    def _folder(  # noqa: C901 - the rules of a walk, one after the other
        self, top: bytes
    ) -> Iterator[FoundFile | Unreadable]:
        # A stack, not recursion: a tree may be deeper than Python's call stack.
        stack = [top]
        while stack:
            folder = stack.pop()
            try:
                with os.scandir(os.path.join(self._root, folder)) as entries:
                    listing = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                yield Unreadable(folder, error.strerror or str(error))
                continue
            before = folder + b"/" if folder else b""
            texts = {entry.name for entry in listing if entry.name.endswith(b".txt")}
            below = []
            for entry in listing:
                if entry.name.startswith(b"."):
                    continue
                path = before + entry.name
                if self._exclude and self._excluded(entry.name, path):
                    continue
                try:
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name not in SKIPPED_FOLDERS and self._is_first_visit(
                            entry.stat(follow_symlinks=False)
                        ):
                            below.append(path)
                    elif entry.is_symlink() and entry.is_dir():
                        if entry.name not in SKIPPED_FOLDERS:
                            self._linked.append(path)
                    elif self._is_media(entry.name):
                        has_sidecar = bool(texts) and sidecar_path(entry.name) in texts
                        yield _file(self._root, path, entry.stat(), has_sidecar=has_sidecar)
                except OSError as error:
                    # A link that loops or leads nowhere is a failure if it is called a media file.
                    if not entry.is_symlink() or self._is_media(entry.name):
                        yield Unreadable(path, error.strerror or str(error))
            stack.extend(reversed(below))

    def _is_media(self, name: bytes) -> bool:
        return self._types.place_of(name) is not None

    def _is_walked_elsewhere(self, full: bytes) -> bool:
        real = os.path.realpath(full) + b"/"
        return any(real.startswith(other.rstrip(b"/") + b"/") for other in self._others)

    def _is_first_visit(self, folder: os.stat_result) -> bool:
        key = folder.st_dev, folder.st_ino
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new

    def _excluded(self, name: bytes, path: bytes) -> bool:
        return any(
            fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(path, glob)
            for glob in self._exclude
        )

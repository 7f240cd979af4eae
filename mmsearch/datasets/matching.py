"""Which files the images of a labelled set are."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from mmsearch.datasets.labelled import LabelledImage

Key = TypeVar("Key", bound=Hashable)


class Files(Generic[Key]):
    """Files that labels may mean, each with its path within its root and its absolute path.

    A name is the same whether its accents are characters of their own or not: a Mac writes
    file names in one way, and most programs write captions files in the other.
    """

    def __init__(self, files: Iterable[tuple[Key, bytes, bytes]]) -> None:
        self._absolute: dict[bytes, Key] = {}
        self._relative: dict[bytes, list[Key]] = {}
        self._name: dict[bytes, list[Key]] = {}
        for key, path, absolute in files:
            self._absolute.setdefault(composed(absolute), key)
            self._relative.setdefault(composed(path), []).append(key)
            self._name.setdefault(composed(os.path.basename(path)), []).append(key)

    def of(
        self,
        images: Sequence[LabelledImage],
        bases: Sequence[bytes],
        among: Sequence[LabelledImage] | None = None,
    ) -> list[Key | None]:
        """For each image its file, by its path, then by its name if that is unique; else None.

        Args:
            bases: the folders that paths in the labels may be relative to, the likeliest first.
                After them comes each file's own root, where only one root has such a file.
            among: all images of the labels, where these are some of them.
        """
        paths = [_path_of(image) for image in images]
        names = Counter(os.path.basename(_path_of(image)) for image in among or images)
        tops = [composed(base) for base in bases]
        return [self._file(path, tops, names) for path in paths]

    def _file(self, path: bytes, bases: list[bytes], names: Counter[bytes]) -> Key | None:
        places = (os.path.normpath(os.path.join(base, path)) for base in bases)
        name = os.path.basename(path)
        tried: Iterable[Sequence[Key]] = (
            *([self._absolute[place]] for place in places if place in self._absolute),
            self._relative.get(path, ()),
            self._name.get(name, ()) if names[name] == 1 else (),
        )
        return next((found[0] for found in tried if len(found) == 1), None)


def _path_of(image: LabelledImage) -> bytes:
    return composed(os.path.normpath(os.fsencode(image.file)))


def composed(path: bytes) -> bytes:
    """A path with its accented letters as one character each (Unicode's NFC), if it is text."""
    if path.isascii():
        return path
    return os.fsencode(unicodedata.normalize("NFC", os.fsdecode(path)))

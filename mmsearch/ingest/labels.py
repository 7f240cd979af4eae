"""Which captions belong to which files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmsearch.datasets.labelled import LabelledSet
from mmsearch.datasets.sidecar import clean_captions

FileKey = tuple[int, bytes]
"""A root's id and a path relative to it."""


@dataclass(frozen=True)
class Labels:
    """Captions by file, and the names in the captions file that match no file."""

    captions: dict[FileKey, tuple[str, ...]]
    unmatched: tuple[str, ...]


def match_labels(
    labelled: LabelledSet, files: Iterable[tuple[FileKey, bytes]], bases: Sequence[bytes]
) -> Labels:
    """Finds each labelled image among the files: by its path, then by its name if that is unique.

    Args:
        labelled: what the captions file says.
        files: each file's key and absolute path.
        bases: the folders that paths in the captions file may be relative to, the likeliest
            first. After them comes each file's own root, where only one root has such a file.
    """
    by_absolute: dict[bytes, FileKey] = {}
    by_relative: dict[bytes, list[FileKey]] = {}
    by_name: dict[bytes, list[FileKey]] = {}
    for key, absolute in files:
        by_absolute[absolute] = key
        by_relative.setdefault(key[1], []).append(key)
        by_name.setdefault(os.path.basename(key[1]), []).append(key)
    names = Counter(os.path.basename(os.fsencode(image.file)) for image in labelled.images)

    found: dict[FileKey, tuple[str, ...]] = {}
    unmatched = []
    for image in labelled.images:
        path = os.path.normpath(os.fsencode(image.file))
        name = os.path.basename(path)
        places = (os.path.normpath(os.path.join(base, path)) for base in bases)
        match = next((by_absolute[place] for place in places if place in by_absolute), None)
        if match is None and len(by_relative.get(path, ())) == 1:
            match = by_relative[path][0]
        if match is None and names[name] == 1 and len(by_name.get(name, ())) == 1:
            match = by_name[name][0]
        if match is None:
            unmatched.append(image.file)
        else:
            found[match] = found.get(match, ()) + clean_captions(image.captions)
    return Labels(found, tuple(unmatched))


@dataclass(frozen=True)
class CaptionChange:
    """What has to be done to an image's captions."""

    add: tuple[tuple[str, str], ...] = ()
    """Texts and their sources."""
    remove: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.add or self.remove)


def caption_change(
    present: Sequence[tuple[int, str, str]], wanted: dict[str, tuple[str, ...]]
) -> CaptionChange:
    """How to get from the captions that are there to those that should be.

    Args:
        present: id, text and source of each caption that the image has.
        wanted: the texts of each source that is known; other sources stay as they are.
    """
    remove, add = [], []
    for source, texts in wanted.items():
        missing = Counter(texts)
        for number, text, origin in present:
            if origin != source:
                continue
            if missing[text] > 0:
                missing[text] -= 1
            else:
                remove.append(number)
        for text in texts:
            if missing[text] > 0:
                missing[text] -= 1
                add.append((text, source))
    return CaptionChange(tuple(add), tuple(remove))

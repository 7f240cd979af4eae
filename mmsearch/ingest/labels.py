"""Which captions belong to which files."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.datasets.matching import Files
from mmsearch.datasets.sidecar import clean_captions
from mmsearch.store.rows import FILE, is_from_file

FileKey = tuple[int, bytes]
"""A root's id and a path relative to it."""


@dataclass(frozen=True)
class Labels:
    """Captions by file, and the names in the captions file that match no file."""

    captions: dict[FileKey, tuple[str, ...]]
    unmatched: tuple[str, ...]
    source: str = FILE
    """What the catalog is to keep as the source of these captions."""
    dropped: frozenset[FileKey] = frozenset()
    """Files that had captions of this source, which names them no more."""

    def wanted(self, key: FileKey) -> dict[str, tuple[str, ...]]:
        """The captions of a file by their source, where these labels say what those are."""
        if key in self.captions:
            return {self.source: self.captions[key]}
        return {self.source: ()} if key in self.dropped else {}


def match_labels(
    labelled: LabelledSet,
    files: Iterable[tuple[FileKey, bytes]],
    bases: Sequence[bytes],
    among: Sequence[LabelledImage] | None = None,
) -> Labels:
    """Finds each labelled image among the files: by its path, then by its name if that is unique.

    Args:
        labelled: what the captions file says.
        files: each file's key and absolute path.
        bases: the folders that paths in the captions file may be relative to.
        among: all images of the file, where the set has some of them: a name must be unique there.
    """
    known = Files((key, key[1], absolute) for key, absolute in files)
    found: dict[FileKey, tuple[str, ...]] = {}
    unmatched = []
    for image, match in zip(labelled.images, known.of(labelled.images, bases, among), strict=True):
        if match is None:
            unmatched.append(image.file)
        else:
            found[match] = found.get(match, ()) + clean_captions(image.captions)
    if not labelled.source:
        return Labels(found, tuple(unmatched))
    # The same for the same file, wherever it is named from.
    digest = hashlib.blake2b(os.fsencode(labelled.source), digest_size=8).hexdigest()
    return Labels(found, tuple(unmatched), f"{FILE}:{digest}")


@dataclass(frozen=True)
class CaptionChange:
    """What has to be done to an image's captions."""

    add: tuple[tuple[str, str], ...] = ()
    """Texts and their sources."""
    remove: tuple[int, ...] = ()
    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Captions that are of another captions file from now on, by their new source."""


def caption_change(
    present: Sequence[tuple[int, str, str]], wanted: dict[str, tuple[str, ...]]
) -> CaptionChange:
    """How to get from the captions that are there to those that should be.

    Args:
        present: id, text and source of each caption that the image has.
        wanted: the texts of each source that is known; other sources stay as they are, but that
            texts of a captions file take the place of those of another.
    """
    remove, add = [], []
    keep: dict[str, tuple[int, ...]] = {}
    for source, texts in wanted.items():
        missing = Counter(texts)
        others = [row for row in present if row[2] != source and is_from_file(row[2])]
        rows = [row for row in present if row[2] == source]
        for number, text, origin in rows + (others if texts and is_from_file(source) else []):
            if missing[text] == 0:
                remove.append(number)
                continue
            missing[text] -= 1
            if origin != source:
                keep[source] = (*keep.get(source, ()), number)
        for text in texts:
            if missing[text] > 0:
                missing[text] -= 1
                add.append((text, source))
    return CaptionChange(tuple(add), tuple(remove), keep)

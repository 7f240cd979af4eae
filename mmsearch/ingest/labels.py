"""Which captions belong to which files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmsearch.datasets.labelled import LabelledSet

#: A caption is cut here: no text encoder reads as far.
MAX_CAPTION_CHARACTERS = 4096

FileKey = tuple[int, bytes]
"""A root's id and a path relative to it."""


@dataclass(frozen=True)
class Labels:
    """Captions by file, and the names in the captions file that match no file."""

    captions: dict[FileKey, tuple[str, ...]]
    unmatched: tuple[str, ...]


def match_labels(
    labelled: LabelledSet, files: Iterable[tuple[FileKey, bytes]], beside: Path | None = None
) -> Labels:
    """Finds each labelled image among the files: by its path, then by its name if that is unique.

    Args:
        labelled: what the captions file says.
        files: each file's key and absolute path.
        beside: the captions file's folder; paths in it may also be relative to there.
    """
    by_path: dict[bytes, FileKey] = {}
    by_name: dict[bytes, list[FileKey]] = {}
    for key, absolute in files:
        by_path[absolute] = key
        by_path.setdefault(key[1], key)
        by_name.setdefault(os.path.basename(key[1]), []).append(key)
    names: dict[bytes, int] = {}
    for image in labelled.images:
        name = os.path.basename(os.fsencode(image.file))
        names[name] = names.get(name, 0) + 1

    found: dict[FileKey, tuple[str, ...]] = {}
    unmatched = []
    for image in labelled.images:
        path = os.path.normpath(os.fsencode(image.file))
        name = os.path.basename(path)
        match = by_path.get(path)
        if match is None and beside is not None:
            match = by_path.get(os.path.join(os.fsencode(os.path.abspath(beside)), path))
        if match is None and names[name] == 1 and len(by_name.get(name, ())) == 1:
            match = by_name[name][0]
        if match is None:
            unmatched.append(image.file)
        else:
            found[match] = found.get(match, ()) + clean_captions(image.captions)
    return Labels(found, tuple(unmatched))


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts as captions: trimmed, without the empty ones. A repeated one is kept twice."""
    return tuple(text for text in map(_clean, texts) if text)


def _clean(text: str) -> str:
    # NULs and lone surrogates cannot be stored as text.
    plain = text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
    return plain.strip()[:MAX_CAPTION_CHARACTERS]


def read_sidecar(path: bytes) -> tuple[str, ...]:
    """The captions in a `name.txt`: one a line. A file that cannot be read has none."""
    try:
        with open(path, "rb") as file:
            content = file.read(1 << 20)
    except OSError:
        return ()
    return clean_captions(content.decode("utf-8-sig", "replace").splitlines())


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

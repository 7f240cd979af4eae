"""What every reader of a labelled set returns."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmsearch.errors import LabelsError, UsageError


@dataclass(frozen=True)
class LabelledImage:
    """One image of a labelled set.

    `file` is relative to the folder of the images, with forward slashes; `split` is in lower case,
    and "" where the format has none.
    """

    file: str
    captions: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True)
class LabelledSet:
    """Images with their captions, each image once, in the order of the file that was read."""

    name: str
    images: tuple[LabelledImage, ...]
    remarks: tuple[str, ...] = ()
    """What of the file could not be used, a line each."""
    source: str = ""
    """The path of the file, or of the folder with sidecars, that it was read from, without symbolic
    links; "" for none."""

    @classmethod
    def gathered(
        cls, name: str, entries: Iterable[LabelledImage | str], source: Path
    ) -> LabelledSet:
        """The set of some entries: those of one image are put together.

        Args:
            entries: images, and remarks on what could not be used.
            source: the file that they are read from.

        Raises:
            LabelsError: there is nothing, or nothing that can be used.
        """
        captions: dict[str, list[str]] = {}
        splits: dict[str, str] = {}
        remarks: list[str] = []
        for entry in entries:
            if isinstance(entry, str):
                remarks.append(entry)
            elif not _is_name(entry.file):
                remarks.append(f"{source}: a caption without the name of a picture")
            else:
                file, split = _plain(entry.file), entry.split.strip().lower()
                if splits.setdefault(file, split) != split:
                    remarks.append(
                        f"{source}: {file} is in two splits, '{splits[file]}' and '{split}'; the "
                        "first counts"
                    )
                texts = [text for text in entry.captions if text.strip()]
                if len(texts) < len(entry.captions):
                    remarks.append(f"{source}: a caption of {file} is empty")
                captions.setdefault(file, []).extend(texts)
        if not any(captions.values()):
            more = f", and {len(remarks) - 1} more like it" if len(remarks) > 1 else ""
            what = f"{remarks[0]}{more}: nothing in it can be used" if remarks else ""
            raise LabelsError(what or f"{source}: holds no captions")
        images = (
            LabelledImage(file, tuple(texts), splits[file]) for file, texts in captions.items()
        )
        return cls(name, tuple(images), tuple(remarks), os.path.realpath(source))

    def splits(self) -> list[str]:
        """The names of the splits that occur, in order of appearance."""
        return list(dict.fromkeys(image.split for image in self.images if image.split))

    def of_split(self, split: str) -> Iterator[LabelledImage]:
        return (image for image in self.images if image.split == split.lower())

    def choose(self, split: str | None, limit: int | None) -> tuple[str, list[LabelledImage]]:
        """The images of a split and its name; None is "test" where there is one, else all.

        Raises:
            UsageError: there is no such split.
        """
        splits = self.splits()
        if split is None:
            split = "test" if "test" in splits else ""
        chosen = list(self.of_split(split)) if split else list(self.images)
        if not chosen:
            known = f"it has {', '.join(splits)}" if splits else "it has no splits"
            raise UsageError(f"{self.name} has no split '{split}'; {known}")
        return split.lower(), chosen[:limit]


def _is_name(file: str) -> bool:
    """Whether a file could have that name."""
    try:
        os.fsencode(file)
    except UnicodeEncodeError:
        return False
    return bool(file.strip()) and "\0" not in file


def _plain(file: str) -> str:
    """One name for a picture, whether it is called a.jpg or ./a.jpg, or has Windows' slashes."""
    return posixpath.normpath(file if "/" in file else file.replace("\\", "/"))

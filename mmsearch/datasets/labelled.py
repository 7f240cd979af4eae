"""What every reader of a labelled set returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mmsearch.errors import UsageError


@dataclass(frozen=True)
class LabelledImage:
    """One image of a labelled set.

    `file` is relative to the folder of the images, with forward slashes; `split` is ""
    where the format has none.
    """

    file: str
    captions: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True)
class LabelledSet:
    """Images with their captions, in the order of the file that was read."""

    name: str
    images: tuple[LabelledImage, ...]

    def splits(self) -> list[str]:
        """The names of the splits that occur, in order of appearance."""
        return list(dict.fromkeys(image.split for image in self.images if image.split))

    def of_split(self, split: str) -> Iterator[LabelledImage]:
        return (image for image in self.images if image.split == split)

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
        return split, chosen[:limit]

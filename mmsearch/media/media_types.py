"""Media types: for each kind of file, its suffixes and what is in such a file.

A type is named by where it is imported from, "module:name": the decoders' processes import it too.
Nothing else in the program knows a type by name.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from mmsearch.types import Facts, InputSpec, Modality

__all__ = [
    "PICTURES",
    "Caption",
    "Facts",
    "MediaType",
    "MediaTypes",
    "Part",
    "Segment",
    "is_image_name",
]

#: Pictures are always among them: examples to search with are pictures, whatever they are called.
BUNDLED = ("mmsearch.media.picture:PICTURE",)


@dataclass(frozen=True)
class Segment:
    """What gets one vector: a picture, or a part of a recording."""

    modality: Modality
    data: NDArray[np.generic]
    """What the encoder takes, as its `InputSpec` has it."""
    start_ms: int | None = None
    """Where in the file it is; None for all of it."""
    end_ms: int | None = None


@dataclass(frozen=True)
class Caption:
    """A text that lies in the file."""

    text: str
    segment: int | None = None
    """The place, among the file's segments, of the one that it is about; None for the file."""
    language: str | None = None


Part = Facts | Segment | Caption


class MediaType(Protocol):
    """One kind of file."""

    kind: str
    """A word for it, as the catalog keeps it."""
    suffixes: Collection[str]
    """How the names of such files end: lower case, with the dot."""

    def read(self, file: BinaryIO, inputs: Mapping[Modality, InputSpec]) -> Iterator[Part]:
        """The parts of a file, one at a time. Called in a decoder's process.

        Args:
            file: at its start.
            inputs: the modalities that are wanted, and how; others are left out.

        Raises:
            DecodeError: it is damaged; the message is the reason. Any other error is one, too.
        """
        ...


class MediaTypes:
    """The media types that a program reads, by the suffixes of their files."""

    def __init__(self, *more: str) -> None:
        """Takes those of this package and others, as "module:name"."""
        self.paths = (*BUNDLED, *more)
        self.types = tuple(map(_imported, self.paths))
        self.kinds = frozenset(one.kind for one in self.types)
        self._places = {
            suffix.encode(): place
            for place, one in enumerate(self.types)
            for suffix in one.suffixes
        }

    def place_of(self, name: bytes) -> int | None:
        """Which of `types` a file's name or path belongs to; None for none."""
        # Quick for the walk of a large folder, then with care: ".jpg" alone has no suffix.
        place = self._places.get(name[name.rfind(b".") :].lower())
        return None if place is None or not os.path.splitext(name)[1] else place

    def folders(self) -> Sequence[str]:
        """Where the modules of the types lie, for a process that is to import them, too."""
        tops = dict.fromkeys(path.partition(":")[0].partition(".")[0] for path in self.paths)
        found = []
        for module in map(importlib.import_module, tops):
            inside = getattr(module, "__path__", None) or [module.__file__]
            found.append(os.path.dirname(next(iter(inside))))
        return found


def _imported(path: str) -> MediaType:
    module, _, name = path.partition(":")
    found: MediaType = getattr(importlib.import_module(module), name)
    return found


PICTURES = MediaTypes()


def is_image_name(name: bytes) -> bool:
    """Whether a file's name or path ends as an image's does."""
    return PICTURES.place_of(name) == 0

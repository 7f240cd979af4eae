"""The catalog's records as the rest of the program sees them, and what reading them needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import DamageError, UsageError
from mmsearch.store.checksum import of_vector
from mmsearch.types import TEXT, EncoderSpec, Facts, Ids, Modality

Vector = NDArray[np.float32] | bytes
"""Of shape (dim,), or its bytes as they are stored."""

#: What a space or a tower is (`state`).
ACTIVE, PENDING, OBSOLETE = 1, 0, -1
#: Where captions come from (`caption.source`): a sidecar, the file itself, or a captions file;
#: behind "file" stands which one it was.
SIDECAR, EMBEDDED, FILE = "sidecar", "embedded", "file"
_SNAPSHOT_NAME = re.compile(r"\d+-[a-z0-9_.]+-\d+\.faiss")


@dataclass(frozen=True)
class TowerRow:
    """What the vectors of one modality in one space come from."""

    space_id: int
    key: str
    """Its name within the space."""
    modality: Modality
    dim: int

    @property
    def items(self) -> str:
        """The table of what it gives vectors to."""
        return "caption" if self.modality == TEXT else "segment"

    @property
    def modality_of_item(self) -> str:
        """What gives the modality of a row of that table, in SQL."""
        return "'text'" if self.modality == TEXT else "modality"


@dataclass(frozen=True)
class SpaceRow:
    """An embedding space of the index, with the catalog's own number for it."""

    id: int
    spec: EncoderSpec
    precision: str
    """What its vectors were computed in; "mixed" where that changed."""
    towers: Mapping[Modality, TowerRow]

    def tower(self, modality: Modality) -> TowerRow:
        """What gives the vectors of a modality.

        Raises:
            UsageError: nothing does.
        """
        if modality not in self.towers:
            raise UsageError(f"the index's model embeds {', '.join(self.towers)}, no '{modality}'")
        return self.towers[modality]


@dataclass(frozen=True)
class RootRow:
    """A folder whose files are indexed. `walked` is false where only files were named."""

    id: int
    path: bytes
    walked: bool
    exclude: tuple[str, ...]


@dataclass(frozen=True)
class SnapshotRow:
    """The vector file that stands for the embeddings up to `last_embedding_id`."""

    generation: int
    file: str
    vectors: int
    last_embedding_id: int
    checksum: bytes
    """Of the file."""
    ivf: bytes | None = None
    """The checksum of the file of inverted lists over it; None while there is none."""


@dataclass(frozen=True)
class CaptionRecord:
    """A caption with its vector (dim,)."""

    text: str
    source: str
    """`caption.source` in the catalog: "sidecar", "embedded", "file", or "file:" and which."""
    vector: Vector
    segment: int | None = None
    """The place of the segment that it is about among the file's; None for all of the file."""
    language: str | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class SegmentRecord:
    """A part of a file with its vector (dim,), or all of it."""

    modality: Modality
    vector: Vector
    start_ms: int | None = None
    end_ms: int | None = None


@dataclass(frozen=True)
class MediaRecord:
    """A media file with all that the catalog has of it."""

    root_id: int
    path: bytes
    size: int
    mtime_ns: int
    content_hash: bytes
    facts: Facts
    segments: Sequence[SegmentRecord]
    captions: Sequence[CaptionRecord] = ()
    sidecar: tuple[int, int] | None = None
    """Size and mtime_ns of the sidecar file that the captions came from."""


class MediaRow(NamedTuple):
    """What tells whether a file changed."""

    id: int
    path: bytes
    size: int
    mtime_ns: int
    content_hash: bytes
    sidecar_size: int | None
    sidecar_mtime_ns: int | None
    kind: str | None


class CaptionRow(NamedTuple):
    """A caption in the catalog."""

    id: int
    media_id: int
    text: str
    source: str
    segment_id: int | None
    language: str | None
    confidence: float | None


class FailureRow(NamedTuple):
    """A failed file."""

    path: bytes
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Item:
    """What a hit shows: a media file, and the caption or the part of it that was found."""

    media_id: int
    path: bytes
    caption: str | None = None
    start_ms: int | None = None
    end_ms: int | None = None
    modality: Modality = TEXT


@dataclass(frozen=True)
class MissingSegment:
    """A segment that has no vector of some tower yet, and the file that it is a part of."""

    id: int
    place: int
    """Among the file's segments of its modality, from 0."""
    media_id: int
    root_id: int
    path: bytes
    """Relative to the root."""
    size: int
    mtime_ns: int
    content_hash: bytes
    absolute: bytes


def is_from_file(source: str) -> bool:
    """Whether captions of a source came from a captions file."""
    return source.partition(":")[0] == FILE


@contextmanager
def decoding(what: str = "a row is not as it was written") -> Iterator[None]:
    """Around code that takes rows apart: what stumbles over one has met a damaged row.

    Args:
        what: is damaged.

    Raises:
        DamageError: instead of what Python raises.
    """
    try:
        yield
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError) as error:
        raise DamageError.of_catalog(f"{what} ({error})") from error


def id_of(value: Any) -> int:
    """An id of the catalog's: they count from 1."""
    number = int(value)
    if number < 1:
        raise ValueError(f"{number} is no id")
    return number


def ids_of(values: Sequence[Any]) -> Ids:
    """Ids of the catalog's, (n,)."""
    found = np.array(values, np.int64)
    if len(found):
        id_of(found.min())
    return found


def stored_time(moment: datetime) -> str:
    """A moment as the catalog keeps it: local time, so that it sorts as text."""
    return moment.replace(tzinfo=None, microsecond=0).isoformat()


def moment_of(stored: str) -> datetime | None:
    """The same the other way; None for what is no moment."""
    try:
        return datetime.fromisoformat(stored)
    except ValueError:
        return None


def local_time(mtime_ns: int) -> datetime:
    """A file's modification time, in local time."""
    try:
        return datetime.fromtimestamp(mtime_ns / 1e9)
    except (OverflowError, ValueError, OSError):  # a file system's nonsense
        return datetime(1970, 1, 1)


@decoding("what a folder leaves out")
def globs_of(exclude: str) -> tuple[str, ...]:
    """What a root leaves out, from the catalog's JSON.

    Raises:
        DamageError: it is none.
    """
    found = json.loads(exclude)
    if not isinstance(found, list) or not all(isinstance(glob, str) for glob in found):
        raise ValueError("no list of texts")
    return tuple(found)


def under(prefix: bytes) -> tuple[str, tuple[bytes, ...]]:
    """The condition that a relative path is `prefix` or lies below it, and its values."""
    if not prefix:
        return "path IS NOT NULL", ()
    # All that starts with "prefix/" sorts before "prefix0": "0" follows "/". The range is what an
    # index can serve; the rest leaves out what is only spelt alike, as "prefix-1".
    condition = "(path >= ? AND path < ? AND (path = ? OR path >= ?))"
    return condition, (prefix, prefix + b"0", prefix, prefix + b"/")


def is_snapshot_name(name: object) -> bool:
    return isinstance(name, str) and _SNAPSHOT_NAME.fullmatch(name) is not None


def is_sound(tower: TowerRow, item_id: int, vector: bytes, checksum: int) -> bool:
    """Whether a vector is what was written."""
    whole = isinstance(vector, bytes) and len(vector) == 4 * tower.dim
    return whole and of_vector(vector, item_id) == checksum

"""Vectors that are missing: those of another model on the way to it, and those that were lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np

from mmsearch.encoders.base import Encoder
from mmsearch.ingest.reading import Decoded, decode_known
from mmsearch.jobs.runner import Runner, parts
from mmsearch.media.fingerprint import NEVER
from mmsearch.media.sandbox import Decoders
from mmsearch.store.queries import Queries
from mmsearch.store.rows import MissingSegment, SpaceRow, TowerRow
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import TEXT, OnProgress, Progress, Vectors, no_progress

Item = TypeVar("Item")
_Read = tuple[list[MissingSegment], Decoded]
"""The segments of a file, and what came of it."""
_Vectors = dict[int, np.ndarray]
"""Of what they are, by id, (dim,) each."""
PORTION = 1024  # items that are looked up together


def paged(
    store: Store,
    look_up: Callable[[Queries, int, int], Sequence[Item]],
    number: Callable[[Item], int],
) -> Iterator[Item]:
    """What a query finds by id, a portion at a time: no transaction lasts as long as the work.

    Args:
        look_up: finds what has an id above a given one, at most so many.
        number: the id of what it found.
    """
    after = 0
    while True:
        with store.catalog.read() as queries:
            some = look_up(queries, after, PORTION)
        if not some:
            return
        yield from some
        after = number(some[-1])


def missing_segments(store: Store, tower: TowerRow) -> Iterator[MissingSegment]:
    """The segments, by id, that have no vector of a tower."""
    return paged(
        store,
        lambda queries, *page: queries.segments_without_vector(tower, *page),
        lambda item: item.id,
    )


@dataclass(frozen=True)
class Embedded:
    """What was done, and what is still to do."""

    images: int
    captions: int
    failed: int
    """Files that could not be used."""
    missing: int
    """Segments without a vector in the space: their files could not be had, or not used."""


def embed_missing(
    store: Store,
    writer: Writer,
    encoder: Encoder,
    space: SpaceRow,
    runner: Runner,
    *,
    on_progress: OnProgress = no_progress,
) -> Embedded:
    """Gives a vector in `space` to all segments and captions that have none there yet.

    A batch at a time is committed: what was done stays, whatever happens. Files that are not
    there, or not as they were indexed, are passed over: the next look at their folder is for them.
    Those that cannot be used are recorded as failures.
    """
    with store.catalog.read() as queries:
        totals = {tower: queries.count_without_vector(tower) for tower in space.towers.values()}
    bulk = encoder.with_streams(runner.workers) if any(totals.values()) else encoder
    images = captions = failed = 0
    for tower, total in totals.items():
        if not total:
            continue
        what = (store, writer, bulk, tower, runner.decoders, total, on_progress)
        if tower.modality == TEXT:
            texts = _Captions(*what)
            runner.run(texts, total)
            captions += texts.done
        else:
            bulk.warm_up(tower.modality)
            segments = _Segments(*what)
            runner.run(segments, total)
            images += segments.embedded
            failed += segments.failed
    writer.compact(only_if="short")
    total = sum(total for tower, total in totals.items() if tower.modality != TEXT)
    return Embedded(images, captions, failed, missing=total - images)


@dataclass
class _TowerJob:
    """What the two jobs that fill a tower have in common."""

    store: Store
    writer: Writer
    encoder: Encoder
    tower: TowerRow
    decoders: Decoders
    total: int
    on_progress: OnProgress
    done: int = 0

    def tell(self, stage: str) -> None:
        """After a commit."""
        self.writer.compact(only_if="long")
        self.on_progress(Progress(stage, self.done, self.total))


class _Segments(_TowerJob):
    """The segments that have no vector of a tower."""

    embedded = 0
    failed = 0

    @property
    def size(self) -> int:
        return max(16, self.encoder.batch)

    def missing(self) -> Iterator[list[MissingSegment]]:
        """What each file is missing."""
        segments = missing_segments(self.store, self.tower)
        for _, own in groupby(segments, key=lambda item: item.media_id):
            yield list(own)

    def read(self, item: list[MissingSegment]) -> _Read:
        modality = self.tower.modality
        inputs = {modality: self.encoder.spec.inputs[modality]}
        return item, decode_known(item[0].absolute, item[0].content_hash, inputs, self.decoders)

    def compute(self, reads: Sequence[_Read]) -> tuple[Sequence[_Read], _Vectors]:
        good = [
            (one.id, opened.segments[one.place].data)
            for item, opened in reads
            for one in item
            if one.place < len(opened.segments)
        ]
        vectors: _Vectors = {}
        for some in parts(good, self.encoder.batch):
            rows = self.encoder.encode(self.tower.modality, [data for _, data in some])
            vectors.update(zip((number for number, _ in some), rows, strict=True))
        return reads, vectors

    def commit(self, outcomes: Sequence[tuple[Sequence[_Read], _Vectors]]) -> None:
        with self.writer.change() as change:
            for reads, vectors in outcomes:
                change.add_vectors(vectors, self.tower)
                # What failed before has not failed any more.
                change.clear_failures(
                    (item[0].root_id, item[0].path) for item, _ in reads if item[0].id in vectors
                )
                for (item, *_), opened in reads:
                    if opened.reason and _has_failed(item, opened):
                        change.record_failure(
                            item.root_id, item.path, opened.stamp.size, opened.stamp.mtime_ns,
                            opened.reason,
                        )  # fmt: skip
                        self.failed += 1
                self.done += sum(len(item) for item, _ in reads)
                self.embedded += len(vectors)
        self.tell("embed again")


def _has_failed(item: MissingSegment, opened: Decoded) -> bool:
    """Not so a file that is not there, or not as it was when the index looked at it."""
    if opened.stamp == NEVER:
        return os.path.lexists(item.absolute)
    return opened.stamp == (item.size, item.mtime_ns)


class _Captions(_TowerJob):
    """The captions that have no vector of a tower."""

    size = 64

    def missing(self) -> Iterator[tuple[int, str]]:
        return paged(
            self.store,
            lambda queries, *page: queries.captions_without_vector(self.tower, *page),
            lambda caption: caption[0],
        )

    def read(self, item: tuple[int, str]) -> tuple[int, str]:
        return item

    def compute(self, reads: Sequence[tuple[int, str]]) -> dict[int, np.ndarray]:
        rows: Vectors = self.encoder.encode(TEXT, [text for _, text in reads])
        return dict(zip((number for number, _ in reads), rows, strict=True))

    def commit(self, outcomes: Sequence[dict[int, np.ndarray]]) -> None:
        with self.writer.change() as change:
            for vectors in outcomes:
                change.add_vectors(vectors, self.tower)
                self.done += len(vectors)
        self.tell("embed captions again")

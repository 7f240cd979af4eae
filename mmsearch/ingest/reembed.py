"""Vectors that are missing: those of another model on the way to it, and those that were lost."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mmsearch.encoders.base import Encoder
from mmsearch.ingest.reading import Decoded, decode_known
from mmsearch.jobs.runner import Runner, parts
from mmsearch.media.fingerprint import NEVER
from mmsearch.media.sandbox import Decoders
from mmsearch.store.rows import MissingSegment, SpaceRow, TowerRow
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import TEXT, OnProgress, Progress, Vectors, no_progress

_PORTION = 1024  # items that are looked up together


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
    Those that cannot be used go to the ledger.
    """
    with store.catalog.read() as queries:
        totals = {tower: queries.count_without_vector(tower) for tower in space.towers.values()}
    done = dict.fromkeys(("images", "captions", "failed"), 0)
    bulk = encoder.with_streams(runner.workers) if any(totals.values()) else encoder
    for tower, total in totals.items():
        if not total:
            continue
        if tower.modality == TEXT:
            texts = _Captions(store, writer, bulk, tower, total, on_progress)
            runner.run(texts, total)
            done["captions"] += texts.done
        else:
            bulk.warm_up(tower.modality)
            segments = _Segments(store, writer, bulk, tower, runner.decoders, total, on_progress)
            runner.run(segments, total)
            done["images"] += segments.embedded
            done["failed"] += segments.failed
    writer.compact(only_if="short")
    total = sum(total for tower, total in totals.items() if tower.modality != TEXT)
    return Embedded(**done, missing=total - done["images"])


@dataclass(frozen=True)
class _Part:
    """Segments that were read, with the vectors (dim,) of those that are good."""

    reads: Sequence[tuple[list[MissingSegment], Decoded]]
    """The segments of each file, and what came of it."""
    vectors: dict[int, np.ndarray]


@dataclass
class _Segments:
    """The segments that have no vector of a tower."""

    store: Store
    writer: Writer
    encoder: Encoder
    tower: TowerRow
    decoders: Decoders
    total: int
    on_progress: OnProgress
    done: int = 0
    embedded: int = 0
    failed: int = 0

    @property
    def size(self) -> int:
        return max(16, self.encoder.batch)

    def missing(self) -> Iterator[list[MissingSegment]]:
        """What each file is missing."""
        after = 0
        while True:
            with self.store.catalog.read() as queries:
                some = queries.segments_without_vector(self.tower, after, _PORTION)
            if not some:
                return
            for _, own in groupby(some, key=lambda item: item.media_id):
                yield list(own)
            after = some[-1].id

    def read(self, item: list[MissingSegment]) -> tuple[list[MissingSegment], Decoded]:
        modality = self.tower.modality
        inputs = {modality: self.encoder.spec.inputs[modality]}
        return item, decode_known(item[0].absolute, item[0].content_hash, inputs, self.decoders)

    def compute(self, reads: Sequence[tuple[list[MissingSegment], Decoded]]) -> _Part:
        good = [
            (one.id, opened.segments[one.place].data)
            for item, opened in reads
            for one in item
            if one.place < len(opened.segments)
        ]
        vectors: dict[int, np.ndarray] = {}
        for some in parts(good, self.encoder.batch):
            rows = self.encoder.encode(self.tower.modality, [data for _, data in some])
            vectors.update(zip((number for number, _ in some), rows, strict=True))
        return _Part(reads, vectors)

    def commit(self, outcomes: Sequence[_Part]) -> None:
        with self.writer.change() as change:
            for part in outcomes:
                change.add_vectors(part.vectors, self.tower)
                # What failed before has not failed any more.
                change.clear_failures(
                    (item[0].root_id, item[0].path)
                    for item, _ in part.reads
                    if item[0].id in part.vectors
                )
                for (item, *_), opened in part.reads:
                    if opened.reason and _has_failed(item, opened):
                        change.record_failure(
                            item.root_id, item.path, opened.stamp.size, opened.stamp.mtime_ns,
                            opened.reason,
                        )  # fmt: skip
                        self.failed += 1
                self.done += sum(len(item) for item, _ in part.reads)
                self.embedded += len(part.vectors)
        self.writer.compact(only_if="long")
        self.on_progress(Progress("embed again", self.done, self.total))


def _has_failed(item: MissingSegment, opened: Decoded) -> bool:
    """Not so a file that is not there, or not as it was when the index looked at it."""
    if opened.stamp == NEVER:
        return os.path.lexists(item.absolute)
    return opened.stamp == (item.size, item.mtime_ns)


@dataclass
class _Captions:
    """The captions that have no vector of a tower."""

    store: Store
    writer: Writer
    encoder: Encoder
    tower: TowerRow
    total: int
    on_progress: OnProgress
    done: int = 0
    size: int = 64

    def missing(self) -> Iterator[tuple[int, str]]:
        after = 0
        while True:
            with self.store.catalog.read() as queries:
                some = queries.captions_without_vector(self.tower, after, _PORTION)
            if not some:
                return
            yield from some
            after = some[-1][0]

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
        self.writer.compact(only_if="long")
        self.on_progress(Progress("embed captions again", self.done, self.total))

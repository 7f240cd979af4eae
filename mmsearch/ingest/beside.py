"""Vectors of another model for what an index holds already: the way from one model to the next."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from mmsearch.encoders.base import Encoder
from mmsearch.ingest.reading import Opened, open_known
from mmsearch.media.fingerprint import NEVER
from mmsearch.media.isolated import Decoders
from mmsearch.store import lookups
from mmsearch.store.lookups import Lacking, SpaceRow
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import Progress, Vectors

_PORTION = 64  # media, or captions, that are committed together
_AHEAD = 4  # tasks of a worker that are begun before the oldest one's outcome is taken

OnProgress = Callable[[Progress], None]
Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Embedded:
    """What was done, and what is still to do."""

    images: int
    captions: int
    failed: int
    """Files that could not be used."""
    lacking: int
    """Images without a vector in the space: their files could not be had, or not used."""


@dataclass
class _Portion:
    """Media that were read, with the vectors (dim,) of those that are good."""

    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    good: list[Lacking] = field(default_factory=list)
    failures: list[tuple[Lacking, Opened]] = field(default_factory=list)
    count: int = 0

    def add(self, other: _Portion) -> None:
        self.vectors |= other.vectors
        self.good += other.good
        self.failures += other.failures
        self.count += other.count


def embed_missing(
    store: Store,
    writer: Writer,
    encoder: Encoder,
    space: SpaceRow,
    decoders: Decoders,
    *,
    workers: int,
    on_progress: OnProgress = lambda progress: None,
) -> Embedded:
    """Gives a vector in `space` to all media and captions that have none there yet.

    A portion at a time is committed: what was done stays, whatever happens. Files that are not
    there, or not as they were indexed, are passed over: the next look at their folder is for them.
    Those that cannot be used go to the ledger.
    """
    with store.catalog.read() as connection:
        lacking = lookups.count_without_vector(connection, space, "image")
        captions = lookups.count_without_vector(connection, space, "caption")
    images = failed = 0
    if lacking or captions:
        with decoders.threads(workers) as pool:
            work = _Work(
                store, writer, encoder.bulk(workers), space, decoders, pool, workers, on_progress
            )
            if lacking:
                images, failed = _images(work, lacking)
            _captions(work, captions)
        writer.compact(only_if="short")
    return Embedded(images, captions, failed, lacking - images)


@dataclass(frozen=True)
class _Work:
    """What both halves of the work need."""

    store: Store
    writer: Writer
    encoder: Encoder
    space: SpaceRow
    decoders: Decoders
    pool: ThreadPoolExecutor
    workers: int
    on_progress: OnProgress


def _images(work: _Work, total: int) -> tuple[int, int]:
    work.encoder.warm_up("image")
    tasks = _parts(_lacking(work.store, work.space), work.encoder.batch)
    waiting, done, embedded, failed = _Portion(), 0, 0, 0

    def commit() -> None:
        nonlocal waiting, done, embedded, failed
        with work.writer.change() as change:
            change.add_vectors(waiting.vectors, work.space, "image")
            # What failed before has not failed any more.
            change.clear_failures((item.root_id, item.path) for item in waiting.good)
            for item, opened in waiting.failures:
                change.record_failure(
                    item.root_id, item.path, opened.stamp.size, opened.stamp.mtime_ns,
                    opened.reason,
                )  # fmt: skip
        work.writer.compact(only_if="long")
        done += waiting.count
        embedded += len(waiting.vectors)
        failed += len(waiting.failures)
        waiting = _Portion()
        work.on_progress(Progress("embed again", done, total))

    def embed(items: list[Lacking]) -> _Portion:
        return _embed(work.encoder, work.decoders, items)

    for portion in _in_order(work.pool, embed, tasks, _AHEAD * work.workers):
        waiting.add(portion)
        if waiting.count >= _PORTION:
            commit()
    commit()
    return embedded, failed


def _lacking(store: Store, space: SpaceRow) -> Iterator[Lacking]:
    """All media without a vector, by id; only some are held at a time."""
    after = 0
    while True:
        with store.catalog.read() as connection:
            some = lookups.media_without_vector(connection, space, after, 16 * _PORTION)
        if not some:
            return
        yield from some
        after = some[-1].id


def _embed(encoder: Encoder, decoders: Decoders, items: Sequence[Lacking]) -> _Portion:
    opened = [
        (item, open_known(item.absolute, item.content_hash, encoder.spec.preprocess, decoders))
        for item in items
    ]
    good = [item for item, one in opened if one.pixels is not None]
    pixels = [one.pixels for _, one in opened if one.pixels is not None]
    vectors = encoder.encode_images(np.stack(pixels)) if pixels else ()
    return _Portion(
        dict(zip((item.id for item in good), vectors, strict=True)),
        good,
        [(item, one) for item, one in opened if one.reason and _has_failed(item, one)],
        len(items),
    )


def _has_failed(item: Lacking, opened: Opened) -> bool:
    """Not so a file that is not there, or not as it was when the index looked at it."""
    if opened.stamp == NEVER:
        return os.path.lexists(item.absolute)
    return opened.stamp == (item.size, item.mtime_ns)


def _captions(work: _Work, total: int) -> None:
    def encode(part: list[tuple[int, str]]) -> Vectors:
        return work.encoder.encode_texts([text for _, text in part])

    done = after = 0
    while True:
        with work.store.catalog.read() as connection:
            some = lookups.captions_without_vector(
                connection, work.space, after, work.workers * _PORTION
            )
        if not some:
            return
        after = some[-1][0]
        rows = np.concatenate(
            list(_in_order(work.pool, encode, _parts(some, _PORTION), work.workers))
        )
        with work.writer.change() as change:
            vectors = {number: row for (number, _), row in zip(some, rows, strict=True)}
            change.add_vectors(vectors, work.space, "caption")
        work.writer.compact(only_if="long")
        done += len(some)
        work.on_progress(Progress("embed captions again", done, total))


def _parts(items: Iterable[Task], size: int) -> Iterator[list[Task]]:
    part: list[Task] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[Task], Outcome],
    tasks: Iterable[Task],
    ahead: int,
) -> Iterator[Outcome]:
    """The outcomes of tasks in their order; no more than `ahead` are begun at any time."""
    begun: deque[Future[Outcome]] = deque()
    try:
        for task in tasks:
            begun.append(pool.submit(work, task))
            if len(begun) >= ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()

"""Second looks at pictures that are in an index already, kept for re-ranking."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np

from mmsearch.encoders.local import LocalEncoder
from mmsearch.ingest.reading import open_known
from mmsearch.media.isolated import Decoders
from mmsearch.store import lookups
from mmsearch.store.lookups import SpaceRow
from mmsearch.store.patches import pack_looks
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import Pixels, Preprocess, Progress

BATCH = 32


def add_looks(
    store: Store,
    writer: Writer,
    local: LocalEncoder,
    space: SpaceRow,
    decoders: Decoders,
    *,
    workers: int,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> int:
    """Looks at every image of an index that has no second look in a space yet; returns how many.

    A batch at a time is committed. Files that have changed since they were indexed are left to
    the next run, and so are those that cannot be read.
    """
    with store.catalog.read() as connection:
        missing = lookups.without_look(connection, space)
    done = added = 0
    for batch in _batches(missing, local.preprocess, decoders, workers):
        good = [(number, pixels) for number, pixels in batch if pixels is not None]
        if good:
            found = local.looks(np.stack([pixels for _, pixels in good]))
            packed = pack_looks(found.vectors, found.patches)
            with writer.change() as change:
                change.add_looks(
                    {number: one for (number, _), one in zip(good, packed, strict=True)}, space
                )
        added += len(good)
        done += len(batch)
        on_progress(Progress("patches", done, len(missing)))
    return added


def _batches(
    missing: list[tuple[int, bytes, bytes]], how: Preprocess, decoders: Decoders, workers: int
) -> Iterator[list[tuple[int, Pixels | None]]]:
    """Ids with pixels, in order; no more than two batches are held at any time."""
    files = iter(missing)
    waiting: deque[tuple[int, Future[Pixels | None]]] = deque()
    with decoders.threads(workers) as pool:
        while True:
            for number, path, digest in itertools.islice(files, 2 * BATCH - len(waiting)):
                waiting.append((number, pool.submit(_pixels, path, digest, how, decoders)))
            if not waiting:
                return
            first = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
            yield [(number, future.result()) for number, future in first]


def _pixels(path: bytes, digest: bytes, how: Preprocess, decoders: Decoders) -> Pixels | None:
    return open_known(path, digest, how, decoders).pixels

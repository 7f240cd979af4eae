"""Patch embeddings of pictures that are in an index already, kept for re-ranking."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmsearch.encoders.patch_encoder import PatchEncoder
from mmsearch.ingest.reading import decode_known
from mmsearch.ingest.reembed import paged
from mmsearch.jobs.runner import Runner
from mmsearch.media.media_types import Segment
from mmsearch.media.sandbox import Decoders
from mmsearch.store.patches import pack_patches
from mmsearch.store.rows import MissingSegment, SpaceRow
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import IMAGE, OnProgress, Progress, no_progress


def add_patches(
    store: Store,
    writer: Writer,
    encoder: PatchEncoder,
    space: SpaceRow,
    runner: Runner,
    *,
    on_progress: OnProgress = no_progress,
) -> int:
    """Adds the patch embeddings of every picture that has none in a space yet; returns how many.

    A batch at a time is committed. Files that have changed since they were indexed are left to
    the next run, and so are those that cannot be read.
    """
    with store.catalog.read() as queries:
        total = queries.count_without_patches(space)
    job = _PatchesJob(store, writer, encoder, space, runner.decoders, total, on_progress)
    runner.run(job, total)
    return job.added


@dataclass
class _PatchesJob:
    """The pictures that have no patch embeddings."""

    store: Store
    writer: Writer
    encoder: PatchEncoder
    space: SpaceRow
    decoders: Decoders
    total: int
    on_progress: OnProgress
    done: int = 0
    added: int = 0
    size: int = 32

    def missing(self) -> Iterator[MissingSegment]:
        return paged(
            self.store,
            lambda queries, *page: queries.media_without_patches(self.space, *page),
            lambda item: item.id,
        )

    def read(self, item: MissingSegment) -> tuple[int, Sequence[Segment]]:
        inputs = {IMAGE: dataclasses.asdict(self.encoder.preprocess)}
        opened = decode_known(item.absolute, item.content_hash, inputs, self.decoders)
        return item.id, opened.segments

    def compute(
        self, reads: Sequence[tuple[int, Sequence[Segment]]]
    ) -> tuple[int, dict[int, bytes]]:
        """How many there were, and the patches of those that can be used."""
        good = {number: segments[0].data for number, segments in reads if segments}
        if not good:
            return len(reads), {}
        found = self.encoder.encode(np.stack(list(good.values())))
        packed = pack_patches(found.vectors, found.patches)
        return len(reads), dict(zip(good, packed, strict=True))

    def commit(self, outcomes: Sequence[tuple[int, dict[int, bytes]]]) -> None:
        with self.writer.change() as change:
            for count, patches in outcomes:
                change.add_patches(patches, self.space)
                self.done += count
                self.added += len(patches)
        self.on_progress(Progress("patches", self.done, self.total))

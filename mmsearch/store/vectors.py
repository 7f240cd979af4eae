"""The vectors of one tower as of one revision of the catalog.

The snapshot holds the bulk, the delta what was committed after it, and tombstones hide what was
removed since. Opening costs in proportion to the delta, not to the snapshot.
"""

from __future__ import annotations

import heapq
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmsearch.errors import DamageError
from mmsearch.store.queries import Queries
from mmsearch.store.rows import TowerRow
from mmsearch.store.vector_index import ExactIndex, Found, VectorIndex, spread
from mmsearch.types import Ids, Vectors

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mmsearch.store.faiss_index import FaissIndex
    from mmsearch.store.ivf_index import IvfIndex

_SAMPLE = 1024


@dataclass(frozen=True)
class VectorView:
    """An immutable picture of the vectors: searches on it need no lock."""

    revision: int
    tower: TowerRow
    generation: int
    snapshot: FaissIndex | None
    folder: Path
    ivf_file: tuple[Path, bytes] | None
    """The inverted lists over the snapshot and its checksum, if there is one."""
    last_embedding: int
    """The newest embedding that is in here."""
    delta: ExactIndex
    hidden: Ids
    """Removed items, sorted."""

    @classmethod
    def load(cls, queries: Queries, tower: TowerRow, folder: Path) -> VectorView:
        """The view of the transaction's state.

        Raises:
            FileNotFoundError: the snapshot's file is gone, because a writer compacted since the
                transaction began: begin another.
        """
        from mmsearch.store.faiss_index import FaissIndex  # which takes a while

        row = queries.snapshot_of(tower)
        return cls(
            revision=-1,
            tower=tower,
            generation=row.generation if row else 0,
            snapshot=FaissIndex.open(folder / row.file, row.checksum) if row else None,
            folder=folder,
            ivf_file=None,
            last_embedding=row.last_embedding_id if row else 0,
            delta=ExactIndex(np.empty(0, np.int64), np.empty((0, tower.dim), np.float32)),
            hidden=np.empty(0, np.int64),
        ).advanced(queries)

    def advanced(self, queries: Queries) -> VectorView:
        """This view with what was committed since; the snapshot must be the same."""
        last, delta = self.last_embedding, self.delta
        for newest, ids, vectors in queries.embeddings_after(self.tower, last):
            last, delta = newest, delta.extended(ids, vectors)
        hidden = np.sort(queries.tombstones(self.tower))
        row = queries.snapshot_of(self.tower)
        ivf_file = (self.folder / ivf_name(row.file), row.ivf) if row and row.ivf else None
        view = replace(
            self,
            revision=queries.revision(),
            ivf_file=ivf_file,
            last_embedding=last,
            delta=delta,
            hidden=hidden,
        )
        if ivf_file == self.ivf_file and "ivf" in vars(self):
            vars(view)["ivf"] = self.ivf  # opened, and looked at in full
        return view

    @cached_property
    def ivf(self) -> IvfIndex | None:
        """The inverted lists, once they are made and a search has a use for them."""
        if self.ivf_file is None or self.snapshot is None:
            return None
        from mmsearch.store.ivf_index import IvfIndex

        try:
            return IvfIndex.open(self.ivf_file[0], self.snapshot, self.ivf_file[1])
        except (FileNotFoundError, DamageError):
            # The exact vectors answer as well, only later.
            log.warning("%s: missing or damaged; the next 'mmsearch index' makes it again",
                        self.ivf_file[0])  # fmt: skip
            return None

    @cached_property
    def sample(self) -> Vectors:
        """Up to 1,024 of the vectors, evenly spaced: what scores are compared with."""
        parts: list[VectorIndex] = (
            [self.delta] if self.snapshot is None else [self.snapshot, self.delta]
        )
        total = sum(map(len, parts))
        there = np.arange(total)
        if len(self.hidden):  # the ids of a large snapshot are looked at only where they matter
            ids = np.concatenate([part.ids for part in parts])
            there = np.flatnonzero(~np.isin(ids, self.hidden))
        rows = there[spread(len(there), _SAMPLE)]
        older = total - len(self.delta)
        found = [self.delta.vectors_at(rows[rows >= older] - older)]
        if self.snapshot is not None:
            found.insert(0, self.snapshot.vectors_at(rows[rows < older]))
        return np.concatenate(found)

    def search(
        self, queries: Vectors, k: int, among: Ids | None, *, exact: bool = False
    ) -> list[Found]:
        """The best k items of each query, over snapshot and delta together."""
        without = self.hidden if len(self.hidden) else None
        answers = self.delta.search(queries, k, among=among, without=without)
        older = self.snapshot if exact or self.ivf is None else self.ivf
        if older is None:
            return answers
        found = older.search(queries, k, among=among, without=without)
        return [_merged(first, second, k) for first, second in zip(found, answers, strict=True)]

    def vectors_of(self, ids: Ids) -> tuple[Ids, Vectors]:
        """Those of some items (sorted) that are in here, and their vectors (n, dim)."""
        ids = ids[~np.isin(ids, self.hidden)] if len(self.hidden) else ids
        newer = np.flatnonzero(np.isin(self.delta.ids, ids))
        found = [(self.delta.ids[newer], self.delta.vectors_at(newer))]
        if self.snapshot is not None:
            rows = self.snapshot.rows_of(ids)
            found.insert(0, (self.snapshot.ids[rows], self.snapshot.vectors_at(rows)))
        return (
            np.concatenate([one for one, _ in found]),
            np.concatenate([vectors for _, vectors in found]),
        )


def ivf_name(file: str) -> str:
    """The name of the inverted lists over a snapshot, by that of its file."""
    return f"{file}.cells"  # its name since format 4


def _merged(first: Found, second: Found, k: int) -> Found:
    if not len(second[0]):
        return first
    rows = heapq.merge(*(zip(-scores, ids, strict=True) for scores, ids in (first, second)))
    top = [row for row, _ in zip(rows, range(k), strict=False)]
    return (
        np.array([-score for score, _ in top], dtype=np.float32),
        np.array([number for _, number in top], dtype=np.int64),
    )

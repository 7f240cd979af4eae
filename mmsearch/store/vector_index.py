"""What every vector index offers, and the plain one in NumPy."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmsearch.types import Ids, Vectors

Found = tuple[Vectors, Ids]
"""The answers to one query: scores (m,) and item ids (m,), best first, m <= k."""


class VectorIndex(Protocol):
    """Finds the vectors nearest to a query by inner product: cosine, as all have length 1."""

    def __len__(self) -> int: ...

    def search(
        self, queries: Vectors, k: int, *, among: Ids | None = None, without: Ids | None = None
    ) -> list[Found]:
        """The best k items of each query.

        Args:
            queries: shape (q, d).
            k: how many at most; fewer come back where fewer are there.
            among: only these ids may be found (sorted); None is all of them.
            without: these ids may not be found (sorted).
        """

    @property
    def ids(self) -> Ids:
        """The ids of all items, (n,), in the order in which they were added."""

    def vectors_at(self, rows: NDArray[np.int64]) -> Vectors:
        """The vectors of some rows, (n, d), in the order in which they were added."""


class ExactIndex:
    """Compares with every vector: for the few that are newer than the snapshot."""

    def __init__(self, ids: Ids, vectors: Vectors) -> None:
        self.ids = ids
        self._vectors = vectors
        self._room: tuple[Ids, Vectors] = (ids, vectors)
        """Arrays that these are the beginning of, with room for more."""
        self._is_newest = True

    def __len__(self) -> int:
        return len(self.ids)

    def search(
        self, queries: Vectors, k: int, *, among: Ids | None = None, without: Ids | None = None
    ) -> list[Found]:
        ids, vectors = self.ids, self._vectors
        if among is not None or without is not None:
            keep = np.ones(len(ids), dtype=bool)
            if among is not None:
                keep &= np.isin(ids, among)
            if without is not None:
                keep &= ~np.isin(ids, without)
            ids, vectors = ids[keep], vectors[keep]
        if len(queries) == 1:
            return [best(dot_products(queries[0], vectors), ids, k)]
        return [best(scores, ids, k) for scores in queries @ vectors.T]

    def vectors_at(self, rows: NDArray[np.int64]) -> Vectors:
        found: Vectors = self._vectors[rows]
        return found

    def extended(self, ids: Ids, vectors: Vectors) -> ExactIndex:
        """A new index with more items at its end; what both hold lies in memory once.

        Not for two threads at once.
        """
        count, total = len(self), len(self) + len(ids)
        room = self._room
        if not self._is_newest or total > len(room[0]):
            size = max(2 * total, 64)
            room = np.empty(size, np.int64), np.empty((size, vectors.shape[1]), np.float32)
            room[0][:count], room[1][:count] = self.ids, self._vectors
        room[0][count:total], room[1][count:total] = ids, vectors
        found = ExactIndex(room[0][:total], room[1][:total])
        found._room, self._is_newest = room, False  # another has its place in there now
        return found


def spread(count: int, most: int) -> Ids:
    """Up to so many of the numbers below `count`, evenly spaced."""
    return np.linspace(0, max(0, count - 1), min(most, count)).astype(np.int64)


def dot_products(query: Vectors, vectors: Vectors) -> Vectors:
    """The products of a query (d,) with vectors (n, d), by this thread alone.

    A query is too little for BLAS's threads, and they take the cores from the runtime's.
    """
    found: Vectors = np.vecdot(vectors, query)
    return found


def best(scores: Vectors, ids: Ids, k: int) -> Found:
    """The k best of some items, best first; equal scores in the order of their ids."""
    if k < len(scores):
        cut = np.partition(scores, len(scores) - k)[len(scores) - k]
        chosen = np.flatnonzero(scores >= cut)  # may be more than k where scores are equal
        scores, ids = scores[chosen], ids[chosen]
    order = np.lexsort((ids, -scores))[:k]
    return scores[order], ids[order]

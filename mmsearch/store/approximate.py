"""A quick index over the rows of a large exact one: it finds candidates, that scores them.

Vectors are sorted into cells by their nearest centroid, and only the cells nearest to a query are
looked through, by short codes (an inverted file, Jegou et al. 2011, with RaBitQ codes, Gao and
Long 2024). What these bring up is scored by the exact vectors, so that scores are cosines as ever
and order is wrong only where something was not brought up at all.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import DamageError
from mmsearch.store.faiss_index import FaissIndex, read_index, write_index
from mmsearch.store.vector_index import Found, best
from mmsearch.types import Ids, Vectors

#: What is below is searched exactly. Not yet measured where cells begin to pay: until then they are
#: for indexes whose exact search takes a tenth of a second (docs/performance.md).
APPROXIMATE_FROM = 1_000_000
#: So many may be looked up one by one in a filtered search.
_FEW = 20_000
_CODE = "RaBitQ4"
_PER_CELL = 50  # vectors to learn a centroid from
_BATCH = 65_536
_PROBES, _CANDIDATES = 48, 10  # for ten hits; candidates are a multiple of the hits
_MOST = 2000  # hits: more are looked for exactly


class ApproximateIndex:
    """Cells over the rows of an exact index."""

    def __init__(self, cells: Any, exact: FaissIndex) -> None:
        self._cells = cells
        self._exact = exact

    @classmethod
    def build(cls, exact: FaissIndex, like: Path | None = None) -> ApproximateIndex:
        """Cells for all rows of an exact index.

        Args:
            like: a file of cells whose centroids are taken over, if there are still as many cells
                as would be made now: to learn them is half of the work.
        """
        count = len(exact)
        cells = _known(like, exact.dim, _cells_for(count)) if like is not None else None
        if cells is None:
            name = f"IVF{_cells_for(count)},{_CODE}"
            cells = faiss.index_factory(exact.dim, name, faiss.METRIC_INNER_PRODUCT)
            rows = np.linspace(0, count - 1, min(count, _PER_CELL * cells.nlist)).astype(np.int64)
            cells.train(exact.vectors_at(rows))
        for start in range(0, count, _BATCH):
            rows = np.arange(start, min(count, start + _BATCH))
            cells.add(exact.vectors_at(rows))
        return cls(cells, exact)

    @classmethod
    def open(cls, path: Path, exact: FaissIndex) -> ApproximateIndex | None:
        """Maps saved cells into memory; None where there are none for this exact index.

        Raises:
            DamageError: the file is not what was saved.
        """
        if not path.is_file():
            return None
        cells = read_index(path, faiss.IO_FLAG_MMAP)
        fits = cells.d == exact.dim and cells.ntotal == len(exact)
        return cls(cells, exact) if fits else None

    def save(self, path: Path) -> None:
        """Writes the cells.

        Raises:
            OSError: there is no room, or no permission.
        """
        write_index(self._cells, path)

    def search(
        self, queries: Vectors, k: int, *, among: Ids | None = None, without: Ids | None = None
    ) -> list[Found]:
        """As `VectorIndex.search`, but that a few of the best may be missing."""
        exact = self._exact
        share = 1.0 if among is None else len(among) / len(exact)
        if k > _MOST or (among is not None and len(among) <= _FEW):
            return exact.search(queries, k, among=among, without=without)
        effort = math.sqrt(max(k, 10) / 10)
        # A filter leaves fewer hits in each cell: as many cells more are looked through.
        probes = min(self._cells.nlist, math.ceil(_PROBES * effort / share))
        parameters = faiss.SearchParametersIVF(sel=exact.selector(among, without), nprobe=probes)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        found = self._cells.search(queries, _CANDIDATES * max(k, 10), params=parameters)[1]
        return [
            self._best(query, rows[rows >= 0], k)
            for query, rows in zip(queries, found, strict=True)
        ]

    def _best(self, query: Vectors, rows: NDArray[np.int64], k: int) -> Found:
        scores = self._exact.vectors_at(rows) @ query
        return best(scores, self._exact.ids[rows], k)


def _cells_for(count: int) -> int:
    return int(2 ** round(math.log2(4 * math.sqrt(count))))


def _known(path: Path, dim: int, count: int) -> Any:
    """Cells of a file, emptied; None where others are needed."""
    try:
        cells = read_index(path, 0)
    except (FileNotFoundError, DamageError):
        return None
    if cells.d != dim or cells.nlist != count:
        return None
    cells.reset()
    return cells

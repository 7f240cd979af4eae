"""Vector indexes of FAISS, kept in a file that is mapped rather than read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import DamageError
from mmsearch.store.vector_index import Found, best
from mmsearch.types import Ids, Vectors


class FaissIndex:
    """An exact flat index under the items' own ids."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def build(cls, dim: int, batches: Iterable[tuple[Ids, Vectors]]) -> FaissIndex:
        """An index of all the batches' vectors, each (n, dim) with its ids (n,)."""
        index = faiss.IndexIDMap(faiss.IndexFlatIP(dim))
        for ids, vectors in batches:
            index.add_with_ids(np.ascontiguousarray(vectors, dtype=np.float32), ids)
        return cls(index)

    @classmethod
    def open(cls, path: Path) -> FaissIndex:
        """Maps a saved index into memory: costs the same for ten vectors and for ten million.

        Raises:
            FileNotFoundError: there is no such file (compacted away since it was looked up).
            DamageError: the file is not what was saved.
        """
        try:
            # Not IO_FLAG_MMAP, which for a flat index quietly reads the whole file.
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC))
        except RuntimeError as error:
            if not path.is_file():
                raise FileNotFoundError(path) from error
            raise DamageError(
                f"{path}: the vector file is damaged; delete it and run 'mmsearch index', which "
                "writes it anew from the catalog"
            ) from error

    def save(self, path: Path) -> None:
        """Writes the index.

        Raises:
            OSError: there is no room, or no permission.
        """
        try:
            faiss.write_index(self._index, str(path))
        except RuntimeError as error:  # how FAISS says it
            raise OSError(str(error).strip().splitlines()[-1]) from error

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(
        self, queries: Vectors, k: int, *, among: Ids | None = None, without: Ids | None = None
    ) -> list[Found]:
        k = min(k, len(self))
        if k == 0 or (among is not None and len(among) == 0):
            return [(np.empty(0, np.float32), np.empty(0, np.int64)) for _ in queries]
        selector = _selector(among, without)
        parameters = faiss.SearchParameters(sel=selector) if selector is not None else None
        scores, ids = self._index.search(
            np.ascontiguousarray(queries, dtype=np.float32), k, params=parameters
        )
        # FAISS fills up with id -1 where it finds fewer than k.
        found = (
            (row[real], own[real]) for row, own, real in zip(scores, ids, ids >= 0, strict=True)
        )
        return [best(row, own, k) for row, own in found]

    @property
    def ids(self) -> Ids:
        found: Ids = faiss.vector_to_array(self._index.id_map)
        return found

    def vectors_at(self, rows: NDArray[np.int64]) -> Vectors:
        # IndexIDMap knows vectors by id alone; the index in it, by row.
        if not len(rows):
            return np.empty((0, self._index.d), np.float32)
        found: Vectors = faiss.downcast_index(self._index.index).reconstruct_batch(rows)
        return found


def _selector(among: Ids | None, without: Ids | None) -> Any:
    if among is not None:
        chosen = among if without is None else np.setdiff1d(among, without, assume_unique=True)
        return faiss.IDSelectorBatch(chosen)
    if without is not None and len(without):
        return faiss.IDSelectorNot(faiss.IDSelectorBatch(without))
    return None

"""A quick index over the rows of a large exact one: it finds candidates, that scores them.

Vectors are sorted into lists by their nearest centroid, and only the lists nearest to a query are
looked through, by short codes (an inverted file, Jegou et al. 2011, with RaBitQ codes, Gao and
Long 2024). What these bring up is scored by the exact vectors, so that scores are cosines as ever
and order is wrong only where something was not brought up at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import DamageError
from mmsearch.store.checksum import of_file
from mmsearch.store.faiss_index import (
    FaissIndex,
    Selection,
    check_file,
    damaged,
    nothing,
    read_index,
    selector_of,
    write_index,
)
from mmsearch.store.vector_index import Found, best, dot_products, spread
from mmsearch.types import Ids, Vectors

_PER_LIST = 50  # vectors to learn a centroid from
_BATCH = 65_536
_MOST_PROBES = 512
TRIAL, _RECALL = 256, 0.98
#: Candidates, as a multiple of the hits, and at least.
_CANDIDATES, _LEAST_CANDIDATES = 10, 400


@dataclass(frozen=True)
class IvfSettings:
    """How inverted lists are made and searched."""

    probes: int = 32
    """Lists to look through for ten hits: more where a trial finds too few of the best."""
    few: int = 4000
    """So many may be looked up one by one in a filtered search."""
    most: int = 2000
    """Hits: more are looked for exactly."""
    code: str = "RaBitQ"
    """FAISS's name for how vectors are kept."""


SETTINGS = IvfSettings()


class IvfIndex:
    """Lists over the rows of an exact index."""

    def __init__(self, index: Any, exact: FaissIndex, settings: IvfSettings = SETTINGS) -> None:
        self.settings = settings
        self.index, self.exact = index, exact

    @classmethod
    def build(
        cls,
        exact: FaissIndex,
        queries: Vectors | None,
        like: Path | None = None,
        settings: IvfSettings = SETTINGS,
    ) -> IvfIndex:
        """Lists for all rows of an exact index.

        Args:
            queries: vectors (q, d) as they will be asked for, which decide how many lists a search
                looks through. None takes some of its own, and twice the effort: what will be asked
                for may lie apart from them, as texts do from images.
            like: a file of lists whose centroids are taken over, if there are still as many lists
                as would be made now: to learn them is half of the work.
        """
        count = len(exact)
        name = f"IVF{_lists_for(count)},{settings.code}"
        index = _known(like, exact.dim, name) if like is not None else None
        if index is None:
            index = faiss.index_factory(exact.dim, name, faiss.METRIC_INNER_PRODUCT)
            index.train(exact.vectors_at(spread(count, _PER_LIST * index.nlist)))
        for start in range(0, count, _BATCH):
            rows = np.arange(start, min(count, start + _BATCH))
            index.add(exact.vectors_at(rows))
        found = cls(index, exact, settings)
        if queries is not None:
            found._choose_probes(queries)
        else:
            found._choose_probes(exact.vectors_at(spread(count, TRIAL)))
            index.nprobe = min(2 * index.nprobe, index.nlist)
        return found

    def _choose_probes(self, queries: Vectors) -> None:
        """The least effort that finds enough of what an exact search finds; kept in the file."""
        self.index.nprobe = min(self.settings.probes, self.index.nlist)
        true = [set(ids.tolist()) for _, ids in self.exact.search(queries, 10)]
        total = sum(map(len, true))
        while total and self.index.nprobe < min(_MOST_PROBES, self.index.nlist):
            found = self.search(queries, 10)
            hits = sum(
                len(own & set(ids.tolist())) for own, (_, ids) in zip(true, found, strict=True)
            )
            if hits >= _RECALL * total:
                break
            self.index.nprobe = min(2 * self.index.nprobe, self.index.nlist)

    @classmethod
    def open(cls, path: Path, exact: FaissIndex, checksum: bytes) -> IvfIndex:
        """Maps saved lists over an exact index into memory, after a look at all of the file.

        Args:
            checksum: what `save` gave.

        Raises:
            FileNotFoundError: there is no such file.
            DamageError: the file is not what was saved.
        """
        check_file(path, checksum)
        # Not IO_FLAG_MMAP, which starts threads for every search that fetch ahead.
        index = read_index(path, faiss.IO_FLAG_MMAP_IFC)
        if (index.d, index.ntotal) != (exact.dim, len(exact)):
            raise damaged(path)
        return cls(index, exact)

    def save(self, path: Path) -> bytes:
        """Writes the lists, and returns the checksum of the file.

        Raises:
            OSError: there is no room, or no permission.
        """
        write_index(self.index, path)
        return of_file(path)

    def search(
        self, queries: Vectors, k: int, *, among: Ids | None = None, without: Ids | None = None
    ) -> list[Found]:
        """As `VectorIndex.search`, but that a few of the best may be missing."""
        exact = self.exact
        if k > self.settings.most or (among is not None and len(among) <= self.settings.few):
            return exact.search(queries, k, among=among, without=without)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        candidates = max(_CANDIDATES * k, _LEAST_CANDIDATES)
        if among is None and (without is None or not len(without)):
            probes = min(self.index.nlist, math.ceil(self.index.nprobe * _effort(k)))
            parameters = faiss.SearchParametersIVF(nprobe=probes)
        else:
            parameters = self._selecting(k, exact.selection(among, without))
        if parameters is None:
            return [nothing() for _ in queries]
        found = self.index.search(queries, candidates, params=parameters)[1]
        return [
            best(dot_products(query, exact.vectors_at(rows)), exact.ids[rows], k)
            for query, rows in zip(queries, (one[one >= 0] for one in found), strict=True)
        ]

    def _selecting(self, k: int, selection: Selection) -> Any:
        """How to search where only some rows may be found; None where none may.

        What a filter leaves may lie anywhere, as the photos of one folder do: lists without any of
        it are passed over. The best k of a tenth lie where the best 10 k of all lie: the less is
        left, the more lists are looked through.
        """
        lists = self.index.nlist
        if selection.only is not None:
            there = np.zeros(lists, bool)
            there[self._list_of_row[selection.only]] = True
        else:
            gone = np.bincount(self._list_of_row[selection.never], minlength=lists)
            there = self._sizes > gone
        in_lists, share = int(there.sum()), np.count_nonzero(selection.mask) / len(self.exact)
        if not in_lists:
            return None
        probes = math.ceil(self.index.nprobe * _effort(k) / math.sqrt(share))
        return faiss.SearchParametersIVF(
            sel=selector_of(selection.mask),
            nprobe=min(in_lists, probes),
            quantizer_params=faiss.SearchParameters(sel=selector_of(there)),
        )

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return np.bincount(self._list_of_row, minlength=self.index.nlist)

    @cached_property
    def _list_of_row(self) -> NDArray[np.int32]:
        lists = self.index.invlists
        found = np.empty(len(self.exact), np.int32)
        for number in range(self.index.nlist):
            if size := lists.list_size(number):
                found[faiss.rev_swig_ptr(lists.get_ids(number), size)] = number
        return found


def _effort(k: int) -> float:
    return math.sqrt(max(k, 10) / 10)


def _lists_for(count: int) -> int:
    return int(2 ** round(math.log2(4 * math.sqrt(count))))


def _known(path: Path, dim: int, name: str) -> Any:
    """Lists of a file, emptied; None where others are needed."""
    try:
        index = read_index(path, 0)
    except (FileNotFoundError, DamageError):
        return None
    fresh = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    if (index.d, index.nlist, index.code_size) != (dim, fresh.nlist, fresh.code_size):
        return None
    index.reset()
    return index

"""Vector indexes of FAISS, kept in files that are mapped rather than read."""

from __future__ import annotations

import errno
import os
import struct
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import DamageError, UnreadableError
from mmsearch.store.checksum import of_descriptor, of_file, of_parts, of_vector
from mmsearch.store.vector_index import ExactIndex, Found, best
from mmsearch.types import Ids, Vectors

Rows = NDArray[np.int64]

#: Where no more than so many may be found, or this share, these are looked up one by one.
_FEW, _FEW_SHARE = 1000, 1 / 8
#: What stands in front of the vectors is shorter.
_HEAD = 128
#: A table of rows by id may have so many places for each row.
_SPARSE = 8


@dataclass(frozen=True)
class Selection:
    """Rows of an index of n that may be found."""

    mask: NDArray[np.bool_]
    """(n,)."""
    only: Rows | None
    """They, where they were named; None where all are meant but for `never`."""
    never: Rows


@dataclass(frozen=True)
class _Saved:
    """The file that an index was opened from."""

    path: Path
    descriptor: int
    """Open for as long as the index is: a writer may delete the file meanwhile."""
    checksum: bytes
    rows: NDArray[np.int64]
    """The checksum of each row, (n,): they stand behind what FAISS reads."""


class FaissIndex:
    """An exact flat index under the items' own ids.

    What is read of a file is compared with its checksums first: all of it where all is searched,
    else row by row.
    """

    def __init__(self, index: Any, saved: _Saved | None = None) -> None:
        self._index = index
        self._flat = faiss.downcast_index(index.index)
        self._last: tuple[Ids | None, Rows] = (None, np.empty(0, np.int64))
        self._saved = saved
        self._is_checked = saved is None
        if saved is not None:
            weakref.finalize(self, os.close, saved.descriptor)
        self._compared = 0

    @classmethod
    def build(cls, dim: int, batches: Iterable[tuple[Ids, Vectors]]) -> FaissIndex:
        """An index of all the batches' vectors, each (n, dim) with its ids (n,)."""
        index = faiss.IndexIDMap(faiss.IndexFlatIP(dim))
        for ids, vectors in batches:
            index.add_with_ids(np.ascontiguousarray(vectors, dtype=np.float32), ids)
        return cls(index)

    @classmethod
    def open(cls, path: Path, checksum: bytes) -> FaissIndex:
        """Maps a saved index into memory, after a look at all of the file but its vectors.

        Args:
            checksum: what `save` gave.

        Raises:
            FileNotFoundError: there is no such file (compacted away since it was looked up).
            DamageError: the file is not what was saved.
        """
        with _reading(path):
            descriptor = os.open(path, os.O_RDONLY)
        try:
            rows = _checked_rows(path, descriptor)
            # Not IO_FLAG_MMAP, which for a flat index quietly reads the whole file.
            index = read_index(path, faiss.IO_FLAG_MMAP_IFC)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(index, _Saved(path, descriptor, checksum, rows))

    def save(self, path: Path) -> bytes:
        """Writes the index, and returns the checksum of the file.

        Raises:
            OSError: there is no room, or no permission.
        """
        write_index(self._index, path)
        rows = [
            of_vector(row.data, number)
            for row, number in zip(self._vectors, self.ids.tolist(), strict=True)
        ]
        with path.open("r+b") as file:
            head = file.read(_HEAD)
            file.seek(-8 * (len(rows) + 1), os.SEEK_END)  # how many ids, and they
            end = file.read() + np.array(rows, np.dtype("<i8")).tobytes()
            file.write(end[8 * (len(rows) + 1) :] + of_parts(head, end))
        return of_file(path)

    def check(self) -> None:
        """Compares all of the file with its checksum, once.

        Raises:
            DamageError: it is not what was saved.
        """
        if self._is_checked:
            return
        assert self._saved is not None
        check_file(self._saved.path, self._saved.checksum, self._saved.descriptor)
        self._is_checked = True

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        return int(self._index.d)

    def search(
        self, queries: Vectors, k: int, *, among: Ids | None = None, without: Ids | None = None
    ) -> list[Found]:
        k = min(k, len(self))
        if k == 0 or (among is not None and len(among) == 0):
            return [nothing() for _ in queries]
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if among is not None and len(among) <= max(_FEW, _FEW_SHARE * len(self)):
            if without is not None:
                among = np.setdiff1d(among, without, assume_unique=True)
            rows = self.rows_of(among)
            vectors, ids = self.vectors_at(rows), self.ids[rows]
            return ExactIndex(ids, vectors).search(queries, k)
        self.check()
        parameters = None
        if among is not None or (without is not None and len(without)):
            mask = self.selection(among, without).mask
            parameters = faiss.SearchParameters(sel=selector_of(mask))
        scores, rows = self._flat.search(queries, k, params=parameters)
        # FAISS fills up with row -1 where it finds fewer than k.
        found = ((one[own >= 0], own[own >= 0]) for one, own in zip(scores, rows, strict=True))
        return [best(one, self.ids[own], k) for one, own in found]

    @cached_property
    def ids(self) -> Ids:
        found: Ids = faiss.vector_to_array(self._index.id_map)
        return found

    @property
    def checksums(self) -> NDArray[np.int64]:
        """The checksum of each row of a file that `save` wrote, (n,)."""
        assert self._saved is not None
        return self._saved.rows

    @cached_property
    def _places(self) -> tuple[Ids, Rows]:
        """What tells the row of an id: ids in order with the row of each, or no ids and a table."""
        newest = int(self.ids.max(initial=0))
        if newest <= _SPARSE * len(self):
            table = np.full(newest + 1, -1, np.int64)
            table[self.ids] = np.arange(len(self))
            return np.empty(0, np.int64), table
        rows = np.argsort(self.ids)
        return self.ids[rows], rows

    def rows_of(self, ids: Ids) -> Rows:
        """The rows of those of some ids (sorted) that are in here."""
        known, rows = self._places
        if not len(known):
            found: Rows = rows[ids[: np.searchsorted(ids, len(rows))]]
            found = found[found >= 0]
        else:
            places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
            found = rows[places[known[places] == ids]]
        return found

    def selection(self, among: Ids | None, without: Ids | None) -> Selection:
        """The rows that may be found: those of some ids (None is all), but for those of others."""
        never = np.empty(0, np.int64) if without is None else self._rows_without(without)
        only = None if among is None else self.rows_of(among)
        mask = np.full(len(self), only is None)
        if only is not None:
            mask[only] = True
        mask[never] = False
        if only is not None and len(never):
            only = only[mask[only]]
        return Selection(mask, only, never)

    def _rows_without(self, ids: Ids) -> Rows:
        # What was removed is the same array for all searches until something is written.
        last = self._last
        if last[0] is not ids:
            last = self._last = (ids, self.rows_of(ids))
        return last[1]

    @cached_property
    def _vectors(self) -> Vectors:
        """The vectors where they lie, (n, d); only copies of them may leave this class."""
        # FAISS's reconstruct_batch takes a fixed 8 ms from 1,000 rows on: its threads have to wake.
        found: Vectors = faiss.rev_swig_ptr(self._flat.get_xb(), len(self) * self.dim)
        return found.reshape(len(self), self.dim)

    def vectors_at(self, rows: Rows) -> Vectors:
        """The vectors of some rows, (n, d).

        Raises:
            DamageError: one is not what was saved.
        """
        found: Vectors = self._vectors[rows]
        if not self._is_checked:
            assert self._saved is not None
            self._compared += len(rows)
            if self._compared > len(self):  # as much work as to look at all, once and for all
                self.check()
                return found
            ids, sums = self.ids[rows].tolist(), self._saved.rows[rows].tolist()
            if any(map(_differs, found, ids, sums)):
                raise damaged(self._saved.path)
        return found


def _differs(vector: Vectors, item_id: int, checksum: int) -> bool:
    return of_vector(vector.data, item_id) != checksum


def _checked_rows(path: Path, descriptor: int) -> NDArray[np.int64]:
    """The checksums of the rows of a file, (n,), if all of it but its vectors is as it was saved.

    FAISS takes what a header says for granted, and asks for as much memory.

    Raises:
        FileNotFoundError: there is no such file.
        DamageError: it is not.
    """
    with _reading(path), open(descriptor, "rb", closefd=False) as file:
        head = file.read(_HEAD)
        _, dim, count = struct.unpack_from("<4siq", head.ljust(16, b"\0"))
        size = os.fstat(file.fileno()).st_size
        if dim < 1 or not 0 <= count <= size // (4 * dim + 16):
            raise damaged(path)
        file.seek(max(0, size - 16 * count - 24))
        end = file.read()
        head = head[: max(0, size - 8 * count - 16)]  # an empty index is shorter
    if of_parts(head, end[:-16]) != end[-16:]:
        raise damaged(path)
    return np.frombuffer(end, np.dtype("<i8"), count, 8 * (count + 1))


def damaged(path: Path) -> DamageError:
    return DamageError(f"{path}: the vector file is damaged; run 'mmsearch repair'")


def check_file(path: Path, checksum: bytes, descriptor: int | None = None) -> None:
    """Compares a file, which may be open, with its checksum.

    Raises:
        FileNotFoundError: there is no such file.
        DamageError: it is not what was saved.
    """
    with _reading(path):
        found = of_file(path) if descriptor is None else of_descriptor(descriptor)
    if found != checksum:
        raise damaged(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise  # compacted away: the caller looks again
    except PermissionError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror}") from error
    except OSError as error:
        raise damaged(path) from error


def selector_of(may: NDArray[np.bool_]) -> Any:
    """FAISS's choice of the rows that may be found, (n,)."""
    return faiss.IDSelectorBitmap(np.packbits(may, bitorder="little"))


def nothing() -> Found:
    return np.empty(0, np.float32), np.empty(0, np.int64)


def read_index(path: Path, flags: int) -> Any:
    """An index of FAISS from a file.

    Raises:
        FileNotFoundError: there is no such file.
        DamageError: the file is not what was saved.
    """
    try:
        with _named_in_text(path, "rb") as name:
            return faiss.read_index(name, flags)
    except (RuntimeError, MemoryError) as error:
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path)) from error
        raise damaged(path) from error


def write_index(index: Any, path: Path) -> None:
    """Writes an index of FAISS to a file.

    Raises:
        OSError: there is no room, or no permission.
    """
    try:
        with _named_in_text(path, "wb") as name:
            faiss.write_index(index, name)
    except RuntimeError as error:  # how FAISS says it
        # It names its own source first, and what the system said last.
        raise OSError(str(error).strip().splitlines()[-1].rpartition(": ")[2]) from error


@contextmanager
def _named_in_text(path: Path, mode: str) -> Iterator[str]:
    """A name that FAISS can open a file by: it takes no path that is not text in UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open(mode) as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield str(path)

"""Whether an index is what was written: its catalog, its vector files, and each by the other."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmsearch.errors import DamageError
from mmsearch.store import catalog, lookups
from mmsearch.store.lookups import SnapshotRow, SpaceRow
from mmsearch.store.store import VECTORS, Store
from mmsearch.store.vectors import cells_of
from mmsearch.store.writer import is_whole
from mmsearch.types import MODALITIES, Damage, Modality, Verified

if TYPE_CHECKING:
    from mmsearch.store.faiss_index import FaissIndex

_SHOWN = 20  # findings of SQLite
_TRIES = 5
_LENGTH = 1e-3  # how far from 1 the length of a vector may be
_PART = 8192

Check = Callable[[], Iterator[Damage]]


def verify(folder: Path, *, deep: bool = False) -> Verified:
    """Looks through an index, in one transaction: a writer is neither held up nor in the way.

    Args:
        deep: compare everything that has a checksum with it, vectors with their copies in the
            vector files, and captions with their words. It reads all of the index. Else: the
            structure of the catalog, what must be there for each item, and the vector files' size.

    Raises:
        IndexNotFound: there is none.
        FormatError: it was made by a newer program.
        UnreadableError: it cannot be read, which says nothing of what is there.
    """
    started = time.perf_counter()
    for _ in range(_TRIES):
        try:
            with closing(Store(folder)) as store:
                found, seen, now = _look(store, deep=deep)
        except DamageError as error:
            found, seen, now = Verified(0, 0, deep, (_catalog(error.reason),)), 0, 0
        files = any(damage.kind in ("snapshot", "cells") for damage in found.damages)
        if not files or seen == now:
            break  # else a writer may have taken away what the transaction still knew of
    return replace(found, seconds=time.perf_counter() - started)


def _look(store: Store, *, deep: bool) -> tuple[Verified, int, int]:
    """What is found, and the revisions that it was found in and that there is afterwards."""
    damages: list[Damage] = []
    counts = [0, 0]
    seen = now = 0
    try:
        with store.catalog.read() as connection:
            try:
                for check in _Look(connection, store.folder / VECTORS, deep=deep).checks():
                    damages += _found_by(check, store.catalog.path)
                seen = lookups.revision_of(connection)
                counts = [lookups.count(connection, table) for table in ("media", "caption")]
            except MemoryError:
                # A damaged row may claim any size; what was looked at first, the structure, tells
                # it from a machine that is too small.
                if not damages:
                    raise
        with store.catalog.read() as connection:
            now = lookups.revision_of(connection)
    except DamageError as error:  # counting was too much for it
        damages.append(_catalog(error.reason))
    return Verified(counts[0], counts[1], deep, tuple(dict.fromkeys(damages))), seen, now


def _found_by(check: Check, path: Path) -> list[Damage]:
    found: list[Damage] = []
    try:
        with lookups.decoding():
            found.extend(check())
    except DamageError as error:
        found.append(_catalog(error.reason))
    except sqlite3.DatabaseError as error:
        reason = catalog.explained(error, path)
        if not isinstance(reason, DamageError):
            raise reason from error  # a disk that is full or busy is no damage
        found.append(_catalog(reason.reason))
    return found


def _catalog(reason: str) -> Damage:
    return Damage("catalog", f"the catalog is damaged: {reason}")


class _Look:
    """The checks of one transaction."""

    def __init__(self, connection: sqlite3.Connection, folder: Path, *, deep: bool) -> None:
        self._connection = connection
        self._folder = folder
        self._deep = deep

    def checks(self) -> tuple[Check, ...]:
        quick = (self._structure, self._ownership, self._lacking, self._files)
        return (*quick, self._vectors, self._words) if self._deep else quick

    def _spaces(self) -> list[SpaceRow]:
        active = lookups.active_space(self._connection)
        coming = lookups.coming_space(self._connection)
        return [space for space in (active, coming) if space is not None]

    def _count(self, query: str, *values: object) -> int:
        (number,) = self._connection.execute(query, values).fetchone()
        return int(number)

    def _structure(self) -> Iterator[Damage]:
        pragma = "integrity_check" if self._deep else "quick_check"
        for (line,) in self._connection.execute(f"PRAGMA {pragma}({_SHOWN})"):
            if line != "ok":
                yield _catalog(" ".join(line.split()))
        lookups.roots(self._connection)  # which reads what they leave out
        lookups.retired_spaces(self._connection)

    def _ownership(self) -> Iterator[Damage]:
        """Rows that belong to nothing: their owners' rows are gone."""
        if self._deep:
            broken = self._connection.execute("PRAGMA foreign_key_check").fetchmany(_SHOWN)
            for table, row, owner, _ in broken:
                yield Damage("item", f"row {row} of {table} belongs to no {owner}")
        for modality, table in (("image", "media"), ("caption", "caption")):
            number = self._count(
                "SELECT count(*) FROM embedding WHERE modality = ? "
                f"AND item_id NOT IN (SELECT id FROM {table})",
                modality,
            )
            if number:
                yield Damage("item", f"{number} vectors belong to no {modality}")

    def _lacking(self) -> Iterator[Damage]:
        space = lookups.active_space(self._connection)
        if space is None:
            number = lookups.count(self._connection, "media")
            if number:
                yield Damage("catalog", f"there is no space, but there are {number} images")
            return
        for modality in MODALITIES:
            number = lookups.count_without_vector(self._connection, space, modality)
            if number:
                yield Damage("lacking", f"{number} {modality}s have no vector")

    def _files(self) -> Iterator[Damage]:
        for space in self._spaces():
            for modality in MODALITIES:
                row = lookups.snapshot_of(self._connection, space.id, modality)
                if row is not None:
                    yield from self._snapshot(space, modality, row)

    def _snapshot(self, space: SpaceRow, modality: Modality, row: SnapshotRow) -> Iterator[Damage]:
        path = self._folder / row.file
        if row.checksum is None:
            return  # an older program's: the next writer makes another
        if not is_whole(path, row, space.spec.dim):
            yield Damage("snapshot", f"{row.file}: missing, or not as it was written")
            return
        if row.cells is not None and not (self._folder / cells_of(row.file)).is_file():
            yield Damage("cells", f"{cells_of(row.file)}: missing; searches are slower")
        if self._deep:
            yield from self._deep_snapshot(space, modality, row)

    def _deep_snapshot(
        self, space: SpaceRow, modality: Modality, row: SnapshotRow
    ) -> Iterator[Damage]:
        from mmsearch.store.approximate import ApproximateIndex
        from mmsearch.store.faiss_index import FaissIndex

        try:
            index = FaissIndex.open(self._folder / row.file, row.checksum)
            index.check()
        except (FileNotFoundError, DamageError):
            yield Damage("snapshot", f"{row.file}: not what was written")
            return
        try:
            if row.cells is not None:
                ApproximateIndex.open(self._folder / cells_of(row.file), index, row.cells)
        except (FileNotFoundError, DamageError):
            yield Damage("cells", f"{cells_of(row.file)}: not what was written")
        yield from self._compared(space, modality, row, index)

    def _compared(
        self, space: SpaceRow, modality: Modality, row: SnapshotRow, index: FaissIndex
    ) -> Iterator[Damage]:
        """A vector file that is whole holds what the catalog held when it was written."""
        order = np.argsort(index.ids)
        ids, sums = index.ids[order], index.checksums[order]
        left = np.ones(len(ids), bool)
        cursor = self._connection.execute(
            "SELECT item_id, checksum FROM embedding "
            "WHERE space_id = ? AND modality = ? AND id <= ?",
            (space.id, modality, row.last_embedding_id),
        )
        while rows := cursor.fetchmany(_PART):
            items = np.array([item for item, _ in rows], np.int64)
            places = np.minimum(np.searchsorted(ids, items), max(0, len(ids) - 1))
            there = ids[places] == items if len(ids) else np.zeros(len(items), bool)
            same = np.array([checksum is None for _, checksum in rows])
            same[there] |= sums[places[there]] == [
                checksum or 0 for (_, checksum), known in zip(rows, there, strict=True) if known
            ]
            left[places[there]] = False
            for item in items[~(there & same)].tolist():
                yield Damage("snapshot", f"{row.file}: {modality} {item} is not in it as it was")
        gone = lookups.tombstones(self._connection, space.id, modality)
        strange = int((~np.isin(ids[left], gone)).sum())
        if strange:
            yield Damage("snapshot", f"{row.file}: {strange} in it are not in the catalog")

    def _vectors(self) -> Iterator[Damage]:
        for space in self._spaces():
            for modality in MODALITIES:
                for item in unsound(self._connection, space, modality):
                    yield Damage(
                        "vector", f"the vector of {modality} {item} is not what was written"
                    )

    def _words(self) -> Iterator[Damage]:
        captions = self._connection.execute("SELECT media_id, text FROM caption ORDER BY media_id")
        words = self._connection.execute("SELECT rowid, text FROM words ORDER BY rowid")
        own = (
            (media, sorted("\n".join(text for _, text in rows).split("\n")))
            for media, rows in itertools.groupby(captions, key=lambda row: row[0])
        )
        kept = ((media, sorted((text or "").split("\n"))) for media, text in words)
        for one, other in itertools.zip_longest(own, kept):
            if one != other:
                media = min(row[0] for row in (one, other) if row is not None)
                yield Damage("words", f"the words of image {media} are not those of its captions")
                return


def unsound(connection: sqlite3.Connection, space: SpaceRow, modality: Modality) -> Iterator[int]:
    """The items whose vectors are not what was written, or are none at all."""
    cursor = connection.execute(
        "SELECT item_id, vector, checksum FROM embedding WHERE space_id = ? AND modality = ?",
        (space.id, modality),
    )
    while rows := cursor.fetchmany(_PART):
        sound = []
        for item, vector, checksum in rows:
            if lookups.is_sound(space, item, vector, checksum):
                sound.append((item, vector))
            else:
                yield item
        vectors = lookups.vectors_from(b"".join(vector for _, vector in sound), space.spec.dim)
        for (item, _), length in zip(sound, np.linalg.norm(vectors, axis=1), strict=True):
            if not abs(length - 1) < _LENGTH:  # an older program's, or what was no vector ever
                yield item

"""Whether an index is what was written: its catalog, its vector files, and each by the other."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmsearch.errors import DamageError
from mmsearch.store import catalog
from mmsearch.store.queries import Queries, vectors_from
from mmsearch.store.rows import SnapshotRow, TowerRow, decoding, is_sound
from mmsearch.store.store import VECTORS, Store
from mmsearch.store.triggers import COLUMNS, SEGMENT
from mmsearch.store.vectors import ivf_name
from mmsearch.store.writer import is_whole
from mmsearch.types import Damage, Verified

if TYPE_CHECKING:
    from mmsearch.store.faiss_index import FaissIndex

_SHOWN = 20  # findings of SQLite
_TRIES = 5
_LENGTH = 1e-3  # how far from 1 the length of a vector may be
_PART = 8192
_ITEM = np.dtype([("item", np.int64), ("checksum", np.int64)])

Check = Callable[[], Iterator[Damage]]


def verify(folder: Path, *, deep: bool = False, checks: type[Checks] | None = None) -> Verified:
    """Looks through an index, in one transaction: a writer is neither held up nor in the way.

    Args:
        deep: compare everything that has a checksum with it, vectors with their copies in the
            vector files, and captions with their words. It reads all of the index. Else: the
            structure of the catalog, what must be there for each item, and the vector files' size.
        checks: what is looked at; None is `Checks`.

    Raises:
        IndexNotFound: there is none.
        FormatError: its format is too old or too new.
        UnreadableError: it cannot be read, which says nothing of what is there.
    """
    started = time.perf_counter()
    for _ in range(_TRIES):
        try:
            with closing(Store(folder)) as store:
                found, seen, now = _check_all(store, checks or Checks, deep=deep)
        except DamageError as error:
            found, seen, now = Verified(0, 0, deep, (_catalog(error.reason),)), 0, 0
        files = any(damage.kind in ("snapshot", "ivf") for damage in found.damages)
        if not files or seen == now:
            break  # else a writer may have taken away what the transaction still knew of
    return replace(found, seconds=time.perf_counter() - started)


def _check_all(store: Store, checks: type[Checks], *, deep: bool) -> tuple[Verified, int, int]:
    """What is found, and the revisions that it was found in and that there is afterwards."""
    damages: list[Damage] = []
    counts = [0, 0]
    seen = now = 0
    try:
        with store.catalog.read() as queries:
            try:
                for check in checks(queries, store.folder / VECTORS, deep).checks():
                    damages += _found_by(check, store.catalog.path)
                seen = queries.revision()
                counts = [queries.count(table) for table in ("media", "caption")]
            except MemoryError:
                # A damaged row may claim any size; what was looked at first, the structure, tells
                # it from a machine that is too small.
                if not damages:
                    raise
        with store.catalog.read() as queries:
            now = queries.revision()
    except DamageError as error:  # counting was too much for it
        damages.append(_catalog(error.reason))
    return Verified(counts[0], counts[1], deep, tuple(dict.fromkeys(damages))), seen, now


def _found_by(check: Check, path: Path) -> list[Damage]:
    found: list[Damage] = []
    try:
        with decoding():
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


@dataclass(frozen=True)
class Checks:
    """The checks of one transaction; each yields the damages that it finds."""

    queries: Queries
    folder: Path
    deep: bool

    def checks(self) -> tuple[Check, ...]:
        quick = (self.structure, self.ownership, self.missing, self.files)
        return (*quick, self.vectors, self.words) if self.deep else quick

    def structure(self) -> Iterator[Damage]:
        pragma = "integrity_check" if self.deep else "quick_check"
        for (line,) in self.queries.cursor(f"PRAGMA {pragma}({_SHOWN})"):
            if line != "ok":
                yield _catalog(" ".join(line.split()))
        self.queries.roots()  # which reads what they leave out
        self.queries.obsolete_spaces()

    def ownership(self) -> Iterator[Damage]:
        """Rows that belong to nothing: their owners' rows are gone."""
        if self.deep:
            broken = self.queries.cursor("PRAGMA foreign_key_check").fetchmany(_SHOWN)
            for table, row, owner, _ in broken:
                yield Damage("item", f"row {row} of {table} belongs to no {owner}")
        for tower in self.queries.towers():
            number = self.queries.number(
                "SELECT count(*) FROM embedding WHERE space_id = ? AND tower = ? "
                f"AND item_id NOT IN (SELECT id FROM {tower.items})",
                tower.space_id, tower.key,
            )  # fmt: skip
            if number:
                yield Damage("item", f"{number} vectors belong to no {tower.key}")
        segments = "SELECT count(*) FROM media WHERE id NOT IN (SELECT media_id FROM segment)"
        if number := self.queries.number(segments):
            yield Damage("item", f"{number} files have no segment")

    def missing(self) -> Iterator[Damage]:
        space = self.queries.active_space()
        if space is not None:
            for tower in space.towers.values():
                if number := self.queries.count_without_vector(tower):
                    yield Damage("missing", f"{number} {tower.key}s have no vector")
        elif number := self.queries.count("media"):
            yield Damage("catalog", f"there is no space, but there are {number} images")

    def files(self) -> Iterator[Damage]:
        for tower in self.queries.towers():
            if (row := self.queries.snapshot_of(tower)) is not None:
                yield from self._snapshot(tower, row)

    def _snapshot(self, tower: TowerRow, row: SnapshotRow) -> Iterator[Damage]:
        path, lists = self.folder / row.file, self.folder / ivf_name(row.file)
        if not is_whole(path, row, tower.dim):
            yield Damage("snapshot", f"{row.file}: missing, or not as it was written")
            return
        if row.ivf is not None and not lists.is_file():
            yield Damage("ivf", f"{lists.name}: missing; searches are slower")
        if not self.deep:
            return
        from mmsearch.store.faiss_index import FaissIndex
        from mmsearch.store.ivf_index import IvfIndex

        try:
            index = FaissIndex.open(path, row.checksum)
            index.check()
        except (FileNotFoundError, DamageError):
            yield Damage("snapshot", f"{row.file}: not what was written")
            return
        try:
            if row.ivf is not None:
                IvfIndex.open(lists, index, row.ivf)
        except (FileNotFoundError, DamageError):
            yield Damage("ivf", f"{lists.name}: not what was written")
        yield from self._compared(tower, row, index)

    def _compared(self, tower: TowerRow, row: SnapshotRow, index: FaissIndex) -> Iterator[Damage]:
        """A vector file that is whole holds what the catalog held when it was written."""
        cursor = self.queries.cursor(
            "SELECT item_id, checksum FROM embedding WHERE space_id = ? AND tower = ? AND id <= ?",
            (tower.space_id, tower.key, row.last_embedding_id),
        )
        written = np.fromiter(cursor, _ITEM)
        ids, there, own = np.intersect1d(index.ids, written["item"], return_indices=True)
        same = index.checksums[there] == written["checksum"][own]
        for item in written["item"][~np.isin(written["item"], ids[same])].tolist():
            yield Damage("snapshot", f"{row.file}: {tower.key} {item} is not in it as it was")
        known = np.concatenate([written["item"], self.queries.tombstones(tower)])
        if strange := int((~np.isin(index.ids, known)).sum()):
            yield Damage("snapshot", f"{row.file}: {strange} in it are not in the catalog")

    def vectors(self) -> Iterator[Damage]:
        for tower in self.queries.towers():
            for item in unsound(self.queries, tower):
                yield Damage("vector", f"the vector of {tower.key} {item} is not what was written")

    def words(self) -> Iterator[Damage]:
        own: dict[int, list[list[str]]] = {}
        columns = ", ".join(COLUMNS.values())
        for segment, text, *is_in in self.queries.cursor(
            f"SELECT {SEGMENT}, text, {columns} FROM caption"
        ):
            lines = own.setdefault(segment, [[] for _ in COLUMNS])
            for column, is_here in zip(lines, is_in, strict=True):
                column.extend(text.split("\n") if is_here else ())
        for segment, *texts in self.queries.cursor(
            f"SELECT rowid, {', '.join(COLUMNS)} FROM words"
        ):
            kept = [sorted((text or "").split("\n")) for text in texts]
            if kept != [sorted(lines or [""]) for lines in own.pop(segment, [])]:
                yield _words_of(segment)
                return
        if own:
            yield _words_of(min(own))
        strange = self.queries.number(
            "SELECT count(*) FROM (SELECT id, text FROM caption WHERE source = 'text' EXCEPT "
            "SELECT rowid, text FROM read_text)"
        )
        if strange:
            yield Damage("words", f"the letters of {strange} texts are not those that were read")


def _words_of(segment: int) -> Damage:
    return Damage("words", f"the words of segment {segment} are not those of its captions")


def unsound(queries: Queries, tower: TowerRow) -> Iterator[int]:
    """The items whose vectors are not what was written, or are none at all."""
    cursor = queries.cursor(
        "SELECT item_id, vector, checksum FROM embedding WHERE space_id = ? AND tower = ?",
        (tower.space_id, tower.key),
    )
    while rows := cursor.fetchmany(_PART):
        sound = []
        for item, vector, checksum in rows:
            if is_sound(tower, item, vector, checksum):
                sound.append((item, vector))
            else:
                yield item
        vectors = vectors_from(b"".join(vector for _, vector in sound), tower.dim)
        for (item, _), length in zip(sound, np.linalg.norm(vectors, axis=1), strict=True):
            if not abs(length - 1) < _LENGTH:  # what was no vector ever
                yield item

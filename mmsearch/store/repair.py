"""Makes a damaged index sound again, as far as what is left of it allows.

What is written twice is taken from its other copy: vectors from the vector files, those from the
catalog, words from captions. A catalog whose pages are damaged is read row by row into a new one.
What is gone for good is listed, and taken out: nothing that is left is wrong.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from mmsearch.errors import DamageError
from mmsearch.store import catalog
from mmsearch.store.catalog import Catalog
from mmsearch.store.checksum import of_vector
from mmsearch.store.files import make_folder
from mmsearch.store.migrations import APPLICATION_ID, FORMAT_VERSION, OLDEST, begun, migrate
from mmsearch.store.paths import join
from mmsearch.store.queries import Queries
from mmsearch.store.rows import TowerRow, globs_of, is_snapshot_name
from mmsearch.store.store import REPAIRED, VECTORS, Store, finish_repair, writer_lock
from mmsearch.store.triggers import FILL_WORDS
from mmsearch.store.verify import unsound, verify
from mmsearch.store.writer import Writer
from mmsearch.types import Repaired, Verified

#: The tables, each after those that it refers to; format 4 has patches in `look`. Words follow from
#: captions by triggers.
_TABLES = (
    "revision", "space", "tower", "root", "media", "segment", "caption", "embedding",
    "patch_embedding", "look", "tombstone", "snapshot", "failure", "sqlite_sequence",
)  # fmt: skip
#: Take out what belongs to nothing any more.
_ORPHANS = (
    "DELETE FROM segment WHERE media_id NOT IN (SELECT id FROM media)",
    # A picture is one segment: it needs no row to tell. Of other files it is not known.
    """INSERT OR IGNORE INTO segment (id, media_id, modality) SELECT id, id, 'image' FROM media
        WHERE kind = 'image' AND id NOT IN (SELECT media_id FROM segment)""",
    "DELETE FROM caption WHERE media_id NOT IN (SELECT media_id FROM segment)",
    "DELETE FROM media WHERE id NOT IN (SELECT media_id FROM segment)",
    """DELETE FROM embedding WHERE NOT EXISTS (SELECT 1 FROM tower
        WHERE tower.space_id = embedding.space_id AND key = tower AND CASE modality
        WHEN 'text' THEN item_id IN (SELECT id FROM caption)
        ELSE item_id IN (SELECT id FROM segment WHERE modality = tower.modality) END)""",
)
#: What an index of SQLite repeats of a table: how many rows there were.
_COUNTED = (
    ("caption", "ix_caption_media_id", "captions"),
    ("failure", "sqlite_autoindex_failure_1", "files in the list of those that failed"),
)
_PAGE = 16384
#: So many unreadable places in a table are passed over.
_GAPS = 10_000
#: What reading a damaged catalog raises: a ValueError where a message of SQLite's is no text, and
#: of memory where a row claims any size.
_UNREADABLE = (sqlite3.DatabaseError, ValueError, OverflowError, MemoryError)


def repair(folder: Path, examine: Callable[..., Verified] = verify) -> Repaired:
    """Repairs what can be repaired without a model.

    Items whose vector is gone are left without one: they need a model, or have to go.

    Args:
        examine: finds what is damaged, as `verify` does.

    Raises:
        IndexNotFound: there is no index.
        DamageError: too little is left of the catalog; nothing was changed.
    """
    if not examine(folder, deep=True).damages:  # which needs no lock, nor a disk to write to
        return Repaired()
    with writer_lock(folder), catalog.writing(folder):
        done = Repaired(examine(folder, deep=True).damages)  # what another left meanwhile
        kinds = {one.kind for one in done.found}
        if not kinds:
            return done
        make_folder(folder / VECTORS)
        if kinds & {"catalog", "item"}:
            lost, kept = _salvage(folder)
            done = replace(done, lost=tuple(lost), kept=kept)
        with closing(Store(folder)) as store:
            writer = Writer(store.catalog, folder / VECTORS, store.compaction)
            vectors_are_whole = _mend_vectors(store, folder / VECTORS)
            with store.catalog.write() as connection:
                for statement in FILL_WORDS:
                    catalog.raw(connection).execute(statement)
            if not vectors_are_whole or kinds - {"words", "ivf", "missing"}:
                writer.rewrite()
            writer.mend()
            writer.compact(only_if="short")
    return done


# -- vectors ---------------------------------------------------------------------------------------


def _mend_vectors(store: Store, folder: Path) -> bool:
    """Takes damaged vectors from the vector files, or out; whether none was damaged."""
    are_whole = True
    with store.catalog.read() as queries:
        towers = queries.towers()
    for tower in towers:
        with store.catalog.read() as queries:
            bad = list(unsound(queries, tower))
            copies = _copies(queries, tower, folder, bad)
        are_whole = are_whole and not bad
        with store.catalog.write() as changing:
            raw = catalog.raw(changing)
            where = "WHERE space_id = ? AND tower = ? AND item_id = ?"
            for item in bad:
                key = (tower.space_id, tower.key, item)
                if (copy := copies.get(item)) is not None:
                    raw.execute(
                        f"UPDATE embedding SET vector = ?, checksum = ? {where}",
                        (copy, of_vector(copy, item), *key),
                    )
                else:
                    raw.execute(f"DELETE FROM embedding {where}", key)
    return are_whole


def _copies(
    queries: Queries, tower: TowerRow, folder: Path, items: Sequence[int]
) -> dict[int, bytes]:
    """The vectors that a vector file has of some items, where it is sound there."""
    row = queries.snapshot_of(tower)
    if row is None or not items:
        return {}
    from mmsearch.store.faiss_index import FaissIndex

    found: dict[int, bytes] = {}
    with suppress(FileNotFoundError, DamageError):
        index = FaissIndex.open(folder / row.file, row.checksum)
        for place in index.rows_of(np.array(sorted(items), np.int64)).tolist():
            with suppress(DamageError):
                vector = index.vectors_at(np.array([place], np.int64))[0]
                found[int(index.ids[place])] = vector.tobytes()
    return found


# -- a damaged catalog -----------------------------------------------------------------------------


def _salvage(folder: Path) -> tuple[list[str], Path]:
    """Reads what can be read of a catalog into a new one, which takes its place.

    Returns what could not be read, and where the damaged one lies now.
    """
    path, scratch = folder / catalog.FILE_NAME, folder / ".salvage.sqlite3"
    for leftover in (scratch, folder / REPAIRED):
        catalog.unlink_all(leftover)
    try:
        with (
            catalog.drafted(folder / REPAIRED) as draft,
            closing(_opened(path, scratch)) as source,
        ):
            _create_like(source, draft)
            with closing(sqlite3.connect(draft, isolation_level=None)) as target:
                target.execute("PRAGMA journal_mode = DELETE")  # see Catalog.create
                target.execute("PRAGMA foreign_keys = ON")
                with begun(target, "BEGIN IMMEDIATE"):
                    for table in _TABLES:
                        _copy(source, target, table)
                        if table == "root":
                            _add_roots(source, target)
                migrate(target)
                with begun(target, "BEGIN IMMEDIATE"):
                    _tidy(target)
                    lost = _lost(source, target)
                target.execute("PRAGMA journal_mode = WAL")
    finally:
        catalog.unlink_all(scratch)
    kept = folder / f"catalog.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S}.sqlite3"
    path.replace(kept)
    finish_repair(folder, kept)
    return lost, kept


def _create_like(source: sqlite3.Connection, draft: Path) -> None:
    """Makes an empty catalog, in the format of a damaged one."""
    if source.execute("SELECT 1 FROM sqlite_master WHERE name = 'tower'").fetchone():
        Catalog.create(draft).close()
        return
    with closing(sqlite3.connect(draft, isolation_level=None)) as target:
        target.execute(f"PRAGMA page_size = {_PAGE}")
        target.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        for (statement,) in source.execute(
            "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL "
            "AND name NOT GLOB 'sqlite_*' AND name NOT GLOB 'words_[cdi]*' ORDER BY rowid"
        ):
            target.execute(statement)
        target.execute(f"PRAGMA user_version = {OLDEST}")


def _opened(path: Path, scratch: Path) -> sqlite3.Connection:
    """A connection to a damaged catalog; where its first bytes are lost, to a copy with new ones.

    Raises:
        DamageError: it has no tables that could be read.
    """
    for place in (path, scratch):
        if place == scratch:
            _with_new_header(path, scratch)
        connection = sqlite3.connect(place, isolation_level=None)
        try:
            connection.text_factory = lambda content: content.decode("utf-8", "replace")
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if {"media", "root", "space", "embedding"} <= {name for (name,) in tables}:
                return connection
        except _UNREADABLE:
            pass
        connection.close()
    raise DamageError(
        f"{path}: too little is left of the catalog to repair it; move the folder away, and "
        "'mmsearch restore' a backup or index the folders again"
    )


def _with_new_header(path: Path, scratch: Path) -> None:
    """A copy, with the first 100 bytes as SQLite writes them for our catalogs."""
    shutil.copyfile(path, scratch)
    if (wal := catalog.companions(path)[0]).is_file():
        shutil.copyfile(wal, catalog.companions(scratch)[0])
    pages = scratch.stat().st_size // _PAGE
    header = struct.pack(
        ">16sHBBBBBB12I20xII",
        b"SQLite format 3\0", _PAGE, 2, 2, 0, 64, 32, 32,
        1, pages, 0, 0, 1, 4, 0, 0, 1, FORMAT_VERSION, 0, APPLICATION_ID, 1,
        sqlite3.sqlite_version_info[0] * 1_000_000 + sqlite3.sqlite_version_info[1] * 1000,
    )  # fmt: skip
    with scratch.open("r+b") as file:
        file.write(header[:100])


def _copy(source: sqlite3.Connection, target: sqlite3.Connection, table: str) -> None:
    """Copies the rows of a table that can be read, and that still make sense."""
    have: set[str] = set()
    with suppress(*_UNREADABLE):
        have = {row[1] for row in source.execute(f"PRAGMA table_info({table})")}
    columns = [row[1] for row in target.execute(f"PRAGMA table_info({table})") if row[1] in have]
    if not columns:
        return
    marks = ", ".join("?" * len(columns))
    target.execute(f"DELETE FROM {table}")
    insert = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
    for row in readable(source, table, columns):
        with suppress(sqlite3.IntegrityError, sqlite3.InterfaceError):
            target.execute(insert, row)


def _add_roots(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Folders whose rows are gone, by the index over their paths: without them, all is nowhere."""
    with suppress(*_UNREADABLE):
        target.executemany(
            "INSERT OR IGNORE INTO root (id, path, walked, exclude) VALUES (?, ?, 1, '[]')",
            source.execute(
                "SELECT rowid, path FROM root INDEXED BY sqlite_autoindex_root_1 "
                "WHERE typeof(path) = 'blob'"
            ),
        )


def readable(
    source: sqlite3.Connection, table: str, columns: Sequence[str]
) -> Iterator[tuple[object, ...]]:
    """The rows of a damaged table, (columns,) each, but for those in places that cannot be read."""
    query = f"SELECT rowid, {', '.join(columns)} FROM {table} WHERE rowid > ? ORDER BY rowid"
    after: int | None = 0  # our ids begin at 1
    was_short: int | None = None
    for _ in range(_GAPS):
        if after is None:
            return
        try:
            for number, *row in source.execute(query, (after,)):
                if number <= after:  # a page that leads back: for ever, if one followed it
                    raise ValueError("out of order")
                after = number
                yield tuple(row)
        except _UNREADABLE as error:
            if isinstance(error, MemoryError) and after != was_short:
                was_short = after  # the machine may be short of it just now: once more
            else:
                after = _behind(source, query, after)
        else:
            return


def _behind(source: sqlite3.Connection, query: str, after: int) -> int | None:
    """From where on rows can be read again; None for nowhere."""

    def can_read(number: int) -> bool:
        try:
            row = source.execute(f"{query} LIMIT 1", (number,)).fetchone()
        except _UNREADABLE:
            return False
        return row is None or row[0] > number

    bad, step = after, 1
    while not can_read(after + step):
        bad, step = after + step, 2 * step
        if step > 1 << 40:
            return None
    good = after + step
    while good - bad > 1:
        middle = (good + bad) // 2
        bad, good = (bad, middle) if can_read(middle) else (middle, good)
    return good


def _tidy(target: sqlite3.Connection) -> None:
    """Takes out what belongs to nothing any more.

    Raises:
        DamageError: there is no space left, without which vectors mean nothing.
    """
    for statement in _ORPHANS:
        target.execute(statement)
    target.executemany(
        "DELETE FROM snapshot WHERE rowid = ?",
        [
            (number,)
            for number, file in target.execute("SELECT rowid, file FROM snapshot")
            if not is_snapshot_name(file)
        ],
    )
    for number, exclude in target.execute("SELECT id, exclude FROM root").fetchall():
        try:
            globs_of(exclude)
        except DamageError:
            target.execute("UPDATE root SET exclude = '[]' WHERE id = ?", (number,))
    if not target.execute("SELECT 1 FROM revision").fetchone():
        target.execute("INSERT INTO revision VALUES (1)")
    try:
        queries = Queries(target)
        queries.obsolete_spaces()  # reads every description
        space = queries.active_space()
        queries.pending_space()
    except DamageError:
        space = None
    if space is None and target.execute("SELECT 1 FROM media LIMIT 1").fetchone():
        raise DamageError(
            "the catalog does not tell any more which model its vectors are of; move the folder "
            "away, and 'mmsearch restore' a backup or index the folders again"
        )


def _lost(source: sqlite3.Connection, target: sqlite3.Connection) -> list[str]:
    """What the indexes of SQLite still know of rows that could not be read."""
    kept = set(target.execute("SELECT root_id, path FROM media"))
    tops = dict(target.execute("SELECT id, path FROM root"))
    found: list[str] = []
    with suppress(*_UNREADABLE):
        for root, path in source.execute(
            "SELECT root_id, path FROM media INDEXED BY sqlite_autoindex_media_1"
        ):
            if (root, path) not in kept and isinstance(path, bytes):
                found.append(os.fsdecode(join(tops.get(root, b"?"), path)))
    for table, index, what in _COUNTED:
        before = None  # not known
        (now,) = target.execute(f"SELECT count(*) FROM {table}").fetchone()
        with suppress(*_UNREADABLE):
            query = f"SELECT count(*) FROM {table} INDEXED BY {index}"
            (before,) = source.execute(query).fetchone()
            if before > now:
                found.append(f"{before - now} {what}")
        if table == "caption" and before != now:  # those of sidecar files are read again
            target.execute("UPDATE media SET sidecar_size = NULL, sidecar_mtime_ns = NULL")
    return found

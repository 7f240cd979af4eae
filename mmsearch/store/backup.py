"""A whole index in one file: a catalog with what was trained for it in one more table."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from mmsearch.errors import DamageError, UnreadableError, UsageError
from mmsearch.store import catalog
from mmsearch.store.files import write_durably
from mmsearch.store.migrations import APPLICATION_ID, begun, format_version, migrate
from mmsearch.store.paths import join, relative
from mmsearch.store.queries import Queries
from mmsearch.store.store import REPAIRED, Store, claim, writer_lock
from mmsearch.store.verify import unsound


def backup(store: Store, path: Path, files: Sequence[str]) -> int:
    """Copies an index, as of now, into a new file; how many bytes that has.

    A writer is not held up: what it commits meanwhile is in the copy altogether or not at all.
    Vector files are left out, since they follow from the catalog.

    Args:
        files: the names of the files beside the catalog that are to be in it where they are there.

    Raises:
        UsageError: there is a file of that name.
        DamageError: the index is damaged, and so would be its copy.
        UnreadableError: it cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path}: there already; name a new file")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder")
    with catalog.writing(path):
        with (
            catalog.drafted(path, is_catalog=False) as draft,
            closing(sqlite3.connect(draft, isolation_level=None)) as target,
        ):
            store.catalog.copy_into(target)
            target.execute("PRAGMA journal_mode = DELETE")
            _check(target, store.folder / catalog.FILE_NAME)
            with begun(target, "BEGIN"):
                target.execute("DELETE FROM snapshot")
                target.execute("DELETE FROM tombstone")
                target.execute("CREATE TABLE kept_file (name TEXT PRIMARY KEY, content BLOB)")
                for name in files:
                    if (store.folder / name).is_file():
                        content = (store.folder / name).read_bytes()
                        target.execute("INSERT INTO kept_file VALUES (?, ?)", (name, content))
        return path.stat().st_size


def restore(path: Path, folder: Path, files: Sequence[str], moved: Mapping[bytes, bytes]) -> None:
    """Makes an index of a backup.

    Args:
        folder: where no index is yet.
        files: the names that files beside the catalog may have.
        moved: where folders lie now, by where they lay when the backup was made; all absolute.

    Raises:
        UsageError: there is an index, the file is no backup, or no folder lies where one is said to
            have moved from.
        FormatError: its format is too old or too new.
        DamageError: it is damaged.
        UnreadableError: it cannot be read, or the index cannot be written.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as source:
        _check_is_backup(source, path)
        _places(source, moved)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: not a folder; name a new one with --index DIR")
    with catalog.writing(folder):
        claim(folder)
    with writer_lock(folder), catalog.writing(folder):
        target = folder / catalog.FILE_NAME
        if target.exists() or (folder / REPAIRED).exists():
            raise UsageError(
                f"{folder}: an index is there already; name a new folder with --index DIR"
            )
        with catalog.drafted(target) as draft:
            shutil.copyfile(path, draft)
            with closing(sqlite3.connect(draft, isolation_level=None)) as copy:
                _check(copy, path)
                with begun(copy, "BEGIN"):
                    _move_roots(copy, moved)
                    for name, content in copy.execute("SELECT name, content FROM kept_file"):
                        if name in files and isinstance(content, bytes):
                            write_durably(folder / name, content)
                    copy.execute("DROP TABLE kept_file")
                copy.execute("PRAGMA journal_mode = WAL")
    with Store(folder).writer() as writer:
        writer.compact()


def _check(copy: sqlite3.Connection, path: Path) -> None:
    """Looks at a whole catalog, brought to the newest format.

    Raises:
        DamageError: it is not what was written.
        UnreadableError: there is too little memory.
    """
    try:
        is_sound = copy.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",)
        migrate(copy)
        queries = Queries(copy)
        bad = (item for tower in queries.towers() for item in unsound(queries, tower))
        is_sound = is_sound and next(bad, None) is None
    except sqlite3.DatabaseError:
        is_sound = False
    except MemoryError as error:
        raise UnreadableError(f"{path}: too little memory to look through it") from error
    if not is_sound:
        raise DamageError(f"{path}: damaged, so that nothing was made of it")


def _check_is_backup(copy: sqlite3.Connection, path: Path) -> None:
    try:
        (application,) = copy.execute("PRAGMA application_id").fetchone()
        tables = {name for (name,) in copy.execute("SELECT name FROM sqlite_master")}
    except sqlite3.DatabaseError as error:
        if catalog.code_of(error) == sqlite3.SQLITE_NOTADB:
            raise UsageError(f"{path}: not a backup of mmsearch") from error
        raise DamageError(f"{path}: damaged, so that nothing was made of it: {error}") from error
    if application != APPLICATION_ID or "kept_file" not in tables:
        raise UsageError(f"{path}: not a backup of mmsearch")
    format_version(copy)


def _places(copy: sqlite3.Connection, moved: Mapping[bytes, bytes]) -> dict[int, bytes]:
    """Where each root lies now.

    Raises:
        UsageError: what is said to have moved is none of them, or two come to lie in one place.
    """
    roots = dict(copy.execute("SELECT path, id FROM root ORDER BY path"))
    used: set[bytes] = set()
    places: dict[int, bytes] = {}
    for path, number in roots.items():
        above = [(old, rest) for old in moved if (rest := relative(path, old)) is not None]
        old, rest = max(above, key=lambda one: len(one[0]), default=(path, b""))
        used.add(old)
        top = moved.get(old, path)
        places[number] = join(top, rest) if rest else top
    if strange := sorted(set(moved) - used):
        known = ", ".join(os.fsdecode(path) for path in roots) or "none"
        raise UsageError(
            f"{os.fsdecode(strange[0])}: no indexed folder lies there or below; they are: {known}"
        )
    if len(set(places.values())) < len(places):
        raise UsageError("two indexed folders cannot move to one place")
    return places


def _move_roots(copy: sqlite3.Connection, moved: Mapping[bytes, bytes]) -> None:
    places = _places(copy, moved)
    aside = {number: b"\0%d" % number for number in places}  # one may take another's place
    for one in (aside, places):
        copy.executemany(
            "UPDATE root SET path = ? WHERE id = ?",
            [(path, number) for number, path in one.items()],
        )

"""The SQLite catalog: connections, transactions, and what its errors mean.

What reads does so through Python's own driver: a search is over before SQLAlchemy, which writes
(`store.mutations`), would be imported. All that is SQLite's own stays in this package.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.config import MARKER
from mmsearch.errors import (
    DamageError,
    FormatError,
    IndexInUse,
    IndexNotFound,
    StoreError,
    UnreadableError,
)
from mmsearch.store.files import draft_of, replacing
from mmsearch.store.migrations import (
    APPLICATION_ID,
    FORMAT_VERSION,
    begun,
    format_version,
    migrate,
)
from mmsearch.store.queries import Queries

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

FILE_NAME = "catalog.sqlite3"
_BUSY_SECONDS = 10.0
#: What a system may do to a sound file: these are no damage.
_REFUSED = frozenset(
    (
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOLFS,
        sqlite3.SQLITE_AUTH,
    )
)
_IN_USE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class Catalog:
    """An open catalog. Connections are pooled; threads may share one catalog."""

    def __init__(self, path: Path) -> None:
        """Opens an existing catalog and brings it to the newest format.

        Raises:
            FormatError: another program's file, or a newer format.
            UnreadableError: the file cannot be opened.
        """
        self.path = path
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._engine: Engine | None = None
        self._fixed: os.stat_result | None = None
        self.identity = _identity(path)
        """Which file is open: `repair` and `restore` may put another in its place."""
        try:
            version = self._version()
        except FormatError as error:
            if (path.parent / MARKER).is_file() and not error.is_ours:
                raise DamageError.of_catalog("it does not begin as one", path) from error
            raise
        except UnreadableError:
            # Where it may write nothing, SQLite cannot share a log with others. If there is no log,
            # the file alone is all, as long as nobody changes it.
            if os.access(path.parent, os.W_OK) or companions(path)[0].exists():
                raise
            self.close()
            self._fixed = os.stat(path)
            version = self._version()
        if version < FORMAT_VERSION:
            with _explaining(path), closing(_connect(path)) as connection:
                migrate(connection)

    def _version(self) -> int:
        with _explaining(self.path), self._connection() as connection:
            return format_version(connection)

    @classmethod
    def create(cls, path: Path) -> Catalog:
        """Makes an empty catalog: it appears whole under its name, or not at all."""
        from mmsearch.store import schema  # and SQLAlchemy with it

        with _explaining(path), drafted(path) as draft, closing(_connect(draft)) as connection:
            connection.execute("PRAGMA page_size = 16384")  # ignored once it is in WAL mode
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            with begun(connection, "BEGIN IMMEDIATE"):
                schema.create(connection)
                connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            # Not before: what stands in a log is folded into the file when that is closed, and
            # where this fails SQLite does not say so. Now there is nothing to fold.
            connection.execute("PRAGMA journal_mode = WAL")
        return cls(path)

    def close(self) -> None:
        """Lets go of the file; an open transaction keeps its connection to its end."""
        with self._lock:
            idle, self._idle = self._idle, []
            engine, self._engine = self._engine, None
        for connection in idle:
            connection.close()
        if engine is not None:
            engine.dispose()

    def _follow(self) -> None:
        """Lets go of a file that another has taken the place of."""
        now = _identity(self.path)
        if now is None and not self.path.parent.is_dir():
            raise IndexNotFound(f"{self.path.parent}: the index is gone")
        if now not in (None, self.identity):
            self.close()
            self.identity = now

    def copy(self, to: Catalog) -> None:
        """Copies everything, as of now, over another catalog; writers are not held up."""
        with _explaining(self.path), to._connection() as target:
            self.copy_into(target)

    def copy_into(self, target: sqlite3.Connection) -> None:
        """Copies everything, as of now, over another database.

        Raises:
            sqlite3.Error: what goes wrong there or here.
        """
        with self._connection() as source:
            source.backup(target)

    def shrink(self) -> None:
        """Gives the room of what was deleted back to the disk, where that is a tenth and more."""
        with _explaining(self.path), self._connection() as connection:
            (free,) = connection.execute("PRAGMA freelist_count").fetchone()
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            if free > pages // 10:
                connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def read(self) -> Iterator[Queries]:
        """A transaction that sees one state of the catalog from its first query to its end."""
        with (
            _explaining(self.path),
            self._connection() as connection,
            begun(connection, "BEGIN"),
        ):
            yield Queries(connection)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that alone may write; committed at the end, rolled back on an error."""
        from sqlalchemy.exc import DatabaseError

        self._follow()
        with self._lock:
            engine = self._engine = self._engine or _engine(self.path)
        try:
            with _explaining(self.path), engine.begin() as connection:
                yield connection
        except DatabaseError as error:
            if not isinstance(error.orig, sqlite3.DatabaseError):
                raise
            raise explained(error.orig, self.path) from error
        if _identity(self.path) != self.identity:  # what was written is in a file without a name
            raise IndexNotFound(
                f"{self.path.parent}: the index was deleted or replaced while it was written to; "
                "index again"
            )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if self._fixed is not None and _has_changed(self.path, self._fixed):
            self._fixed = None
            self.close()
        self._follow()
        with self._lock:
            found = self._idle.pop() if self._idle else None
            identity = self.identity
        connection = found or _connect(self.path, is_fixed=self._fixed is not None)
        try:
            yield connection
        finally:
            with self._lock:
                is_ours = identity == self.identity
                if is_ours:
                    self._idle.append(connection)
            if not is_ours:
                connection.close()


def raw(connection: Connection) -> sqlite3.Connection:
    """The driver's connection behind SQLAlchemy's: it reads what the same transaction wrote."""
    found = connection.connection.dbapi_connection
    assert isinstance(found, sqlite3.Connection)
    return found


def companions(path: Path) -> tuple[Path, ...]:
    """The files that SQLite keeps beside a database."""
    return tuple(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))


@contextmanager
def drafted(path: Path, *, is_catalog: bool = True) -> Iterator[Path]:
    """Where to make a database, which then gets its name, durably, where there is none.

    What is not finished is deleted: on a full disk its room is needed.

    Args:
        is_catalog: whether a log beside that name is one that an earlier catalog left.
    """
    unlink_all(draft_of(path))
    try:
        with replacing(path) as draft:
            yield draft
            for one in (
                companions(path) if is_catalog else ()
            ):  # SQLite would write a log that was left into this one
                one.unlink(missing_ok=True)
    finally:
        unlink_all(draft_of(path))


def unlink_all(path: Path) -> None:
    """Deletes a database and what lies beside it, if there is one."""
    for one in (path, *companions(path)):
        one.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _has_changed(path: Path, before: os.stat_result) -> bool:
    now = os.stat(path)
    return (
        (now.st_ino, now.st_size, now.st_mtime_ns)
        != (before.st_ino, before.st_size, before.st_mtime_ns)
        or companions(path)[0].exists()
    )  # fmt: skip


def _connect(path: Path, *, is_fixed: bool = False) -> sqlite3.Connection:
    # Transactions are opened by us, those of DDL included. Threads take turns with a connection.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?immutable=1" if is_fixed else path,
        timeout=_BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        uri=is_fixed,
    )
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _engine(path: Path) -> Engine:
    """SQLAlchemy's, for those that write."""
    from sqlalchemy import create_engine, event

    engine = create_engine("sqlite://", creator=lambda: _connect(path), pool_size=1)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.DatabaseError as error:
        raise explained(error, path) from error
    except UnicodeDecodeError as error:  # a message of SQLite's that names what is damaged
        raise DamageError.of_catalog(str(error), path) from error
    except MemoryError as error:  # a damaged row may claim any size
        raise UnreadableError(
            f"{path}: too little memory to read it (a damaged row may claim any size: "
            "'mmsearch verify' finds those)"
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says so where a file or a folder cannot be written, in one line.

    Raises:
        UnreadableError: instead of what the system or SQLite raises.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnreadableError(f"{path}: cannot be written: {reason}") from error
    except sqlite3.DatabaseError as error:
        raise explained(error, path) from error


def explained(error: sqlite3.DatabaseError, path: Path) -> StoreError | DamageError:
    """What an error of SQLite's means. What is asked for is always there in a sound catalog."""
    code = code_of(error)
    if code in _IN_USE:
        return IndexInUse(f"{path.parent}: the index is in use by another process; try again")
    if code in _REFUSED:
        return UnreadableError(f"{path}: the catalog cannot be used: {error}")
    if code == sqlite3.SQLITE_NOTADB and not (path.parent / MARKER).is_file():
        return FormatError(f"{path} is not a catalog of mmsearch; name another folder")
    return DamageError.of_catalog(str(error), path)


def code_of(error: sqlite3.DatabaseError) -> int:
    """SQLite's primary code; 0 where the error is Python's own, of text that is none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF

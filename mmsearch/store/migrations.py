"""Brings a catalog to the newest format, a numbered step at a time.

A step and the record that it was taken (SQLite's `user_version`) commit together, so a kill
leaves the catalog before a step or after it. A step, once released, never changes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager

from mmsearch.errors import DamageError, FormatError

#: SQLite's application_id of a catalog: "mmsr".
APPLICATION_ID = 0x6D6D7372


def _first(connection: sqlite3.Connection) -> None:
    for statement in _FIRST_TABLES:
        connection.execute(statement)


# Spelled out rather than taken from schema.py: that file moves on, a released step does not.
_FIRST_TABLES = (
    "CREATE TABLE revision (number INTEGER NOT NULL)",
    "INSERT INTO revision VALUES (0)",
    """CREATE TABLE space (
        id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        identity VARCHAR NOT NULL UNIQUE,
        spec VARCHAR NOT NULL,
        active INTEGER NOT NULL,
        precision VARCHAR NOT NULL)""",
    """CREATE TABLE root (
        id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        path BLOB NOT NULL UNIQUE,
        walked INTEGER NOT NULL,
        exclude VARCHAR NOT NULL)""",
    """CREATE TABLE media (
        id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        root_id INTEGER NOT NULL REFERENCES root (id),
        path BLOB NOT NULL,
        size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        content_hash BLOB NOT NULL,
        width INTEGER NOT NULL,
        height INTEGER NOT NULL,
        captured VARCHAR NOT NULL,
        captured_from VARCHAR NOT NULL,
        sidecar_size INTEGER,
        sidecar_mtime_ns INTEGER,
        UNIQUE (root_id, path))""",
    "CREATE INDEX ix_media_content_hash ON media (content_hash)",
    "CREATE INDEX ix_media_captured ON media (captured)",
    """CREATE TABLE caption (
        id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        media_id INTEGER NOT NULL REFERENCES media (id),
        text VARCHAR NOT NULL,
        source VARCHAR NOT NULL)""",
    "CREATE INDEX ix_caption_media_id ON caption (media_id)",
    """CREATE TABLE embedding (
        id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        space_id INTEGER NOT NULL REFERENCES space (id),
        modality VARCHAR NOT NULL,
        item_id INTEGER NOT NULL,
        vector BLOB NOT NULL,
        UNIQUE (space_id, modality, item_id))""",
    # In the order of id within a modality, so that reading a tail costs what the tail costs.
    "CREATE INDEX ix_embedding_order ON embedding (space_id, modality, id)",
    """CREATE TABLE tombstone (
        space_id INTEGER NOT NULL REFERENCES space (id),
        modality VARCHAR NOT NULL,
        item_id INTEGER NOT NULL,
        PRIMARY KEY (space_id, modality, item_id))""",
    """CREATE TABLE snapshot (
        space_id INTEGER NOT NULL REFERENCES space (id),
        modality VARCHAR NOT NULL,
        generation INTEGER NOT NULL,
        file VARCHAR NOT NULL,
        vectors INTEGER NOT NULL,
        last_embedding_id INTEGER NOT NULL,
        PRIMARY KEY (space_id, modality))""",
    """CREATE TABLE failure (
        root_id INTEGER NOT NULL REFERENCES root (id),
        path BLOB NOT NULL,
        size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        reason VARCHAR NOT NULL,
        failed_at VARCHAR NOT NULL,
        PRIMARY KEY (root_id, path))""",
)


def _words(connection: sqlite3.Connection) -> None:
    connection.execute(
        "CREATE VIRTUAL TABLE words USING fts5("
        "text, tokenize = 'porter unicode61 remove_diacritics 2')"
    )
    connection.execute(
        "INSERT INTO words (rowid, text) "
        "SELECT media_id, group_concat(text, char(10)) FROM caption GROUP BY media_id"
    )
    # Triggers, so that an older program which had the index open keeps the words in step too.
    for statement in _WORDS_TRIGGERS:
        connection.execute(statement)


_WORDS_TRIGGERS = (
    """CREATE TRIGGER words_after_insert AFTER INSERT ON caption BEGIN
        DELETE FROM words WHERE rowid = NEW.media_id;
        INSERT INTO words (rowid, text) SELECT media_id, group_concat(text, char(10))
            FROM caption WHERE media_id = NEW.media_id GROUP BY media_id;
    END""",
    """CREATE TRIGGER words_after_delete AFTER DELETE ON caption BEGIN
        DELETE FROM words WHERE rowid = OLD.media_id;
        INSERT INTO words (rowid, text) SELECT media_id, group_concat(text, char(10))
            FROM caption WHERE media_id = OLD.media_id GROUP BY media_id;
    END""",
)


def _looks(connection: sqlite3.Connection) -> None:
    connection.execute(
        """CREATE TABLE look (
            id INTEGER NOT NULL PRIMARY KEY,
            space_id INTEGER NOT NULL REFERENCES space (id),
            media_id INTEGER NOT NULL REFERENCES media (id),
            content BLOB NOT NULL,
            UNIQUE (space_id, media_id))"""
    )
    # Also what counting and joining read instead of the wide rows themselves.
    connection.execute("CREATE INDEX ix_look_media_id ON look (media_id)")
    # Before, or the reference would forbid it. A trigger, for an older program that has it open.
    connection.execute(
        """CREATE TRIGGER look_before_delete BEFORE DELETE ON media BEGIN
            DELETE FROM look WHERE media_id = OLD.id;
        END"""
    )


def _checksums(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE embedding ADD COLUMN checksum INTEGER")
    connection.execute("ALTER TABLE snapshot ADD COLUMN checksum BLOB")
    connection.execute("ALTER TABLE snapshot ADD COLUMN cells BLOB")
    # Writers fill in those that are missing, a portion at a time.
    connection.execute(
        "CREATE INDEX ix_embedding_unsummed ON embedding (id) WHERE checksum IS NULL"
    )


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_first, _words, _looks, _checksums)
FORMAT_VERSION = len(MIGRATIONS)


def format_version(connection: sqlite3.Connection) -> int:
    """The version a catalog says it has.

    Raises:
        FormatError: the file is not a catalog of mmsearch, or a newer program made it.
    """
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise FormatError("catalog.sqlite3 is not a catalog of mmsearch; name another folder")
    if version < 0:
        raise DamageError.of_catalog("it has no format")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"the index has format {version}, this program knows up to {FORMAT_VERSION}; "
            "update mmsearch",
            is_newer=True,
        )
    return int(version)


def migrate(
    connection: sqlite3.Connection, begun: Callable[[], AbstractContextManager[None]]
) -> None:
    """Takes the missing steps, each in a transaction of its own.

    Args:
        begun: opens a transaction that alone may write, and ends it.
    """
    while True:
        with begun():
            number = format_version(connection) + 1
            if number > FORMAT_VERSION:
                return
            MIGRATIONS[number - 1](connection)
            connection.execute(f"PRAGMA user_version = {number}")

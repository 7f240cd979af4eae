"""Brings a catalog to the newest format, a numbered step at a time.

A step and the record that it was taken (SQLite's `user_version`) commit together, so a kill
leaves the catalog before a step or after it. A step, once released, never changes: its statements
are spelled out here, where those of schema.py move on.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mmsearch.errors import DamageError, FormatError
from mmsearch.store.checksum import of_vector
from mmsearch.store.rows import decoding

#: SQLite's application_id of a catalog: "mmsr".
APPLICATION_ID = 0x6D6D7372


def _towers_and_segments(connection: sqlite3.Connection) -> None:
    """From 4 to 5. No vector is written: columns get other names, and rows stand beside them."""
    for statement in _BEFORE:
        connection.execute(statement)
    rows = connection.execute("SELECT id, identity, spec, precision FROM space").fetchall()
    for number, identity, text, precision in rows:
        with decoding("the description of its model"):
            spec = json.loads(text)
            how = {name: spec[name] for name in ("model", "parameters", "licence")}
            inputs = {
                "image": spec["preprocess"],
                "text": {
                    "context_length": spec["context_length"], "tokenizer": spec["tokenizer"],
                    "clean": spec["tokenizer_clean"],
                },
            }  # fmt: skip
            dim = int(spec["dim"])
        connection.execute("UPDATE space SET dim = ? WHERE id = ?", (dim, number))
        for key, modality in (("image", "image"), ("caption", "text")):
            stored = json.dumps({"version": 1, **how, "input": inputs[modality]})
            connection.execute(
                "INSERT INTO tower VALUES (?, ?, ?, ?, ?, ?, 1)",
                (number, key, modality, identity, stored, precision),
            )
    # A program before format 4 wrote vectors without a checksum; these few get theirs.
    query = "SELECT id FROM embedding WHERE checksum IS NULL AND typeof(vector) = 'blob'"
    for (number,) in connection.execute(query).fetchall():
        item, vector = connection.execute(
            "SELECT item_id, vector FROM embedding WHERE id = ?", (number,)
        ).fetchone()
        values = (of_vector(vector, item), number)
        connection.execute("UPDATE embedding SET checksum = ? WHERE id = ?", values)
    for statement in _AFTER:
        connection.execute(statement)


_BEFORE = (
    "ALTER TABLE space RENAME COLUMN active TO state",
    "ALTER TABLE space ADD COLUMN dim INTEGER NOT NULL DEFAULT 0",
    """CREATE TABLE tower (
        space_id INTEGER NOT NULL REFERENCES space (id),
        key VARCHAR NOT NULL,
        modality VARCHAR NOT NULL,
        identity VARCHAR NOT NULL,
        spec VARCHAR NOT NULL,
        precision VARCHAR NOT NULL,
        state INTEGER NOT NULL,
        PRIMARY KEY (space_id, key))""",
    """CREATE TABLE segment (
        id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        media_id INTEGER NOT NULL REFERENCES media (id),
        modality VARCHAR NOT NULL,
        start_ms INTEGER,
        end_ms INTEGER)""",
    "INSERT INTO segment (id, media_id, modality) SELECT id, id, 'image' FROM media",
    "CREATE INDEX ix_segment_media_id ON segment (media_id)",
    "CREATE INDEX ix_segment_part ON segment (media_id) WHERE id != media_id",
    *(
        f"CREATE TABLE {name} ("  # what stands for a score in an index: nothing yet
        "space_id INTEGER NOT NULL REFERENCES space (id), tower VARCHAR NOT NULL, "
        f"query VARCHAR NOT NULL, {own}vectors INTEGER NOT NULL, content BLOB NOT NULL, "
        f"PRIMARY KEY (space_id, tower, query{key}))"
        for name, own, key in (
            ("background", "", ""), ("ceiling", "rank INTEGER NOT NULL, ", ", rank"),
        )
    ),
)  # fmt: skip
_TEXTS = ", ".join(
    f"group_concat(CASE WHEN {condition} THEN text END, char(10))"
    for condition in (
        "source = 'sidecar'", "(source = 'file' OR source GLOB 'file:*')", "source = 'embedded'",
        "source = 'name'", "source GLOB 'model:*'", "source = 'text'",
    )
)  # fmt: skip
_FILL_WORDS = (
    "INSERT INTO words (rowid, sidecar, file, embedded, name, model, read_text) "
    f"SELECT coalesce(segment_id, media_id), {_TEXTS} FROM caption"
)
_KEEP_LETTERS = """INSERT INTO read_text (rowid, text)
            SELECT NEW.id, NEW.text WHERE NEW.source = 'text';"""
_AFTER = (
    "ALTER TABLE space DROP COLUMN spec",
    "ALTER TABLE space DROP COLUMN precision",
    "ALTER TABLE media ADD COLUMN kind VARCHAR DEFAULT 'image'",
    "ALTER TABLE media ADD COLUMN duration_ms INTEGER",
    "ALTER TABLE media ADD COLUMN latitude FLOAT",
    "ALTER TABLE media ADD COLUMN longitude FLOAT",
    "ALTER TABLE caption ADD COLUMN segment_id INTEGER",
    "ALTER TABLE caption ADD COLUMN model VARCHAR",
    "ALTER TABLE caption ADD COLUMN language VARCHAR",
    "ALTER TABLE caption ADD COLUMN confidence FLOAT",
    "DROP TRIGGER words_after_insert",
    "DROP TRIGGER words_after_delete",
    "DROP TRIGGER look_before_delete",
    "DROP TABLE words",
    "DROP INDEX ix_embedding_unsummed",
    "ALTER TABLE embedding RENAME COLUMN modality TO tower",
    "ALTER TABLE tombstone RENAME COLUMN modality TO tower",
    "ALTER TABLE snapshot RENAME COLUMN modality TO tower",
    "ALTER TABLE snapshot RENAME COLUMN cells TO ivf",
    "ALTER TABLE look RENAME TO patch_embedding",
    # Where a program before format 4 wrote them: the next writer makes others.
    "DELETE FROM snapshot WHERE checksum IS NULL",
    """CREATE VIRTUAL TABLE words USING fts5(
        sidecar, file, embedded, name, model, read_text,
        tokenize = 'porter unicode61 remove_diacritics 2')""",
    "CREATE VIRTUAL TABLE read_text USING fts5(text, tokenize = 'trigram')",
    f"{_FILL_WORDS} GROUP BY coalesce(segment_id, media_id)",
    *(
        f"""CREATE TRIGGER caption_after_{event} AFTER {event.upper()} ON caption BEGIN
        DELETE FROM words WHERE rowid = coalesce({row}.segment_id, {row}.media_id);
        {_FILL_WORDS} WHERE media_id = {row}.media_id
            AND coalesce(segment_id, media_id) = coalesce({row}.segment_id, {row}.media_id)
            GROUP BY coalesce(segment_id, media_id);
        {letters}
    END"""
        for event, row, letters in (
            ("insert", "NEW", _KEEP_LETTERS),
            ("delete", "OLD", "DELETE FROM read_text WHERE rowid = OLD.id;"),
        )
    ),
    """CREATE TRIGGER media_before_delete BEFORE DELETE ON media BEGIN
        DELETE FROM patch_embedding WHERE media_id = OLD.id;
        DELETE FROM segment WHERE media_id = OLD.id;
    END""",
)  # fmt: skip

#: The first format that is brought up to date, and the step from each one to the next.
OLDEST = 4
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_towers_and_segments,)
FORMAT_VERSION = OLDEST + len(MIGRATIONS)


def format_version(connection: sqlite3.Connection) -> int:
    """The version a catalog says it has.

    Raises:
        FormatError: the file is not a catalog of mmsearch, or its format is too old or too new.
    """
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise FormatError("catalog.sqlite3 is not a catalog of mmsearch; name another folder")
    if version < 1:
        raise DamageError.of_catalog("it has no format")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"the index has format {version}, this program knows up to {FORMAT_VERSION}; "
            "update mmsearch",
            is_ours=True,
        )
    if version < OLDEST:
        raise FormatError(
            f"the index has format {version}, which this program no longer reads (it reads from "
            f"{OLDEST} on): index the folders again into a new index, with --index DIR",
            is_ours=True,
        )
    return int(version)


@contextmanager
def begun(connection: sqlite3.Connection, how: str) -> Iterator[None]:
    """A transaction; committed at the end, rolled back on an error."""
    connection.execute(how)
    try:
        yield
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def migrate(
    connection: sqlite3.Connection,
    steps: Sequence[Callable[[sqlite3.Connection], None]] = MIGRATIONS,
) -> None:
    """Takes the missing steps, each in a transaction of its own.

    Args:
        steps: one for each format since `OLDEST`, to the next.
    """
    while True:
        with begun(connection, "BEGIN IMMEDIATE"):
            number = format_version(connection)
            if number == FORMAT_VERSION:
                return
            steps[number - OLDEST](connection)
            connection.execute(f"PRAGMA user_version = {number + 1}")

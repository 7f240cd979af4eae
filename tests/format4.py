"""Catalogs of format 4, made of newer ones: indexes as people have them."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from mmsearch.store.migrations import APPLICATION_ID

_TABLES = """
CREATE TABLE revision (number INTEGER NOT NULL);
CREATE TABLE space (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, identity VARCHAR NOT NULL UNIQUE,
    spec VARCHAR NOT NULL, active INTEGER NOT NULL, precision VARCHAR NOT NULL);
CREATE TABLE root (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, path BLOB NOT NULL UNIQUE,
    walked INTEGER NOT NULL, exclude VARCHAR NOT NULL);
CREATE TABLE media (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    root_id INTEGER NOT NULL REFERENCES root (id), path BLOB NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, content_hash BLOB NOT NULL, width INTEGER NOT NULL,
    height INTEGER NOT NULL, captured VARCHAR NOT NULL, captured_from VARCHAR NOT NULL,
    sidecar_size INTEGER, sidecar_mtime_ns INTEGER, UNIQUE (root_id, path));
CREATE INDEX ix_media_content_hash ON media (content_hash);
CREATE INDEX ix_media_captured ON media (captured);
CREATE TABLE caption (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    media_id INTEGER NOT NULL REFERENCES media (id), text VARCHAR NOT NULL,
    source VARCHAR NOT NULL);
CREATE INDEX ix_caption_media_id ON caption (media_id);
CREATE TABLE embedding (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    space_id INTEGER NOT NULL REFERENCES space (id), modality VARCHAR NOT NULL,
    item_id INTEGER NOT NULL, vector BLOB NOT NULL, UNIQUE (space_id, modality, item_id));
CREATE INDEX ix_embedding_order ON embedding (space_id, modality, id);
CREATE TABLE tombstone (
    space_id INTEGER NOT NULL REFERENCES space (id), modality VARCHAR NOT NULL,
    item_id INTEGER NOT NULL, PRIMARY KEY (space_id, modality, item_id));
CREATE TABLE snapshot (
    space_id INTEGER NOT NULL REFERENCES space (id), modality VARCHAR NOT NULL,
    generation INTEGER NOT NULL, file VARCHAR NOT NULL, vectors INTEGER NOT NULL,
    last_embedding_id INTEGER NOT NULL, PRIMARY KEY (space_id, modality));
CREATE TABLE failure (
    root_id INTEGER NOT NULL REFERENCES root (id), path BLOB NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, reason VARCHAR NOT NULL, failed_at VARCHAR NOT NULL,
    PRIMARY KEY (root_id, path));
CREATE VIRTUAL TABLE words USING fts5(text, tokenize = 'porter unicode61 remove_diacritics 2');
CREATE TRIGGER words_after_insert AFTER INSERT ON caption BEGIN
    DELETE FROM words WHERE rowid = NEW.media_id;
    INSERT INTO words (rowid, text) SELECT media_id, group_concat(text, char(10))
        FROM caption WHERE media_id = NEW.media_id GROUP BY media_id;
END;
CREATE TRIGGER words_after_delete AFTER DELETE ON caption BEGIN
    DELETE FROM words WHERE rowid = OLD.media_id;
    INSERT INTO words (rowid, text) SELECT media_id, group_concat(text, char(10))
        FROM caption WHERE media_id = OLD.media_id GROUP BY media_id;
END;
CREATE TABLE look (
    id INTEGER NOT NULL PRIMARY KEY, space_id INTEGER NOT NULL REFERENCES space (id),
    media_id INTEGER NOT NULL REFERENCES media (id), content BLOB NOT NULL,
    UNIQUE (space_id, media_id));
CREATE INDEX ix_look_media_id ON look (media_id);
CREATE TRIGGER look_before_delete BEFORE DELETE ON media BEGIN
    DELETE FROM look WHERE media_id = OLD.id;
END;
ALTER TABLE embedding ADD COLUMN checksum INTEGER;
ALTER TABLE snapshot ADD COLUMN checksum BLOB;
ALTER TABLE snapshot ADD COLUMN cells BLOB;
CREATE INDEX ix_embedding_unsummed ON embedding (id) WHERE checksum IS NULL;
"""
_MEDIA = (
    "id, root_id, path, size, mtime_ns, content_hash, width, height, captured, captured_from, "
    "sidecar_size, sidecar_mtime_ns"
)
#: What is copied, and from which columns of a newer catalog.
_COPIES = {
    "revision": "number",
    "root": "id, path, walked, exclude",
    "media": _MEDIA,
    "caption": "id, media_id, text, source",
    "embedding": "id, space_id, tower, item_id, vector, checksum",
    "tombstone": "space_id, tower, item_id",
    "snapshot": "space_id, tower, generation, file, vectors, last_embedding_id, checksum, ivf",
    "look": "id, space_id, media_id, content",
    "failure": "root_id, path, size, mtime_ns, reason, failed_at",
}


def make_older(path: Path) -> None:
    """Puts a catalog of format 4 in the place of a newer one, which is closed."""
    draft = path.with_name("older.sqlite3")
    with closing(sqlite3.connect(path)) as new, closing(sqlite3.connect(draft)) as old:
        old.execute("PRAGMA page_size = 16384")
        old.executescript(_TABLES)
        for number, identity, state, dim in new.execute(
            "SELECT id, identity, state, dim FROM space"
        ):
            towers = {
                modality: (json.loads(spec), precision)
                for modality, spec, precision in new.execute(
                    "SELECT modality, spec, precision FROM tower WHERE space_id = ?", (number,)
                )
            }
            spec, precision = towers["image"]
            text = towers["text"][0]["input"]
            stored = {
                "model": spec["model"], "space": identity, "dim": dim, "preprocess": spec["input"],
                "context_length": text["context_length"], "tokenizer": text["tokenizer"],
                "tokenizer_clean": text.get("clean", "lower"), "parameters": spec["parameters"],
                "licence": spec["licence"],
            }  # fmt: skip
            old.execute(
                "INSERT INTO space VALUES (?, ?, ?, ?, ?)",
                (number, identity, json.dumps(stored), state, precision),
            )
        for table, columns in _COPIES.items():
            source = "patch_embedding" if table == "look" else table
            rows = new.execute(f"SELECT {columns} FROM {source}").fetchall()
            marks = ", ".join("?" * len(columns.split(", ")))
            old.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
        for name, used in new.execute("SELECT name, seq FROM sqlite_sequence").fetchall():
            old.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = ?", (used, name))
        old.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        old.execute("PRAGMA user_version = 4")
        old.commit()
        old.execute("PRAGMA journal_mode = WAL")
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    os.replace(draft, path)

"""The catalog's tables in the newest format.

Ids are never used twice (AUTOINCREMENT): a changed file gets a new id, and whoever kept the old
one finds nothing rather than something else.
"""

from __future__ import annotations

import sqlite3

from sqlalchemy import (
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateIndex, CreateTable, ExecutableDDLElement

from mmsearch.store.triggers import TRIGGERS, WORDS

metadata = MetaData()

#: One row: counts the committed changes, so that a reader knows when to look again.
revision = Table("revision", metadata, Column("number", Integer, nullable=False))

#: `state`: 1, searches use it; 0, it is embedded to take that one's place; -1, it is being deleted.
space = Table(
    "space",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("identity", String, nullable=False, unique=True),
    Column("state", Integer, nullable=False),
    Column("dim", Integer, nullable=False, server_default="0"),
    sqlite_autoincrement=True,
)

#: What gives the vectors of one modality in a space. A retrained one is another tower:
#: its `state` is 0 until it has given all its vectors.
tower = Table(
    "tower",
    metadata,
    Column("space_id", ForeignKey("space.id"), primary_key=True),
    Column("key", String, primary_key=True),
    Column("modality", String, nullable=False),
    Column("identity", String, nullable=False),  # a hash, as that of a space
    Column("spec", String, nullable=False),  # EncoderSpec.tower as JSON
    Column("precision", String, nullable=False),
    Column("state", Integer, nullable=False),
)

root = Table(
    "root",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("path", LargeBinary, nullable=False, unique=True),  # absolute
    Column("walked", Integer, nullable=False),  # 0: only single files of it were named
    Column("exclude", String, nullable=False),  # a JSON list of globs
    sqlite_autoincrement=True,
)

media = Table(
    "media",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("root_id", ForeignKey("root.id"), nullable=False),
    Column("path", LargeBinary, nullable=False),  # relative to the root
    Column("size", Integer, nullable=False),
    Column("mtime_ns", Integer, nullable=False),
    Column("content_hash", LargeBinary, nullable=False, index=True),
    Column("width", Integer, nullable=False),  # 0 for what has none
    Column("height", Integer, nullable=False),
    Column("captured", String, nullable=False, index=True),  # local time, ISO 8601
    Column("captured_from", String, nullable=False),  # 'exif' or 'mtime'
    Column("sidecar_size", Integer),
    Column("sidecar_mtime_ns", Integer),
    Column("kind", String, server_default="image"),  # the media type
    Column("duration_ms", Integer),
    Column("latitude", Float),
    Column("longitude", Float),
    UniqueConstraint("root_id", "path"),
    sqlite_autoincrement=True,
)

#: What has one vector a tower. The first of a file has the file's own id: a picture is one segment.
segment = Table(
    "segment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("media_id", ForeignKey("media.id"), nullable=False, index=True),
    Column("modality", String, nullable=False),
    Column("start_ms", Integer),  # none: all of the file
    Column("end_ms", Integer),
    Index("ix_segment_part", "media_id", sqlite_where=text("id != media_id")),
    sqlite_autoincrement=True,
)

caption = Table(
    "caption",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("media_id", ForeignKey("media.id"), nullable=False, index=True),
    Column("text", String, nullable=False),
    #: 'sidecar', 'file' or 'file:' and which, 'embedded', 'name', 'model:' and which, 'text'
    Column("source", String, nullable=False),
    Column("segment_id", Integer),  # the part of the file that it is about; none for all of it
    Column("model", String),  # what wrote it
    Column("language", String),  # BCP 47
    Column("confidence", Float),  # 0 to 1
    sqlite_autoincrement=True,
)

embedding = Table(
    "embedding",
    metadata,
    Column("id", Integer, primary_key=True),  # the order of writing: a snapshot ends at one
    Column("space_id", ForeignKey("space.id"), nullable=False),
    Column("tower", String, nullable=False),  # its key
    Column("item_id", Integer, nullable=False),  # segment.id, or caption.id for texts
    Column("vector", LargeBinary, nullable=False),  # little-endian float32, of length 1
    Column("checksum", Integer),  # store/checksum.py
    UniqueConstraint("space_id", "tower", "item_id"),
    Index("ix_embedding_order", "space_id", "tower", "id"),
    sqlite_autoincrement=True,
)

#: Patch embeddings of pictures, which re-ranking reads (store/patches.py); a trigger on `media`
#: removes them with their picture.
patch_embedding = Table(
    "patch_embedding",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("space_id", ForeignKey("space.id"), nullable=False),
    Column("media_id", ForeignKey("media.id"), nullable=False),
    Column("content", LargeBinary, nullable=False),
    UniqueConstraint("space_id", "media_id"),
    Index("ix_look_media_id", "media_id"),
)

#: How a bank of queries scores the vectors of a tower: what a score is compared with.
background = Table(
    "background",
    metadata,
    Column("space_id", ForeignKey("space.id"), primary_key=True),
    Column("tower", String, primary_key=True),
    Column("query", String, primary_key=True),  # the modality of the queries
    Column("vectors", Integer, nullable=False),  # how many there were
    Column("content", LargeBinary, nullable=False),  # little-endian float32
)

#: The best scores that a bank of queries gets at some rank, in order: chance gets as far.
ceiling = Table(
    "ceiling",
    metadata,
    Column("space_id", ForeignKey("space.id"), primary_key=True),
    Column("tower", String, primary_key=True),
    Column("query", String, primary_key=True),
    Column("rank", Integer, primary_key=True),
    Column("vectors", Integer, nullable=False),
    Column("content", LargeBinary, nullable=False),  # little-endian float32
)

#: Items removed since the snapshot was written; searches leave them out.
tombstone = Table(
    "tombstone",
    metadata,
    Column("space_id", ForeignKey("space.id"), primary_key=True),
    Column("tower", String, primary_key=True),
    Column("item_id", Integer, primary_key=True),
)

#: The vector file that holds the embeddings up to and including `last_embedding_id`.
snapshot = Table(
    "snapshot",
    metadata,
    Column("space_id", ForeignKey("space.id"), primary_key=True),
    Column("tower", String, primary_key=True),
    Column("generation", Integer, nullable=False),
    Column("file", String, nullable=False),
    Column("vectors", Integer, nullable=False),
    Column("last_embedding_id", Integer, nullable=False),
    Column("checksum", LargeBinary),  # of the file
    Column("ivf", LargeBinary),  # of the file of inverted lists over it, once that is made
)

#: Files that could not be used, retried only when size or time change.
failure = Table(
    "failure",
    metadata,
    Column("root_id", ForeignKey("root.id"), primary_key=True),
    Column("path", LargeBinary, primary_key=True),
    Column("size", Integer, nullable=False),
    Column("mtime_ns", Integer, nullable=False),
    Column("reason", String, nullable=False),
    Column("failed_at", String, nullable=False),
)


def create(connection: sqlite3.Connection) -> None:
    """Makes all tables in an empty database, within a transaction of the caller's."""
    for table in metadata.sorted_tables:
        statements: list[ExecutableDDLElement] = [CreateTable(table)]
        statements += map(CreateIndex, table.indexes)
        for made in statements:
            connection.execute(str(made.compile(dialect=sqlite.dialect())))
    for statement in (*WORDS, *TRIGGERS):
        connection.execute(statement)
    connection.execute("INSERT INTO revision VALUES (0)")

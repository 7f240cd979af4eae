"""The catalog's tables, as the newest migration leaves them.

Ids are never used twice (AUTOINCREMENT): a changed file gets a new id, and whoever kept the old
one finds nothing rather than something else.
"""

from __future__ import annotations

from sqlalchemy import (
    Column,
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

metadata = MetaData()

#: One row: counts the committed changes, so that a reader knows when to look again.
revision = Table("revision", metadata, Column("number", Integer, nullable=False))

space = Table(
    "space",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("identity", String, nullable=False, unique=True),
    Column("spec", String, nullable=False),  # EncoderSpec as JSON
    Column("active", Integer, nullable=False),
    Column("precision", String, nullable=False),
    sqlite_autoincrement=True,
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
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("captured", String, nullable=False, index=True),  # local time, ISO 8601
    Column("captured_from", String, nullable=False),  # 'exif' or 'mtime'
    Column("sidecar_size", Integer),
    Column("sidecar_mtime_ns", Integer),
    UniqueConstraint("root_id", "path"),
    sqlite_autoincrement=True,
)

caption = Table(
    "caption",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("media_id", ForeignKey("media.id"), nullable=False, index=True),
    Column("text", String, nullable=False),
    Column("source", String, nullable=False),  # 'sidecar', 'file', 'file:' and which file
    sqlite_autoincrement=True,
)

embedding = Table(
    "embedding",
    metadata,
    Column("id", Integer, primary_key=True),  # the order of writing: a snapshot ends at one
    Column("space_id", ForeignKey("space.id"), nullable=False),
    Column("modality", String, nullable=False),  # 'image' or 'caption'
    Column("item_id", Integer, nullable=False),  # media.id or caption.id
    Column("vector", LargeBinary, nullable=False),  # little-endian float32, of length 1
    Column("checksum", Integer),  # store/checksum.py; none where an older program wrote it
    UniqueConstraint("space_id", "modality", "item_id"),
    Index("ix_embedding_order", "space_id", "modality", "id"),
    Index("ix_embedding_unsummed", "id", sqlite_where=text("checksum IS NULL")),
    sqlite_autoincrement=True,
)

#: Second looks at pictures, which re-ranking reads (store/patches.py); a trigger on `media` removes
#: them with their picture.
look = Table(
    "look",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("space_id", ForeignKey("space.id"), nullable=False),
    Column("media_id", ForeignKey("media.id"), nullable=False, index=True),
    Column("content", LargeBinary, nullable=False),
    UniqueConstraint("space_id", "media_id"),
)

#: Items removed since the snapshot was written; searches leave them out.
tombstone = Table(
    "tombstone",
    metadata,
    Column("space_id", ForeignKey("space.id"), primary_key=True),
    Column("modality", String, primary_key=True),
    Column("item_id", Integer, primary_key=True),
)

#: The vector file that holds the embeddings up to and including `last_embedding_id`.
snapshot = Table(
    "snapshot",
    metadata,
    Column("space_id", ForeignKey("space.id"), primary_key=True),
    Column("modality", String, primary_key=True),
    Column("generation", Integer, nullable=False),
    Column("file", String, nullable=False),
    Column("vectors", Integer, nullable=False),
    Column("last_embedding_id", Integer, nullable=False),
    Column("checksum", LargeBinary),  # of the file
    Column("cells", LargeBinary),  # of the file of cells over it, once that is made
)

#: The ledger: files that could not be used, retried only when size or time change.
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

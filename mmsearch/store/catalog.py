"""The SQLite catalog: connections, transactions and everything that is read from it.

All that is SQLite's own (pragmas, transaction modes, byte ranges) stays in this module, in
migrations.py and in changes.py.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Row,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.exc import DatabaseError, OperationalError

from mmsearch.errors import DamageError, FormatError, IndexInUse, StoreError, UnreadableError
from mmsearch.store import schema
from mmsearch.store.files import draft_of, sync_file, sync_folder
from mmsearch.store.migrations import APPLICATION_ID, FORMAT_VERSION, format_version, migrate
from mmsearch.store.paths import join, to_path
from mmsearch.types import EncoderSpec, Failure, Ids, Modality, Vectors

FILE_NAME = "catalog.sqlite3"
_BUSY_SECONDS = 10.0
_CHUNK = 500  # ids in one IN (...)
_QUERY_WORDS = 64
#: They stand in most captions, so they cost much and tell nothing.
_FUNCTION_WORDS = frozenset(
    """a an and are as at be by for from has have her his in into is it its of on or that the their
    there they this to up was were while who with""".split()  # noqa: SIM905 - to be read as words
)


@dataclass(frozen=True)
class SpaceRow:
    """An embedding space of the index, with the catalog's own number for it."""

    id: int
    spec: EncoderSpec
    precision: str
    """What its vectors were computed in; "mixed" where that changed."""


@dataclass(frozen=True)
class RootRow:
    """A folder whose files are indexed. `walked` is false where only files were named."""

    id: int
    path: bytes
    walked: bool
    exclude: tuple[str, ...]


@dataclass(frozen=True)
class SnapshotRow:
    """The vector file that stands for the embeddings up to `last_embedding_id`."""

    generation: int
    file: str
    vectors: int
    last_embedding_id: int


@dataclass(frozen=True)
class MediaFacts:
    """What a file says of itself: pixels as shown, and when it was taken by EXIF or mtime."""

    width: int
    height: int
    captured: str
    captured_from: str


@dataclass(frozen=True)
class Item:
    """What a hit shows: a media file, and the caption where that was found."""

    media_id: int
    path: bytes
    caption: str | None


class Catalog:
    """An open catalog. Connections are pooled; threads may share one catalog."""

    def __init__(self, path: Path) -> None:
        """Opens an existing catalog and brings it to the newest format.

        Raises:
            FormatError: another program's file, or a newer format.
            UnreadableError: the file cannot be opened.
        """
        self.path = path
        self._engine = _engine(path)
        with self.read() as connection:
            version = format_version(connection)
        if version < FORMAT_VERSION:
            migrate(self.write)

    @classmethod
    def create(cls, path: Path) -> Catalog:
        """Makes an empty catalog: it appears whole under its name, or not at all."""
        draft = draft_of(path)
        for leftover in (draft, *_companions(draft)):
            leftover.unlink(missing_ok=True)
        engine = _engine(draft)
        try:
            with engine.connect() as connection:
                raw = _raw(connection)
                raw.execute("PRAGMA page_size = 16384")  # ignored once the file is in WAL mode
                raw.execute("PRAGMA journal_mode = WAL")
                raw.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            migrate(lambda: _transaction(engine, immediate=True))
        finally:
            engine.dispose()  # the last connection folds the log into the file
        sync_file(draft)
        os.replace(draft, path)
        sync_folder(path.parent)
        return cls(path)

    def close(self) -> None:
        self._engine.dispose()

    def copy(self, to: Catalog) -> None:
        """Copies everything, as of now, over another catalog; writers are not held up."""
        with self._engine.connect() as source, to._engine.connect() as target:
            _raw(source).backup(_raw(target))

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the catalog from its first query to its end."""
        with _transaction(self._engine, immediate=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that alone may write; committed at the end, rolled back on an error."""
        with _transaction(self._engine, immediate=True) as connection:
            yield connection


def _raw(connection: Connection) -> sqlite3.Connection:
    found = connection.connection.dbapi_connection
    assert isinstance(found, sqlite3.Connection)
    return found


def _companions(path: Path) -> tuple[Path, ...]:
    return tuple(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))


def _engine(path: Path) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"timeout": _BUSY_SECONDS},
        max_overflow=-1,  # as many threads may search as there are
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # transactions are opened below, DDL included
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("mmsearch_immediate")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


@contextmanager
def _transaction(engine: Engine, *, immediate: bool) -> Iterator[Connection]:
    try:
        with engine.connect() as opened:
            connection = opened.execution_options(mmsearch_immediate=immediate)
            with connection.begin():
                yield connection
    except DatabaseError as error:
        raise _explained(error, Path(str(engine.url.database))) from error


def _explained(error: DatabaseError, path: Path) -> StoreError | DamageError:
    reason = str(error.orig)
    if isinstance(error, OperationalError):
        if "locked" in reason:
            return IndexInUse(f"{path.parent}: the index is in use by another process; try again")
        return UnreadableError(f"{path}: the catalog cannot be used: {reason}")
    if "not a database" in reason:
        return FormatError(f"{path} is not a catalog of mmsearch; name another folder")
    return DamageError(f"{path}: the catalog is damaged: {reason}")


# -- reading: each takes the connection of one transaction -------------------------------------


def revision_of(connection: Connection) -> int:
    return int(connection.execute(select(schema.revision.c.number)).scalar_one())


def active_space(connection: Connection) -> SpaceRow | None:
    """The space that searches use; None in an index that nothing was added to yet."""
    row = connection.execute(select(schema.space).where(schema.space.c.active == 1)).first()
    if row is None:
        return None
    return SpaceRow(row.id, EncoderSpec.from_json(json.loads(row.spec)), row.precision)


def roots(connection: Connection) -> list[RootRow]:
    query = select(schema.root).order_by(schema.root.c.path)
    return [
        RootRow(row.id, row.path, bool(row.walked), tuple(json.loads(row.exclude)))
        for row in connection.execute(query)
    ]


def under(column: ColumnElement[bytes], prefix: bytes) -> ColumnElement[bool]:
    """The condition that a relative path is `prefix` or lies below it; "" is everything."""
    if not prefix:
        return column.is_not(None)
    # All that starts with "prefix/" sorts before "prefix0": "0" follows "/".
    return (column == prefix) | ((column >= prefix + b"/") & (column < prefix + b"0"))


def media_under(connection: Connection, root_id: int, prefix: bytes) -> list[Row[Any]]:
    query = select(schema.media).where(
        schema.media.c.root_id == root_id, under(schema.media.c.path, prefix)
    )
    return list(connection.execute(query))


def media_with_hashes(connection: Connection, hashes: Sequence[bytes]) -> list[Row[Any]]:
    found: list[Row[Any]] = []
    for chunk in chunks(list(hashes)):
        query = select(schema.media).where(schema.media.c.content_hash.in_(chunk))
        found.extend(connection.execute(query.order_by(schema.media.c.id)))
    return found


def captions_of(connection: Connection, media_ids: Sequence[int]) -> dict[int, list[Row[Any]]]:
    """The captions of some media, in the order in which they were added."""
    found: dict[int, list[Row[Any]]] = {}
    for chunk in chunks(list(media_ids)):
        query = select(schema.caption).where(schema.caption.c.media_id.in_(chunk))
        for row in connection.execute(query.order_by(schema.caption.c.id)):
            found.setdefault(row.media_id, []).append(row)
    return found


def has_captions(connection: Connection, least: int) -> bool:
    """Whether there are so many captions, without counting all of them."""
    return len(connection.execute(select(schema.caption.c.id).limit(least)).all()) >= least


def caption_owners(
    connection: Connection, *, captions: Sequence[int] = (), media: Sequence[int] = ()
) -> dict[int, int]:
    """The media of captions, by the captions' ids: of those named, and of those of named media."""
    table = schema.caption.c
    found: dict[int, int] = {}
    for column, ids in ((table.id, captions), (table.media_id, media)):
        for chunk in chunks([int(number) for number in ids]):
            query = select(table.id, table.media_id).where(column.in_(chunk))
            found.update((row.id, row.media_id) for row in connection.execute(query))
    return found


def media_with_words(
    connection: Connection, text: str, limit: int, among: Iterable[int] | None = None
) -> dict[int, float]:
    """The media whose captions hold a word of a text, with their BM25 scores, the best first.

    Words count by their stems, as English has them; a picture's captions are one document
    (Robertson and Zaragoza 2009, with FTS5's k1 = 1.2 and b = 0.75).

    Args:
        limit: how many at most.
        among: only these media; None is all of them. Their scores are the same either way.
    """
    expression = _any_word_of(text)
    if not expression:
        return {}
    # FTS5's bm25() is less than zero, the smaller the better.
    query = "SELECT rowid, -bm25(words) FROM words WHERE words MATCH ?"
    values: tuple[Any, ...] = (expression,)
    if among is not None:
        # "+", or FTS5 would search once for every one of them.
        query += " AND +rowid IN (SELECT value FROM json_each(?))"
        values += (json.dumps([int(number) for number in among]),)
    rows = connection.exec_driver_sql(f"{query} ORDER BY rank LIMIT ?", (*values, limit)).all()
    return {row[0]: row[1] for row in rows}


def _any_word_of(text: str) -> str:
    """An FTS5 expression for documents with any of a text's words, but for function words."""
    whole = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode("utf-8"))
    found = list(dict.fromkeys(re.findall(r"\w+", whole)))
    telling = [word for word in found if word.lower() not in _FUNCTION_WORDS] or found
    return " OR ".join(f'"{word}"' for word in telling[:_QUERY_WORDS])


def failures_under(connection: Connection, root_id: int, prefix: bytes) -> list[Row[Any]]:
    query = select(schema.failure).where(
        schema.failure.c.root_id == root_id, under(schema.failure.c.path, prefix)
    )
    return list(connection.execute(query))


def failures(connection: Connection) -> list[Failure]:
    query = (
        select(schema.failure, schema.root.c.path.label("root"))
        .join(schema.root, schema.root.c.id == schema.failure.c.root_id)
        .order_by(schema.root.c.path, schema.failure.c.path)
    )
    return [
        Failure(to_path(join(row.root, row.path)), row.reason, row.failed_at)
        for row in connection.execute(query)
    ]


def count(connection: Connection, table: str) -> int:
    return int(
        connection.execute(select(func.count()).select_from(schema.metadata.tables[table])).scalar()
        or 0
    )


def items(connection: Connection, modality: Modality, ids: Sequence[int]) -> dict[int, Item]:
    """What hits show, by the id of the media or of the caption."""
    found: dict[int, Item] = {}
    media, root, caption = schema.media, schema.root, schema.caption
    for chunk in chunks([int(number) for number in ids]):
        if modality == "image":
            query = (
                select(media.c.id, media.c.id, root.c.path, media.c.path)
                .join(root, root.c.id == media.c.root_id)
                .where(media.c.id.in_(chunk))
            )
            for item_id, media_id, top, path in connection.execute(query):
                found[item_id] = Item(media_id, join(top, path), None)
        else:
            texts = (
                select(caption.c.id, media.c.id, root.c.path, media.c.path, caption.c.text)
                .join(media, media.c.id == caption.c.media_id)
                .join(root, root.c.id == media.c.root_id)
                .where(caption.c.id.in_(chunk))
            )
            for item_id, media_id, top, path, text in connection.execute(texts):
                found[item_id] = Item(media_id, join(top, path), text)
    return found


def facts_of(connection: Connection) -> dict[int, MediaFacts]:
    """The facts of all media, by id."""
    table = schema.media.c
    query = select(table.id, table.width, table.height, table.captured, table.captured_from)
    return {number: MediaFacts(*facts) for number, *facts in connection.execute(query)}


def caption_sources(connection: Connection) -> dict[int, str]:
    """Where each caption came from, by its id."""
    query = select(schema.caption.c.id, schema.caption.c.source)
    return {row.id: row.source for row in connection.execute(query)}


def looks_of(connection: Connection, space: SpaceRow, ids: Sequence[int]) -> dict[int, bytes]:
    """The second looks at some media, by id, as `store.patches` packs them."""
    table = schema.look.c
    found: dict[int, bytes] = {}
    for chunk in chunks([int(number) for number in ids]):
        query = select(table.media_id, table.content).where(
            table.media_id.in_(chunk), table.space_id == space.id
        )
        found.update((row.media_id, row.content) for row in connection.execute(query))
    return found


def without_look(connection: Connection, space: SpaceRow) -> list[tuple[int, bytes, bytes]]:
    """Id, absolute path and content hash of the media without a second look, by id."""
    media, root, look = schema.media, schema.root, schema.look
    query = (
        select(media.c.id, root.c.path, media.c.path, media.c.content_hash)
        .join(root, root.c.id == media.c.root_id)
        .join(look, (look.c.media_id == media.c.id) & (look.c.space_id == space.id), isouter=True)
        .where(look.c.media_id.is_(None))
        .order_by(media.c.id)
    )
    return [(n, join(top, path), digest) for n, top, path, digest in connection.execute(query)]


def has_media(connection: Connection) -> bool:
    return connection.execute(select(schema.media.c.id).limit(1)).first() is not None


def has_looks(connection: Connection) -> bool:
    return connection.execute(select(schema.look.c.media_id).limit(1)).first() is not None


def snapshot_of(connection: Connection, space_id: int, modality: Modality) -> SnapshotRow | None:
    row = connection.execute(
        select(schema.snapshot).where(
            schema.snapshot.c.space_id == space_id, schema.snapshot.c.modality == modality
        )
    ).first()
    return (
        SnapshotRow(row.generation, row.file, row.vectors, row.last_embedding_id) if row else None
    )


def embeddings_after(
    connection: Connection, space: SpaceRow, modality: Modality, after: int, batch: int = 8192
) -> Iterator[tuple[int, Ids, Vectors]]:
    """Embeddings written after a given one, in batches: (the last one's id, item ids, vectors)."""
    table = schema.embedding
    query = (
        select(table.c.id, table.c.item_id, table.c.vector)
        .where(
            table.c.space_id == space.id, table.c.modality == modality, table.c.id > after
        )
        .order_by(table.c.id)
    )  # fmt: skip
    result = connection.execution_options(yield_per=batch).execute(query)
    for rows in result.partitions():
        ids = np.fromiter((row.item_id for row in rows), dtype=np.int64, count=len(rows))
        yield rows[-1].id, ids, vectors_from(b"".join(row.vector for row in rows), space.spec.dim)


def vectors_of(
    connection: Connection, space: SpaceRow, modality: Modality, ids: Sequence[int]
) -> dict[int, bytes]:
    """The stored vectors of some items, as bytes."""
    table = schema.embedding
    found: dict[int, bytes] = {}
    for chunk in chunks([int(number) for number in ids]):
        query = select(table.c.item_id, table.c.vector).where(
            table.c.space_id == space.id,
            table.c.modality == modality,
            table.c.item_id.in_(chunk),
        )
        found.update((row.item_id, row.vector) for row in connection.execute(query))
    return found


def tombstones(connection: Connection, space_id: int, modality: Modality) -> Ids:
    query = select(schema.tombstone.c.item_id).where(
        schema.tombstone.c.space_id == space_id, schema.tombstone.c.modality == modality
    )
    return np.fromiter(connection.execute(query).scalars(), dtype=np.int64)


def count_after(connection: Connection, space_id: int, modality: Modality, after: int) -> int:
    """How many embeddings were written after a given one."""
    table = schema.embedding
    query = select(func.count()).where(
        table.c.space_id == space_id, table.c.modality == modality, table.c.id > after
    )
    return int(connection.execute(query).scalar() or 0)


def vectors_from(content: bytes, dim: int) -> Vectors:
    return np.frombuffer(content, dtype="<f4").reshape(-1, dim)


def chunks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The values in portions that one IN (...) can take."""
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]

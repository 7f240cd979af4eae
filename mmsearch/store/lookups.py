"""What is read from the catalog: each query takes the connection of one transaction."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import unicodedata
from collections import namedtuple
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from mmsearch.errors import DamageError
from mmsearch.store.checksum import of_vector
from mmsearch.store.paths import join, to_path
from mmsearch.types import EncoderSpec, Failure, Ids, Modality, Vectors

#: What a space is (`space.active`).
ACTIVE, COMING, RETIRED = 1, 0, -1
#: The source of captions that came from a captions file; behind it stands which file it was.
FILE = "file"
_CHUNK = 500  # ids in one IN (...)
_QUERY_WORDS = 64
_SNAPSHOT_NAME = re.compile(r"\d+-(image|caption)-\d+\.faiss")
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
    checksum: bytes | None
    """Of the file; None where an older program wrote it."""
    cells: bytes | None = None
    """The checksum of the file of cells over it; None while there is none."""


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


Row = Any
"""A named tuple with the columns of a query."""


@cache
def _row_type(columns: tuple[str, ...]) -> Any:
    return namedtuple("Row", columns)  # noqa: PYI024 - the columns are not known before


def is_from_file(source: str) -> bool:
    """Whether captions of a source came from a captions file."""
    return source.partition(":")[0] == FILE


@contextmanager
def decoding() -> Iterator[None]:
    """Around code that takes rows apart: what stumbles over one has met a damaged row.

    Raises:
        DamageError: instead of what Python raises.
    """
    try:
        yield
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError) as error:
        raise DamageError.of_catalog(f"a row is not as it was written ({error})") from error


def _id(value: Any) -> int:
    """An id of the catalog's: they count from 1."""
    number = int(value)
    if number < 1:
        raise ValueError(f"{number} is no id")
    return number


def _rows(connection: sqlite3.Connection, query: str, values: Sequence[Any] = ()) -> list[Row]:
    cursor = connection.execute(query, values)
    make = _row_type(tuple(column[0] for column in cursor.description))._make
    return list(map(make, cursor))


def _rows_in(
    connection: sqlite3.Connection, query: str, ids: Iterable[Any], *before: Any
) -> list[Row]:
    """The rows of a query that ends with "IN": for ids of any number, in portions.

    Args:
        before: the values of what stands before the IN.
    """
    found: list[Row] = []
    for chunk in chunks(list(ids)):
        marks = ", ".join("?" * len(chunk))
        found += _rows(connection, f"{query} ({marks})", (*before, *chunk))
    return found


@decoding()
def revision_of(connection: sqlite3.Connection) -> int:
    (number,) = connection.execute("SELECT number FROM revision").fetchone()
    return int(number)


@decoding()
def active_space(connection: sqlite3.Connection) -> SpaceRow | None:
    """The space that searches use; None in an index that nothing was added to yet."""
    found = _spaces(connection, ACTIVE)
    return found[0] if found else None


@decoding()
def coming_space(connection: sqlite3.Connection) -> SpaceRow | None:
    """The space that is embedded beside the active one, to take its place; None for none."""
    found = _spaces(connection, COMING)
    return found[0] if found else None


@decoding()
def retired_spaces(connection: sqlite3.Connection) -> list[SpaceRow]:
    """Spaces that nothing uses any more and whose rows are to be deleted."""
    return _spaces(connection, RETIRED)


def _spaces(connection: sqlite3.Connection, state: int) -> list[SpaceRow]:
    rows = _rows(connection, "SELECT id, spec, precision FROM space WHERE active = ?", (state,))
    try:
        return [
            SpaceRow(row.id, EncoderSpec.from_json(json.loads(row.spec)), row.precision)
            for row in rows
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError.of_catalog(f"the description of its model ({error})") from error


@decoding()
def roots(connection: sqlite3.Connection) -> list[RootRow]:
    rows = connection.execute("SELECT id, path, walked, exclude FROM root ORDER BY path").fetchall()
    if not all(isinstance(path, bytes) for _, path, _, _ in rows):
        raise DamageError.of_catalog("the path of a folder")
    return [
        RootRow(number, path, bool(walked), globs_of(exclude))
        for number, path, walked, exclude in rows
    ]


def globs_of(exclude: str) -> tuple[str, ...]:
    """What a root leaves out, from the catalog's JSON.

    Raises:
        DamageError: it is none.
    """
    try:
        found = json.loads(exclude)
        if not isinstance(found, list) or not all(isinstance(glob, str) for glob in found):
            raise ValueError("no list of texts")
    except (ValueError, TypeError) as error:
        raise DamageError.of_catalog(f"what a folder leaves out ({error})") from error
    return tuple(found)


def under(prefix: bytes) -> tuple[str, tuple[bytes, ...]]:
    """The condition that a relative path is `prefix` or lies below it, and its values."""
    if not prefix:
        return "path IS NOT NULL", ()
    # All that starts with "prefix/" sorts before "prefix0": "0" follows "/". The range is what an
    # index can serve; the rest leaves out what is only spelt alike, as "prefix-1".
    condition = "(path >= ? AND path < ? AND (path = ? OR path >= ?))"
    return condition, (prefix, prefix + b"0", prefix, prefix + b"/")


@decoding()
def media_under(connection: sqlite3.Connection, root_id: int, prefix: bytes) -> list[Row]:
    """What tells whether files changed, of the media at or below a path."""
    condition, values = under(prefix)
    columns = "id, path, size, mtime_ns, content_hash, sidecar_size, sidecar_mtime_ns"
    query = f"SELECT {columns} FROM media WHERE root_id = ? AND {condition}"
    return _rows(connection, query, (root_id, *values))


@decoding()
def folders_of(connection: sqlite3.Connection, root_id: int) -> list[bytes]:
    """The folders that hold media, relative to their root, each after those above it."""
    rows = connection.execute("SELECT path FROM media WHERE root_id = ?", (root_id,))
    return sorted({os.path.dirname(path) for (path,) in rows})


@decoding()
def is_empty(connection: sqlite3.Connection, root: RootRow) -> bool:
    """Whether a root holds neither media nor entries of the ledger."""
    return not any(
        connection.execute(
            f"SELECT 1 FROM {table} WHERE root_id = ? LIMIT 1", (root.id,)
        ).fetchone()
        for table in ("media", "failure")
    )


@decoding()
def has_content(connection: sqlite3.Connection, content_hash: bytes) -> bool:
    query = "SELECT id FROM media WHERE content_hash = ? LIMIT 1"
    return connection.execute(query, (content_hash,)).fetchone() is not None


@decoding()
def embedded_contents(
    connection: sqlite3.Connection, space: SpaceRow, hashes: Iterable[bytes]
) -> dict[bytes, tuple[Row, bytes]]:
    """Of each of some contents that has a vector in a space: a media row, and that vector.

    Of one row, since a content may have any number of copies.

    Raises:
        DamageError: a vector is not what was written.
    """
    query = (
        "SELECT media.*, vector, checksum FROM media CROSS JOIN embedding ON space_id = ? "
        "AND modality = 'image' AND item_id = media.id "
        "WHERE content_hash = ? ORDER BY media.id LIMIT 1"
    )
    found: dict[bytes, tuple[Row, bytes]] = {}
    for one in hashes:
        for row in _rows(connection, query, (space.id, one)):
            if not is_sound(space, row.id, row.vector, row.checksum):
                raise _damaged("image", row.id)
            found[one] = row, row.vector
    return found


@decoding()
def media_with_content(
    connection: sqlite3.Connection, content_hash: bytes
) -> list[tuple[int, int]]:
    """Id and root of the media that have a content, in the order in which they were added."""
    query = "SELECT id, root_id FROM media WHERE content_hash = ? ORDER BY id"
    return connection.execute(query, (content_hash,)).fetchall()


@decoding()
def captions_of(connection: sqlite3.Connection, media_ids: Sequence[int]) -> dict[int, list[Row]]:
    """The captions of some media, in the order in which they were added."""
    rows = _rows_in(connection, "SELECT * FROM caption WHERE media_id IN", media_ids)
    found: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.id):
        found.setdefault(row.media_id, []).append(row)
    return found


@decoding()
def media_with_captions_of(connection: sqlite3.Connection, source: str) -> set[int]:
    """The media that have captions of a source."""
    query = "SELECT DISTINCT media_id FROM caption WHERE source = ?"
    return {number for (number,) in connection.execute(query, (source,))}


@decoding()
def has_captions(connection: sqlite3.Connection, least: int) -> bool:
    """Whether there are so many captions, without counting all of them."""
    return len(connection.execute("SELECT id FROM caption LIMIT ?", (least,)).fetchall()) >= least


@decoding()
def caption_owners(
    connection: sqlite3.Connection, *, captions: Sequence[int] = (), media: Sequence[int] = ()
) -> dict[int, int]:
    """The media of captions, by the captions' ids: of those named, and of those of named media."""
    found: dict[int, int] = {}
    for column, ids in (("id", captions), ("media_id", media)):
        query = f"SELECT id, media_id FROM caption WHERE {column} IN"
        for number, owner in _rows_in(connection, query, map(int, ids)):
            found[_id(number)] = _id(owner)
    return found


@decoding()
def media_with_words(
    connection: sqlite3.Connection, text: str, limit: int, among: Iterable[int] | None = None
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
    rows = connection.execute(f"{query} ORDER BY rank LIMIT ?", (*values, limit))
    return {_id(number): score for number, score in rows}


@decoding()
def remake_words(connection: sqlite3.Connection) -> None:
    """Writes the words of all captions anew."""
    connection.execute("DELETE FROM words")
    connection.execute(
        "INSERT INTO words (rowid, text) "
        "SELECT media_id, group_concat(text, char(10)) FROM caption GROUP BY media_id"
    )


def _any_word_of(text: str) -> str:
    """An FTS5 expression for documents with any of a text's words, but for function words."""
    whole = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode("utf-8"))
    found = list(dict.fromkeys(re.findall(r"\w+", whole)))
    telling = [word for word in found if word.lower() not in _FUNCTION_WORDS] or found
    return " OR ".join(f'"{word}"' for word in telling[:_QUERY_WORDS])


@decoding()
def failures_under(connection: sqlite3.Connection, root_id: int, prefix: bytes) -> list[Row]:
    condition, values = under(prefix)
    query = f"SELECT * FROM failure WHERE root_id = ? AND {condition}"
    return _rows(connection, query, (root_id, *values))


@decoding()
def failures(connection: sqlite3.Connection) -> list[Failure]:
    rows = connection.execute(
        "SELECT root.path, failure.path, reason, failed_at FROM failure "
        "JOIN root ON root.id = failure.root_id ORDER BY root.path, failure.path"
    )
    return [Failure(to_path(join(top, path)), reason, at) for top, path, reason, at in rows]


@decoding()
def count_looks(connection: sqlite3.Connection, space: SpaceRow) -> int:
    query = "SELECT count(*) FROM look WHERE space_id = ?"
    (number,) = connection.execute(query, (space.id,)).fetchone()
    return int(number)


Table = Literal["media", "caption", "failure"]


@decoding()
def count(connection: sqlite3.Connection, table: Table) -> int:
    (number,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(number)


@decoding()
def items(
    connection: sqlite3.Connection, modality: Modality, ids: Sequence[int]
) -> dict[int, Item]:
    """What hits show, by the id of the media or of the caption."""
    of_media = (
        "SELECT media.id, media.id, root.path, media.path, NULL FROM media "
        "JOIN root ON root.id = media.root_id WHERE media.id IN"
    )
    of_captions = (
        "SELECT caption.id, media.id, root.path, media.path, caption.text FROM caption "
        "JOIN media ON media.id = caption.media_id JOIN root ON root.id = media.root_id "
        "WHERE caption.id IN"
    )
    found: dict[int, Item] = {}
    for chunk in chunks([int(number) for number in ids]):
        query = of_media if modality == "image" else of_captions
        rows = connection.execute(f"{query} ({', '.join('?' * len(chunk))})", chunk)
        for item_id, media_id, top, path, text in rows:
            found[_id(item_id)] = Item(_id(media_id), join(top, path), text)
    return found


@decoding()
def facts_of(connection: sqlite3.Connection) -> dict[int, MediaFacts]:
    """The facts of all media, by id."""
    rows = connection.execute("SELECT id, width, height, captured, captured_from FROM media")
    return {number: MediaFacts(*facts) for number, *facts in rows}


@decoding()
def caption_sources(connection: sqlite3.Connection) -> dict[int, str]:
    """Where each caption came from, by its id."""
    return dict(connection.execute("SELECT id, source FROM caption"))


@decoding()
def looks_of(
    connection: sqlite3.Connection, space: SpaceRow, ids: Sequence[int]
) -> dict[int, bytes]:
    """The second looks at some media, by id, as `store.patches` packs them."""
    query = "SELECT media_id, content FROM look WHERE space_id = ? AND media_id IN"
    return dict(_rows_in(connection, query, map(int, ids), space.id))


_WITHOUT_LOOK = (
    "FROM media JOIN root ON root.id = media.root_id "
    "LEFT JOIN look ON look.media_id = media.id AND look.space_id = ? WHERE look.media_id IS NULL"
)


@decoding()
def lacks_looks(connection: sqlite3.Connection, space: SpaceRow) -> bool:
    """Whether there is a media file without a second look."""
    query = f"SELECT 1 {_WITHOUT_LOOK} LIMIT 1"
    return connection.execute(query, (space.id,)).fetchone() is not None


@decoding()
def without_look(connection: sqlite3.Connection, space: SpaceRow) -> list[tuple[int, bytes, bytes]]:
    """Id, absolute path and content hash of the media without a second look, by id."""
    rows = connection.execute(
        f"SELECT media.id, root.path, media.path, content_hash {_WITHOUT_LOOK} ORDER BY media.id",
        (space.id,),
    )
    return [(n, join(top, path), digest) for n, top, path, digest in rows]


@dataclass(frozen=True)
class Lacking:
    """A media file that has no vector in some space yet."""

    id: int
    root_id: int
    path: bytes
    """Relative to the root."""
    size: int
    mtime_ns: int
    content_hash: bytes
    absolute: bytes


_WITHOUT_VECTOR = (
    "LEFT JOIN embedding ON space_id = ? AND modality = ? AND item_id = item.id "
    "WHERE embedding.id IS NULL"
)


@decoding()
def count_without_vector(
    connection: sqlite3.Connection, space: SpaceRow, modality: Modality
) -> int:
    """How many media, or captions, have no vector in a space."""
    table = "media" if modality == "image" else "caption"
    query = f"SELECT count(*) FROM {table} AS item {_WITHOUT_VECTOR}"
    (number,) = connection.execute(query, (space.id, modality)).fetchone()
    return int(number)


@decoding()
def media_without_vector(
    connection: sqlite3.Connection, space: SpaceRow, after: int, limit: int
) -> list[Lacking]:
    """The next media, by id, that have no vector in a space."""
    rows = connection.execute(
        "SELECT item.id, root_id, item.path, size, mtime_ns, content_hash, root.path "
        "FROM media AS item "
        f"JOIN root ON root.id = root_id {_WITHOUT_VECTOR} "
        "AND item.id > ? ORDER BY item.id LIMIT ?",
        (space.id, "image", after, limit),
    )
    return [
        Lacking(number, root_id, path, size, mtime_ns, digest, join(top, path))
        for number, root_id, path, size, mtime_ns, digest, top in rows
    ]


@decoding()
def captions_without_vector(
    connection: sqlite3.Connection, space: SpaceRow, after: int, limit: int
) -> list[tuple[int, str]]:
    """Id and text of the next captions, by id, that have no vector in a space."""
    query = (
        f"SELECT item.id, text FROM caption AS item {_WITHOUT_VECTOR} "
        "AND item.id > ? ORDER BY item.id LIMIT ?"
    )
    return connection.execute(query, (space.id, "caption", after, limit)).fetchall()


@decoding()
def has_media(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT id FROM media LIMIT 1").fetchone() is not None


@decoding()
def has_looks(connection: sqlite3.Connection, space: SpaceRow | None = None) -> bool:
    """Whether there are second looks, in one space or in any."""
    which = ("", ()) if space is None else ("WHERE space_id = ?", (space.id,))
    query = f"SELECT media_id FROM look {which[0]} LIMIT 1"
    return connection.execute(query, which[1]).fetchone() is not None


@decoding()
def some_paths(connection: sqlite3.Connection, count: int) -> list[bytes]:
    """The absolute paths of up to so many media, evenly spaced in the order of their ids."""
    rows = connection.execute("SELECT id FROM media ORDER BY id")
    ids = np.fromiter((number for (number,) in rows), dtype=np.int64)
    places = np.linspace(0, max(0, len(ids) - 1), min(count, len(ids))).astype(np.int64)
    return [item.path for item in items(connection, "image", ids[places].tolist()).values()]


@decoding()
def snapshot_of(
    connection: sqlite3.Connection, space_id: int, modality: Modality
) -> SnapshotRow | None:
    row = connection.execute(
        "SELECT generation, file, vectors, last_embedding_id, checksum, cells FROM snapshot "
        "WHERE space_id = ? AND modality = ?",
        (space_id, modality),
    ).fetchone()
    if row is None:
        return None
    if not is_snapshot_name(row[1]):  # files are deleted by it: it may lead nowhere else
        raise DamageError.of_catalog(f"{row[1]!r} is no name of a vector file")
    return SnapshotRow(*row)


def is_snapshot_name(name: object) -> bool:
    return isinstance(name, str) and _SNAPSHOT_NAME.fullmatch(name) is not None


def embeddings_after(
    connection: sqlite3.Connection,
    space: SpaceRow,
    modality: Modality,
    after: int,
    batch: int = 8192,
) -> Iterator[tuple[int, Ids, Vectors]]:
    """Embeddings written after a given one, in batches: (the last one's id, item ids, vectors).

    Raises:
        DamageError: one is not what was written.
    """
    cursor = connection.execute(
        "SELECT id, item_id, vector, checksum FROM embedding "
        "WHERE space_id = ? AND modality = ? AND id > ? ORDER BY id",
        (space.id, modality, after),
    )
    while rows := cursor.fetchmany(batch):
        with decoding():
            for _, item, vector, checksum in rows:
                if not is_sound(space, item, vector, checksum):
                    raise _damaged(modality, item)
            ids = np.fromiter((row[1] for row in rows), dtype=np.int64, count=len(rows))
            vectors = vectors_from(b"".join(row[2] for row in rows), space.spec.dim)
        yield rows[-1][0], ids, vectors


@decoding()
def some_vectors(
    connection: sqlite3.Connection, space: SpaceRow, modality: Modality, count: int
) -> Vectors:
    """Up to so many vectors, (n, dim), evenly spaced in the order of writing."""
    rows = connection.execute(
        "SELECT id FROM embedding WHERE space_id = ? AND modality = ? ORDER BY id",
        (space.id, modality),
    )
    ids = np.fromiter((number for (number,) in rows), dtype=np.int64)
    places = np.linspace(0, max(0, len(ids) - 1), min(count, len(ids))).astype(np.int64)
    found = _rows_in(connection, "SELECT vector FROM embedding WHERE id IN", ids[places].tolist())
    return vectors_from(b"".join(row.vector for row in found), space.spec.dim)


@decoding()
def vectors_of(
    connection: sqlite3.Connection, space: SpaceRow, modality: Modality, ids: Sequence[int]
) -> dict[int, bytes]:
    """The stored vectors of some items, as bytes.

    Raises:
        DamageError: one is not what was written.
    """
    query = (
        "SELECT item_id, vector, checksum FROM embedding "
        "WHERE space_id = ? AND modality = ? AND item_id IN"
    )
    found: dict[int, bytes] = {}
    for item, vector, checksum in _rows_in(connection, query, map(int, ids), space.id, modality):
        if not is_sound(space, item, vector, checksum):
            raise _damaged(modality, item)
        found[item] = vector
    return found


@decoding()
def without_checksum(
    connection: sqlite3.Connection, after: int, limit: int
) -> list[tuple[int, int, bytes]]:
    """Embeddings that have no checksum yet: id, item and vector."""
    return connection.execute(
        "SELECT id, item_id, vector FROM embedding "
        "WHERE checksum IS NULL AND typeof(vector) = 'blob' AND id > ? ORDER BY id LIMIT ?",
        (after, limit),
    ).fetchall()


def is_sound(space: SpaceRow, item_id: int, vector: bytes, checksum: int | None) -> bool:
    """Whether a vector is what was written; an older program wrote no checksum."""
    whole = isinstance(vector, bytes) and len(vector) == 4 * space.spec.dim
    return whole and (checksum is None or of_vector(vector, item_id) == checksum)


def _damaged(modality: Modality, item_id: int) -> DamageError:
    return DamageError.of_catalog(f"the vector of {modality} {item_id} is not what was written")


@decoding()
def tombstones(connection: sqlite3.Connection, space_id: int, modality: Modality) -> Ids:
    rows = connection.execute(
        "SELECT item_id FROM tombstone WHERE space_id = ? AND modality = ?", (space_id, modality)
    )
    return np.fromiter((item for (item,) in rows), dtype=np.int64)


@decoding()
def count_waiting(
    connection: sqlite3.Connection, space_id: int, modality: Modality, after: int
) -> int:
    """How many embeddings were written after a given one, and how many items were removed."""
    (number,) = connection.execute(
        "SELECT (SELECT count(*) FROM embedding WHERE space_id = ?1 AND modality = ?2 AND id > ?3)"
        " + (SELECT count(*) FROM tombstone WHERE space_id = ?1 AND modality = ?2)",
        (space_id, modality, after),
    ).fetchone()
    return int(number)


def vectors_from(content: bytes, dim: int) -> Vectors:
    return np.frombuffer(content, dtype="<f4").reshape(-1, dim)


def chunks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The values in portions that one IN (...) can take."""
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]

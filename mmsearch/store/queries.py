"""What is read from the catalog, in one transaction."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from mmsearch.errors import DamageError
from mmsearch.store.paths import join, to_path
from mmsearch.store.rows import (
    ACTIVE,
    OBSOLETE,
    PENDING,
    CaptionRecord,
    CaptionRow,
    FailureRow,
    Item,
    MediaRecord,
    MediaRow,
    MissingSegment,
    RootRow,
    SegmentRecord,
    SnapshotRow,
    SpaceRow,
    TowerRow,
    decoding,
    globs_of,
    id_of,
    ids_of,
    is_snapshot_name,
    is_sound,
    moment_of,
    under,
)
from mmsearch.store.vector_index import spread
from mmsearch.types import TEXT, EncoderSpec, Facts, Failure, Ids, Modality, Vectors

_AT_ONCE = 500  # ids in one IN (...)
_QUERY_WORDS = 64
#: They stand in most captions, so they cost much and tell nothing.
_FUNCTION_WORDS = frozenset(
    """a an and are as at be by for from has have her his in into is it its of on or that the their
    there they this to up was were while who with""".split()  # noqa: SIM905 - to be read as words
)
_FACTS = "width, height, captured, duration_ms, latitude, longitude, captured_from, kind"
_CAPTION = "id, media_id, text, source, segment_id, language, confidence"

#: Behind a column: its value is one of a list of numbers in JSON, which is the condition's value.
AMONG = "IN (SELECT value FROM json_each(?))"

Table = Literal["media", "caption", "failure"]
Condition = tuple[str, Sequence[Any]]
"""A condition of SQL, and its values."""


@dataclass(frozen=True)
class Queries:
    """One transaction's view of the catalog: all that it reads is of one moment."""

    connection: sqlite3.Connection
    """That of the transaction."""

    def rows_in(self, query: str, ids: Iterable[int] | Ids, *before: Any) -> list[tuple[Any, ...]]:
        """The rows of a query that ends with a column: those where it is one of some ids.

        Args:
            before: the values of what stands before that.
        """
        wanted = [int(number) for number in ids]
        found: list[tuple[Any, ...]] = []
        for start in range(0, len(wanted), _AT_ONCE):  # for a few, quicker than AMONG
            some = wanted[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(some))
            found += self.cursor(f"{query} IN ({marks})", (*before, *some))
        return found

    def cursor(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """The rows of a query, one at a time."""
        return self.connection.execute(query, values)

    @decoding()
    def number(self, query: str, *values: Any) -> int:
        """The one number that a query gives."""
        (number,) = self.cursor(query, values).fetchone()
        return int(number)

    def _ids(self, query: str, values: Sequence[Any] = ()) -> Ids:
        """The ids that a query gives, (n,)."""
        return np.fromiter((number for (number,) in self.cursor(query, values)), dtype=np.int64)

    def has(self, query: str, *values: Any) -> bool:
        """Whether a query gives any row."""
        return self.cursor(f"{query} LIMIT 1", values).fetchone() is not None

    # -- the index as a whole --------------------------------------------------------------

    def revision(self) -> int:
        """The number of committed changes."""
        return self.number("SELECT number FROM revision")

    def count(self, table: Table) -> int:
        return self.number(f"SELECT count(*) FROM {table}")

    def active_space(self) -> SpaceRow | None:
        """The space that searches use; None in an index that nothing was added to yet."""
        return next(iter(self._spaces(ACTIVE)), None)

    def pending_space(self) -> SpaceRow | None:
        """The space that is embedded beside the active one, to take its place; None for none."""
        return next(iter(self._spaces(PENDING)), None)

    def obsolete_spaces(self) -> list[SpaceRow]:
        """Spaces that nothing uses any more and whose rows are to be deleted."""
        return self._spaces(OBSOLETE)

    def spaces(self) -> list[SpaceRow]:
        """The active and the pending space, those that there are."""
        return [*self._spaces(ACTIVE)[:1], *self._spaces(PENDING)[:1]]

    def towers(self) -> list[TowerRow]:
        """All that give vectors to these spaces."""
        return [tower for space in self.spaces() for tower in space.towers.values()]

    @decoding("the description of its model")
    def _spaces(self, state: int) -> list[SpaceRow]:
        found = []
        query = "SELECT id, identity, dim FROM space WHERE state = ? ORDER BY id"
        for number, identity, dim in self.cursor(query, (state,)).fetchall():
            towers = self.cursor(
                "SELECT key, modality, spec, precision FROM tower WHERE space_id = ? AND state = ? "
                "ORDER BY rowid",
                (number, ACTIVE),
            ).fetchall()
            if not towers or not isinstance(dim, int) or dim < 1:
                raise ValueError("it has none")
            spec = _spec_of(identity, dim, tuple((row[1], row[2]) for row in towers))
            rows = {modality: TowerRow(number, key, modality, dim)
                    for key, modality, _, _ in towers}  # fmt: skip
            found.append(SpaceRow(number, spec, str(towers[0][3]), rows))
        return found

    # -- folders and files -----------------------------------------------------------------

    @decoding()
    def roots(self) -> list[RootRow]:
        rows = self.cursor("SELECT id, path, walked, exclude FROM root ORDER BY path").fetchall()
        if not all(isinstance(path, bytes) for _, path, _, _ in rows):
            raise DamageError.of_catalog("the path of a folder")
        return [
            RootRow(number, path, bool(walked), globs_of(exclude))
            for number, path, walked, exclude in rows
        ]

    @decoding()
    def media_under(self, root_id: int, prefix: bytes) -> list[MediaRow]:
        """What tells whether files changed, of the media at or below a path."""
        condition, values = under(prefix)
        columns = ", ".join(MediaRow._fields)
        query = f"SELECT {columns} FROM media WHERE root_id = ? AND {condition}"
        return list(map(MediaRow._make, self.cursor(query, (root_id, *values))))

    @decoding()
    def folders_of(self, root_id: int) -> list[bytes]:
        """The folders that hold media, relative to their root, each after those above it."""
        rows = self.cursor("SELECT path FROM media WHERE root_id = ?", (root_id,))
        return sorted({os.path.dirname(path) for (path,) in rows})

    def is_empty(self, root: RootRow) -> bool:
        """Whether a root holds neither media nor failures."""
        return not any(
            self.has(f"SELECT 1 FROM {table} WHERE root_id = ?", root.id)
            for table in ("media", "failure")
        )

    def has_media(self) -> bool:
        return self.has("SELECT id FROM media")

    @decoding()
    def records_with(
        self, space: SpaceRow, hashes: Iterable[bytes], is_wanted: Callable[[str], bool]
    ) -> dict[bytes, MediaRecord]:
        """A file of each of some contents whose segments and captions have vectors in a space.

        Args:
            is_wanted: whether captions of a source are.

        Raises:
            DamageError: a vector is not what was written.
        """
        keys = [tower.key for tower in space.towers.values() if tower.modality != TEXT]
        # A file's id is that of its first segment; a content may have any number of copies.
        query = (
            "SELECT media.id, root_id, path, size, mtime_ns FROM media "
            f"CROSS JOIN embedding ON space_id = ? AND tower IN ({', '.join('?' * len(keys))}) "
            "AND item_id = media.id WHERE content_hash = ? ORDER BY media.id LIMIT 1"
        )
        found: dict[bytes, MediaRecord] = {}
        for one in hashes:
            rows = self.cursor(query, (space.id, *keys, one)).fetchall()
            for number, root_id, path, size, mtime_ns in rows:
                try:
                    segments = self._segment_records(space, number)
                    captions = self.caption_records(space, number, is_wanted)
                except LookupError:  # one has no vector yet
                    continue
                facts = self.facts_of([number])[number]
                found[one] = MediaRecord(
                    root_id, path, size, mtime_ns, one, facts, segments, captions
                )
        return found

    def _segment_records(self, space: SpaceRow, media_id: int) -> list[SegmentRecord]:
        query = "SELECT id, modality, start_ms, end_ms FROM segment WHERE media_id = ? ORDER BY id"
        rows = self.cursor(query, (media_id,)).fetchall()
        vectors: dict[int, bytes] = {}
        for tower in space.towers.values():
            own = [number for number, modality, *_ in rows if modality == tower.modality]
            vectors |= self.vectors_of(tower, own) if own else {}
        return [SegmentRecord(modality, vectors[number], *span) for number, modality, *span in rows]

    @decoding()
    def media_with_content(self, content_hash: bytes) -> list[tuple[int, int]]:
        """Id and root of the media that have a content, in the order in which they were added."""
        query = "SELECT id, root_id FROM media WHERE content_hash = ? ORDER BY id"
        return self.cursor(query, (content_hash,)).fetchall()

    @decoding()
    def facts_of(self, ids: Iterable[int]) -> dict[int, Facts]:
        """The facts of some media, by id."""
        query = f"SELECT id, {_FACTS} FROM media WHERE id"
        return {
            number: Facts(width, height, moment_of(captured), *rest)
            for number, width, height, captured, *rest in self.rows_in(query, ids)
        }

    @decoding()
    def some_paths(self, count: int) -> list[bytes]:
        """The absolute paths of up to so many media, evenly spaced in the order of their ids."""
        ids = self._ids("SELECT id FROM media ORDER BY id")
        found = self.rows_in(
            "SELECT root.path, media.path FROM media JOIN root ON root.id = root_id WHERE media.id",
            ids[spread(len(ids), count)],
        )
        return [join(top, path) for top, path in found]

    @decoding()
    def ids_where(self, tower: TowerRow | None, conditions: Sequence[Condition]) -> Ids:
        """The ids of a tower's items whose media meet some conditions, sorted.

        Args:
            tower: None is for the media themselves.
        """
        where = " AND ".join(condition for condition, _ in conditions)
        values = [value for _, own in conditions for value in own]
        query = f"SELECT id FROM media WHERE {where or 'TRUE'}"
        if tower is not None:
            query = (
                f"SELECT id FROM {tower.items} WHERE media_id IN ({query}) "
                f"AND {tower.modality_of_item} = ?"
            )
            values.append(tower.modality)
        return np.sort(self._ids(query, values))

    @decoding()
    def items(self, tower: TowerRow, ids: Sequence[int]) -> dict[int, Item]:
        """What hits show, by the id of the segment or of the caption."""
        of_captions = "item.text, NULL, NULL, 'text'"
        columns = of_captions if tower.modality == TEXT else "NULL, start_ms, end_ms, modality"
        rows = self.rows_in(
            f"SELECT item.id, media.id, root.path, media.path, {columns} "
            f"FROM {tower.items} AS item JOIN media ON media.id = item.media_id "
            "JOIN root ON root.id = media.root_id WHERE item.id",
            ids,
        )
        return {
            id_of(number): Item(id_of(media_id), join(top, path), *rest)
            for number, media_id, top, path, *rest in rows
        }

    # -- failures ----------------------------------------------------------------------------

    @decoding()
    def failures_under(self, root_id: int, prefix: bytes) -> list[FailureRow]:
        condition, values = under(prefix)
        query = f"SELECT path, size, mtime_ns FROM failure WHERE root_id = ? AND {condition}"
        return list(map(FailureRow._make, self.cursor(query, (root_id, *values))))

    @decoding()
    def failures(self) -> list[Failure]:
        rows = self.cursor(
            "SELECT root.path, failure.path, reason, failed_at FROM failure "
            "JOIN root ON root.id = failure.root_id ORDER BY root.path, failure.path"
        )
        return [Failure(to_path(join(top, path)), reason, at) for top, path, reason, at in rows]

    # -- captions and their words ----------------------------------------------------------

    @decoding()
    def captions_of(self, media_ids: Sequence[int]) -> dict[int, list[CaptionRow]]:
        """The captions of some media, in the order in which they were added."""
        rows = self.rows_in(f"SELECT {_CAPTION} FROM caption WHERE media_id", media_ids)
        found: dict[int, list[CaptionRow]] = {}
        for row in sorted(map(CaptionRow._make, rows)):
            found.setdefault(row.media_id, []).append(row)
        return found

    def caption_records(
        self, space: SpaceRow, media_id: int, is_wanted: Callable[[str], bool]
    ) -> list[CaptionRecord]:
        """The captions that a file has of some sources, if all of them have vectors.

        Raises:
            KeyError: one has none.
        """
        found = self.captions_of([media_id]).get(media_id, [])
        rows = [row for row in found if is_wanted(row.source)]
        vectors = self.vectors_of(space.towers[TEXT], [row.id for row in rows]) if rows else {}
        return [
            CaptionRecord(
                row.text, row.source, vectors[row.id],
                # A file's segments have ids one after the other, from its own.
                None if row.segment_id is None else row.segment_id - media_id,
                row.language, row.confidence,
            )
            for row in rows
        ]  # fmt: skip

    @decoding()
    def media_with_captions_of(self, source: str) -> set[int]:
        """The media that have captions of a source."""
        query = "SELECT DISTINCT media_id FROM caption WHERE source = ?"
        return {number for (number,) in self.cursor(query, (source,))}

    @decoding()
    def caption_sources(self) -> dict[int, str]:
        """Where each caption came from, by its id."""
        return dict(self.cursor("SELECT id, source FROM caption"))

    def has_captions(self, least: int) -> bool:
        """Whether there are so many captions, without counting all of them."""
        query = "SELECT count(*) FROM (SELECT id FROM caption LIMIT ?)"
        return self.number(query, least) >= least

    @decoding()
    def owners(
        self, tower: TowerRow, *, items: Ids | None = None, media: Ids | None = None
    ) -> tuple[Ids, Ids]:
        """Some of a tower's items and the media that they belong to, (n,) each, in no order.

        Args:
            items: those of these ids.
            media: those of these media.
        """
        column, ids = ("id", items) if media is None else ("media_id", media)
        query = (
            f"SELECT id AS one, media_id AS other FROM {tower.items} "
            f"WHERE {tower.modality_of_item} = ? AND {column} {AMONG}"
        )
        values = (tower.modality, json.dumps(np.asarray(ids).tolist()))
        found, owners = self._pairs(query, *values)
        return ids_of(found), ids_of(owners)

    def _pairs(self, query: str, *values: Any) -> tuple[list[Any], list[Any]]:
        """What a query gives as `one`, and what as `other`; as a single row.

        Before every row SQLite lets other threads run, and those wait to get their turn back.
        """
        query = f"SELECT json_group_array(one), json_group_array(other) FROM ({query})"
        one, other = self.cursor(query, values).fetchone()
        return json.loads(one), json.loads(other)

    @decoding()
    def media_with_words(
        self, text: str, limit: int, among: Iterable[int] | None = None
    ) -> dict[int, float]:
        """The media whose captions hold a word of a text, with BM25 scores, the best first.

        Words count by their stems, as English has them; a segment's captions are one document
        (Robertson and Zaragoza 2009, with FTS5's k1 = 1.2 and b = 0.75).

        Args:
            limit: how many at most.
            among: only these media; None is all of them. Their scores are the same either way.
        """
        expression = _any_word_of(text)
        if not expression:
            return {}
        # FTS5's bm25() is less than zero, the smaller the better.
        query = "SELECT rowid AS one, -bm25(words) AS other FROM words WHERE words MATCH ?"
        values: tuple[Any, ...] = (expression,)
        has_parts = self.has_parts()
        if among is not None:
            # "+", or FTS5 would search once for every one of them.
            own = "SELECT value FROM json_each(?)"
            parts = f"SELECT id FROM segment WHERE media_id IN ({own})" if has_parts else own
            query += f" AND +rowid IN ({parts})"
            values += (json.dumps([int(number) for number in among]),)
        if has_parts:  # a file counts by its best segment
            query = (
                f"WITH found AS MATERIALIZED ({query}) SELECT media_id AS one, max(other) AS other "
                "FROM found CROSS JOIN segment ON id = one GROUP BY media_id ORDER BY other DESC"
            )
        else:
            query += " ORDER BY rank"
        media, scores = self._pairs(f"{query} LIMIT ?", *values, limit)
        return dict(zip(ids_of(media).tolist(), scores, strict=True))

    def has_parts(self) -> bool:
        """Whether a file has more than one segment."""
        return self.has("SELECT 1 FROM segment WHERE id != media_id")

    # -- patch embeddings ------------------------------------------------------------------

    def count_patches(self, space: SpaceRow) -> int:
        return self.number("SELECT count(*) FROM patch_embedding WHERE space_id = ?", space.id)

    def has_patches(self, space: SpaceRow | None = None) -> bool:
        """Whether there are patch embeddings, in one space or in any."""
        if space is None:
            return self.has("SELECT media_id FROM patch_embedding")
        return self.has("SELECT media_id FROM patch_embedding WHERE space_id = ?", space.id)

    @decoding()
    def patches_of(self, space: SpaceRow, ids: Sequence[int]) -> dict[int, bytes]:
        """The patch embeddings of some media, by id, as `store.patches` packs them."""
        query = "SELECT media_id, content FROM patch_embedding WHERE space_id = ? AND media_id"
        return dict(self.rows_in(query, ids, space.id))

    def is_missing_patches(self, space: SpaceRow) -> bool:
        """Whether there is a picture without patch embeddings."""
        return self.has(f"SELECT 1 {_WITHOUT_PATCHES}", space.id)

    def count_without_patches(self, space: SpaceRow) -> int:
        return self.number(f"SELECT count(*) {_WITHOUT_PATCHES}", space.id)

    @decoding()
    def media_without_patches(
        self, space: SpaceRow, after: int, limit: int
    ) -> list[MissingSegment]:
        """The next pictures, by id, that have no patch embeddings in a space."""
        query = (
            f"SELECT media.id, 0, {_FILE} {_WITHOUT_PATCHES} AND media.id > ? "
            "ORDER BY media.id LIMIT ?"
        )
        return [_missing(row) for row in self.cursor(query, (space.id, after, limit))]

    # -- vectors ---------------------------------------------------------------------------

    def count_without_vector(self, tower: TowerRow) -> int:
        """How many items have no vector of a tower."""
        query = f"SELECT count(*) FROM {tower.items} AS item {_without_vector(tower)}"
        return self.number(query, *_key(tower))

    @decoding()
    def segments_without_vector(
        self, tower: TowerRow, after: int, limit: int
    ) -> list[MissingSegment]:
        """The next segments, by id, that have no vector of a tower."""
        query = (
            f"SELECT item.id, {_PLACE}, {_FILE} FROM segment AS item "
            "JOIN media ON media.id = item.media_id JOIN root ON root.id = root_id "
            f"{_without_vector(tower)} AND item.id > ? ORDER BY item.id LIMIT ?"
        )
        return [_missing(row) for row in self.cursor(query, (*_key(tower), after, limit))]

    @decoding()
    def captions_without_vector(
        self, tower: TowerRow, after: int, limit: int
    ) -> list[tuple[int, str]]:
        """Id and text of the next captions, by id, that have no vector of a tower."""
        query = (
            f"SELECT item.id, text FROM caption AS item {_without_vector(tower)} "
            "AND item.id > ? ORDER BY item.id LIMIT ?"
        )
        return self.cursor(query, (*_key(tower), after, limit)).fetchall()

    @decoding()
    def snapshot_of(self, tower: TowerRow) -> SnapshotRow | None:
        row = self.cursor(
            "SELECT generation, file, vectors, last_embedding_id, checksum, ivf FROM snapshot "
            "WHERE space_id = ? AND tower = ?",
            (tower.space_id, tower.key),
        ).fetchone()
        if row is None:
            return None
        if not is_snapshot_name(row[1]):  # files are deleted by it: it may lead nowhere else
            raise DamageError.of_catalog(f"{row[1]!r} is no name of a vector file")
        return SnapshotRow(*row)

    def embeddings_after(
        self, tower: TowerRow, after: int, batch: int = 8192
    ) -> Iterator[tuple[int, Ids, Vectors]]:
        """Embeddings written after a given one, in batches: (the last one's id, ids, vectors).

        Raises:
            DamageError: one is not what was written.
        """
        cursor = self.cursor(
            "SELECT id, item_id, vector, checksum FROM embedding "
            "WHERE space_id = ? AND tower = ? AND id > ? ORDER BY id",
            (tower.space_id, tower.key, after),
        )
        while rows := cursor.fetchmany(batch):
            with decoding():
                for _, item, vector, checksum in rows:
                    if not is_sound(tower, item, vector, checksum):
                        raise _damaged(tower, item)
                ids = np.fromiter((row[1] for row in rows), dtype=np.int64, count=len(rows))
                vectors = vectors_from(b"".join(row[2] for row in rows), tower.dim)
            yield rows[-1][0], ids, vectors

    def last_embedding(self, tower: TowerRow) -> int:
        """The newest embedding of a tower; 0 where there is none."""
        query = "SELECT coalesce(max(id), 0) FROM embedding WHERE space_id = ? AND tower = ?"
        return self.number(query, tower.space_id, tower.key)

    @decoding()
    def some_vectors(self, tower: TowerRow, count: int) -> Vectors:
        """Up to so many vectors, (n, dim), evenly spaced in the order of writing."""
        query = "SELECT id FROM embedding WHERE space_id = ? AND tower = ? ORDER BY id"
        ids = self._ids(query, (tower.space_id, tower.key))
        found = self.rows_in("SELECT vector FROM embedding WHERE id", ids[spread(len(ids), count)])
        return vectors_from(b"".join(vector for (vector,) in found), tower.dim)

    @decoding()
    def vectors_of(self, tower: TowerRow, ids: Sequence[int]) -> dict[int, bytes]:
        """The stored vectors of some items, as bytes.

        Raises:
            DamageError: one is not what was written.
        """
        query = (
            "SELECT item_id, vector, checksum FROM embedding "
            "WHERE space_id = ? AND tower = ? AND item_id"
        )
        found: dict[int, bytes] = {}
        for item, vector, checksum in self.rows_in(query, ids, tower.space_id, tower.key):
            if not is_sound(tower, item, vector, checksum):
                raise _damaged(tower, item)
            found[item] = vector
        return found

    @decoding()
    def tombstones(self, tower: TowerRow) -> Ids:
        query = "SELECT item_id FROM tombstone WHERE space_id = ? AND tower = ?"
        return self._ids(query, (tower.space_id, tower.key))

    def count_delta(self, tower: TowerRow, after: int) -> int:
        """How many embeddings were written after a given one, and how many items were removed."""
        return self.number(
            "SELECT (SELECT count(*) FROM embedding "
            "WHERE space_id = ?1 AND tower = ?2 AND id > ?3)"
            " + (SELECT count(*) FROM tombstone WHERE space_id = ?1 AND tower = ?2)",
            tower.space_id, tower.key, after,
        )  # fmt: skip


_FILE = "media.id, root_id, media.path, size, mtime_ns, content_hash, root.path AS top"
_PLACE = (
    "(SELECT count(*) FROM segment AS earlier WHERE earlier.media_id = item.media_id "
    "AND earlier.modality = item.modality AND earlier.id < item.id)"
)
_WITHOUT_PATCHES = (
    "FROM media JOIN root ON root.id = media.root_id "
    "LEFT JOIN patch_embedding AS kept ON kept.media_id = media.id AND kept.space_id = ? "
    "WHERE kept.media_id IS NULL AND media.kind = 'image'"
)


def _without_vector(tower: TowerRow) -> str:
    """The condition that an item has no vector of a tower; its values are those of `_key`."""
    return (
        "LEFT JOIN embedding ON space_id = ?1 AND tower = ?2 AND item_id = item.id "
        f"WHERE embedding.id IS NULL AND {tower.modality_of_item} = ?3"
    )


def _key(tower: TowerRow) -> tuple[int, str, Modality]:
    return tower.space_id, tower.key, tower.modality


def _missing(row: Sequence[Any]) -> MissingSegment:
    number, place, media_id, root_id, path, size, mtime_ns, digest, top = row
    return MissingSegment(
        number, place, media_id, root_id, path, size, mtime_ns, digest, join(top, path)
    )


@lru_cache(maxsize=8)
def _spec_of(identity: str, dim: int, towers: tuple[tuple[str, str], ...]) -> EncoderSpec:
    """Parsed once for as long as the catalog says the same."""
    specs = {modality: json.loads(spec) for modality, spec in towers}
    return EncoderSpec.of_towers(identity, dim, specs)


def _any_word_of(text: str) -> str:
    """An FTS5 expression for documents with any of a text's words, but for function words."""
    whole = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode("utf-8"))
    found = list(dict.fromkeys(re.findall(r"\w+", whole)))
    telling = [word for word in found if word.lower() not in _FUNCTION_WORDS] or found
    return " OR ".join(f'"{word}"' for word in telling[:_QUERY_WORDS])


def _damaged(tower: TowerRow, item_id: int) -> DamageError:
    return DamageError.of_catalog(f"the vector of {tower.key} {item_id} is not what was written")


def vectors_from(content: bytes, dim: int) -> Vectors:
    return np.frombuffer(content, dtype="<f4").reshape(-1, dim)

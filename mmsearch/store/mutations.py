"""Everything that changes a catalog, as steps of one transaction."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
from sqlalchemy import (
    Connection,
    case,
    delete,
    func,
    insert,
    select,
    text,
    update,
)

from mmsearch.store import catalog, schema
from mmsearch.store.checksum import of_vector
from mmsearch.store.filters import places_of
from mmsearch.store.paths import canonical, join, relative
from mmsearch.store.queries import AMONG, Queries
from mmsearch.store.rows import (
    ACTIVE,
    OBSOLETE,
    PENDING,
    CaptionRecord,
    MediaRecord,
    RootRow,
    SnapshotRow,
    SpaceRow,
    TowerRow,
    Vector,
    is_from_file,
    local_time,
    stored_time,
)
from mmsearch.types import TEXT, EncoderSpec


class Change:
    """One transaction's changes. Rows are gathered and written together at its end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._raw = catalog.raw(connection)
        self.queries = Queries(self._raw)
        """Reads what this transaction has written so far (`flush`)."""
        self._next: dict[str, Iterator[int]] = {}
        self._rows = defaultdict[str, list[dict[str, Any]]](list)

    # -- spaces and roots ------------------------------------------------------------------

    def add_space(self, spec: EncoderSpec, precision: str) -> SpaceRow:
        """Adds the space of a model: as the active one where there is none, else beside that."""
        state = PENDING if self.queries.active_space() is not None else ACTIVE
        number = self._connection.execute(
            insert(schema.space)
            .values(identity=spec.space, state=state, dim=spec.dim)
            .returning(schema.space.c.id)
        ).scalar_one()
        rows = [
            {
                # Named by what it gives vectors to.
                "space_id": number, "key": "caption" if modality == TEXT else modality,
                "modality": modality, "identity": spec.space,
                "spec": json.dumps(spec.tower(modality)), "precision": precision, "state": ACTIVE,
            }
            for modality in spec.inputs
        ]  # fmt: skip
        self._connection.execute(insert(schema.tower), rows)
        return next(space for space in self.queries.spaces() if space.id == number)

    def activate(self, space: SpaceRow) -> None:
        """Makes a space the one that searches use; all others become obsolete."""
        is_it = schema.space.c.id == space.id
        self._connection.execute(
            update(schema.space).values(state=case((is_it, ACTIVE), else_=OBSOLETE))
        )

    def drop(self, space: SpaceRow) -> None:
        """Says that nothing uses a space any more."""
        table = schema.space
        self._connection.execute(update(table).where(table.c.id == space.id).values(state=OBSOLETE))

    def delete_some(self, space: SpaceRow, limit: int) -> bool:
        """Deletes up to `limit` vectors of an obsolete space, at last the space; if it is gone.

        A portion at a time: all of a large space in one transaction would need its size again in
        SQLite's log.
        """
        for table in (schema.embedding, schema.patch_embedding):
            chosen = select(table.c.id).where(table.c.space_id == space.id).limit(limit)
            found = self._connection.execute(delete(table).where(table.c.id.in_(chosen)))
            if found.rowcount:
                return False
        for table in (
            schema.tombstone, schema.snapshot, schema.background, schema.ceiling, schema.tower,
        ):  # fmt: skip
            self._connection.execute(delete(table).where(table.c.space_id == space.id))
        self._connection.execute(delete(schema.space).where(schema.space.c.id == space.id))
        return True

    def set_precision(self, space: SpaceRow, precision: str) -> None:
        self._connection.execute(
            update(schema.tower)
            .where(schema.tower.c.space_id == space.id)
            .values(precision=precision)
        )

    def add_root(self, path: bytes, *, walked: bool) -> RootRow:
        number = self._connection.execute(
            insert(schema.root)
            .values(path=path, walked=int(walked), exclude="[]")
            .returning(schema.root.c.id)
        ).scalar_one()
        return RootRow(number, path, walked, ())

    def set_root(self, root_id: int, *, walked: bool, exclude: Sequence[str]) -> None:
        self._connection.execute(
            update(schema.root)
            .where(schema.root.c.id == root_id)
            .values(walked=int(walked), exclude=json.dumps(list(exclude)))
        )

    def take_over(self, other: RootRow, root: RootRow) -> None:
        """Makes what another root holds of a root's folder, by whatever name, part of that root.

        Of a file that both have, the root's own stays. The other root goes if it lies in there.
        """
        top = canonical(root.path)
        place_within = cache(partial(_place_within, top, other.path))

        def place_of(path: bytes) -> bytes | None:
            folder, name = os.path.split(path)
            place = place_within(folder)
            return os.path.join(place, name) if place is not None and name else place

        moves = [
            (root.id, place, row.id)
            for row in self.queries.media_under(other.id, b"")
            if (place := place_of(row.path)) is not None
        ]
        self._raw.executemany(
            "UPDATE OR IGNORE media SET root_id = ?, path = ? WHERE id = ?", moves
        )
        stayed = {row.id for row in self.queries.media_under(other.id, b"")}
        self.remove_media([number for *_, number in moves if number in stayed])
        self._raw.executemany(
            "UPDATE OR REPLACE failure SET root_id = ?, path = ? WHERE root_id = ? AND path = ?",
            [
                (root.id, place, other.id, row.path)
                for row in self.queries.failures_under(other.id, b"")
                if (place := place_of(row.path)) is not None
            ],
        )
        if relative(canonical(other.path), top) is not None:
            self._connection.execute(delete(schema.root).where(schema.root.c.id == other.id))

    # -- media -----------------------------------------------------------------------------

    def add_media(self, new: MediaRecord, space: SpaceRow) -> int:
        """Adds a file with its segments, its captions and all their vectors; returns the new id."""
        numbers = [self._take_id("segment") for _ in new.segments] or [self._take_id("segment")]
        facts = new.facts if new.facts.captured else replace(
            new.facts, captured=local_time(new.mtime_ns), captured_from="mtime"
        )  # fmt: skip
        assert facts.captured is not None
        self._queue(
            "media",
            id=numbers[0],
            root_id=new.root_id,
            path=new.path,
            size=new.size,
            mtime_ns=new.mtime_ns,
            content_hash=new.content_hash,
            sidecar_size=new.sidecar[0] if new.sidecar else None,
            sidecar_mtime_ns=new.sidecar[1] if new.sidecar else None,
            **{**vars(facts), "captured": stored_time(facts.captured)},
        )
        for number, one in zip(numbers, new.segments, strict=False):
            self._queue(
                "segment", id=number, media_id=numbers[0], modality=one.modality,
                start_ms=one.start_ms, end_ms=one.end_ms,
            )  # fmt: skip
            self._queue_vector(space.towers[one.modality], number, one.vector)
        self.add_captions(numbers[0], new.captions, space, numbers)
        return numbers[0]

    def add_captions(
        self,
        media_id: int,
        captions: Iterable[CaptionRecord],
        space: SpaceRow,
        segments: Sequence[int] = (),
    ) -> None:
        """Adds captions to a file.

        Args:
            segments: the ids of the file's segments, where captions are about some of them.
        """
        for new in captions:
            number = self._take_id("caption")
            self._queue(
                "caption", id=number, media_id=media_id, text=new.text, source=new.source,
                segment_id=None if new.segment is None else segments[new.segment],
                language=new.language, confidence=new.confidence,
            )  # fmt: skip
            self._queue_vector(space.towers[TEXT], number, new.vector)

    def add_vectors(self, vectors: Mapping[int, Vector], tower: TowerRow) -> None:
        """Adds vectors (dim,) for items that have none of a tower, by id."""
        for number, vector in vectors.items():
            self._queue_vector(tower, number, vector)

    def set_file(
        self, media_id: int, *, root_id: int, path: bytes, size: int, mtime_ns: int
    ) -> None:
        """Says where a file lies now and what `stat` says of it; its content is the same.

        Where EXIF told no capture time, it is that of the modification.
        """
        captured = schema.media.c.captured
        is_told = schema.media.c.captured_from != "mtime"
        self._connection.execute(
            update(schema.media)
            .where(schema.media.c.id == media_id)
            .values(
                root_id=root_id, path=path, size=size, mtime_ns=mtime_ns,
                captured=case((is_told, captured), else_=stored_time(local_time(mtime_ns))),
            )
        )  # fmt: skip

    def set_sidecar(self, media_id: int, sidecar: tuple[int, int] | None) -> None:
        size, mtime_ns = sidecar or (None, None)
        self._connection.execute(
            update(schema.media)
            .where(schema.media.c.id == media_id)
            .values(sidecar_size=size, sidecar_mtime_ns=mtime_ns)
        )

    def forget(self, path: bytes) -> tuple[list[int], bool]:
        """The media at or below an absolute path, and whether the index knows of the path.

        Roots there are no longer walked, and failures there are forgotten.
        """
        found: list[int] = []
        known = False
        for root, prefix in places_of(self.queries, path):
            rows = self.queries.media_under(root.id, prefix)
            failed = self.queries.failures_under(root.id, prefix)
            known = known or bool(rows or failed or not prefix)
            found.extend(row.id for row in rows)
            self.clear_failures((root.id, row.path) for row in failed)
            if not prefix:
                self.set_root(root.id, walked=False, exclude=())
        return found, known

    def drop_empty_roots(self, also: Iterable[int] = ()) -> None:
        """Deletes roots that hold nothing and are not walked, or are among `also`."""
        chosen = set(also)
        for root in self.queries.roots():
            if (not root.walked or root.id in chosen) and self.queries.is_empty(root):
                self._connection.execute(delete(schema.root).where(schema.root.c.id == root.id))

    def remove_media(self, ids: Sequence[int]) -> None:
        """Removes files with their captions; every snapshot's copies become tombstones."""
        self._remove_captions("media_id", ids)
        self._bury("segment", "media_id", ids)
        self._raw.execute(f"DELETE FROM media WHERE id {AMONG}", (json.dumps(ids),))

    def captions_of(self, media_id: int) -> list[tuple[int, str, str]]:
        """Id, text and source of the captions of a file, as of this transaction."""
        self.flush()
        rows = self.queries.captions_of([media_id]).get(media_id, [])
        return [(row.id, row.text, row.source) for row in rows]

    def given_captions(self, media_id: int, space: SpaceRow) -> list[CaptionRecord]:
        """The captions that a file has from a captions file, with their vectors."""
        return self.queries.caption_records(space, media_id, is_from_file)

    def set_source(self, ids: Sequence[int], source: str) -> None:
        """Says where captions come from now; their texts and vectors are the same."""
        self._raw.execute(
            f"UPDATE caption SET source = ? WHERE id {AMONG}", (source, json.dumps(ids))
        )

    def remove_captions(self, ids: Sequence[int]) -> None:
        self._remove_captions("id", ids)

    def _remove_captions(self, column: str, ids: Sequence[int]) -> None:
        self._bury("caption", column, ids)
        self._raw.execute(f"DELETE FROM caption WHERE {column} {AMONG}", (json.dumps(ids),))

    def _bury(self, items: str, column: str, ids: Sequence[int]) -> None:
        """Removes the vectors of the items with some ids in a column, of every tower."""
        modality = "'text'" if items == "caption" else "item.modality"
        # In this order, each is found by an index.
        found = (
            f"FROM {items} AS item CROSS JOIN tower ON tower.modality = {modality} "
            "CROSS JOIN embedding AS one ON one.space_id = tower.space_id "
            f"AND one.tower = tower.key AND item_id = item.id WHERE item.{column} {AMONG}"
        )
        for statement in (
            f"INSERT INTO tombstone SELECT one.space_id, one.tower, item_id {found}",
            f"DELETE FROM embedding WHERE id IN (SELECT one.id {found})",
        ):
            self._raw.execute(statement, (json.dumps(ids),))

    # -- patch embeddings ------------------------------------------------------------------

    def add_patches(self, patches: Mapping[int, bytes], space: SpaceRow) -> None:
        """Keeps patch embeddings of media, by id; what was removed meanwhile gets none."""
        self._raw.executemany(
            "INSERT INTO patch_embedding (space_id, media_id, content) "
            "SELECT ?, id, ? FROM media WHERE id = ?",
            [(space.id, content, number) for number, content in patches.items()],
        )

    def remove_patches(self) -> None:
        self._connection.execute(delete(schema.patch_embedding))

    # -- failures ----------------------------------------------------------------------------

    def record_failure(
        self, root_id: int, path: bytes, size: int, mtime_ns: int, reason: str
    ) -> None:
        self._connection.execute(
            insert(schema.failure).prefix_with("OR REPLACE").values(
                root_id=root_id, path=path, size=size, mtime_ns=mtime_ns, reason=reason,
                failed_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )  # fmt: skip

    def clear_failures(self, files: Iterable[tuple[int, bytes]]) -> None:
        """Forgets the failures of files, given as roots and paths."""
        self._raw.executemany("DELETE FROM failure WHERE root_id = ? AND path = ?", files)

    def forget_failures(self) -> None:
        """Has failed files tried again, as if they had changed."""
        self._connection.execute(update(schema.failure).values(size=-1))

    # -- snapshots -------------------------------------------------------------------------

    def set_snapshot(self, tower: TowerRow, row: SnapshotRow) -> None:
        self._connection.execute(
            insert(schema.snapshot)
            .prefix_with("OR REPLACE")
            .values(space_id=tower.space_id, tower=tower.key, **vars(row))
        )
        self._connection.execute(
            delete(schema.tombstone).where(
                schema.tombstone.c.space_id == tower.space_id,
                schema.tombstone.c.tower == tower.key,
            )
        )

    def set_ivf(self, tower: TowerRow, checksum: bytes) -> None:
        """Says that the inverted lists over a snapshot are made."""
        table = schema.snapshot
        self._connection.execute(
            update(table)
            .where(table.c.space_id == tower.space_id, table.c.tower == tower.key)
            .values(ivf=checksum)
        )

    # -- writing ---------------------------------------------------------------------------

    def finish(self) -> None:
        """Writes what was gathered; called once, at the end of the transaction."""
        self.flush()
        self._connection.execute(
            update(schema.revision).values(number=schema.revision.c.number + 1)
        )

    def flush(self) -> None:
        """Writes the gathered rows now, for a query of this very transaction to see them."""
        for name in ("media", "segment", "caption", "embedding"):
            if rows := self._rows.pop(name, None):
                self._connection.execute(insert(schema.metadata.tables[name]), rows)

    def _queue(self, table: str, **values: Any) -> None:
        self._rows[table].append(values)

    def _queue_vector(self, tower: TowerRow, item_id: int, vector: Vector) -> None:
        if not isinstance(vector, bytes):
            vector = np.ascontiguousarray(vector, dtype="<f4").tobytes()
        if len(vector) != 4 * tower.dim:
            raise ValueError(f"a vector of {len(vector) // 4} numbers in a {tower.dim}-d space")
        self._queue(
            "embedding",
            space_id=tower.space_id,
            tower=tower.key,
            item_id=item_id,
            vector=vector,
            checksum=of_vector(vector, item_id),
        )

    def _take_id(self, table: str) -> int:
        """The next id of a table. Ids are given here, so that rows can be written in bulk.

        Files take theirs from `segment`: a file has the id of its first segment.
        """
        if table not in self._next:
            # AUTOINCREMENT's own memory: the highest id ever used, also where it was removed.
            names = ("segment", "media") if table == "segment" else (table,)
            highest = max(
                int(self._connection.execute(query).scalar() or 0)
                for name in names
                for query in (
                    text("SELECT seq FROM sqlite_sequence WHERE name = :name").bindparams(
                        name=name
                    ),
                    select(func.max(schema.metadata.tables[name].c.id)),
                )
            )
            self._next[table] = count(highest + 1)
        return next(self._next[table])


def _place_within(top: bytes, root: bytes, folder: bytes) -> bytes | None:
    """Where a folder of a root stands below `top`; None where it does not."""
    rest = b""
    while (place := relative(os.path.realpath(join(root, folder)), top)) is None:
        if not folder:
            return None
        folder, name = os.path.split(folder)  # a link in there leads elsewhere
        rest = os.path.join(name, rest) if rest else name
    return os.path.join(place, rest) if rest else place

"""Everything that changes a catalog, as steps of one transaction."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    Connection,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects.sqlite import insert as upsert

from mmsearch.store import catalog, lookups, schema
from mmsearch.store.checksum import of_vector
from mmsearch.store.filters import places_of
from mmsearch.store.lookups import RootRow, SpaceRow
from mmsearch.store.paths import canonical, join, relative
from mmsearch.types import EncoderSpec, Modality


@dataclass(frozen=True)
class NewCaption:
    """A caption with its vector (dim,); `source` is "sidecar", "file", or "file:" and which."""

    text: str
    source: str
    vector: NDArray[np.float32] | bytes


@dataclass(frozen=True)
class NewMedia:
    """A media file as it goes into the catalog, with its vector (dim,)."""

    root_id: int
    path: bytes
    size: int
    mtime_ns: int
    content_hash: bytes
    width: int
    height: int
    captured: str
    captured_from: str
    vector: NDArray[np.float32] | bytes
    captions: tuple[NewCaption, ...] = ()
    sidecar: tuple[int, int] | None = None
    """Size and mtime_ns of the sidecar file that the captions came from."""


class Change:
    """One transaction's changes. Rows are gathered and written together at its end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._reading = catalog.raw(connection)
        self._next: dict[str, int] = {}
        self._rows: dict[str, list[dict[str, Any]]] = {}

    # -- spaces and roots ------------------------------------------------------------------

    def add_space(self, spec: EncoderSpec, precision: str) -> SpaceRow:
        """Adds the space of a model: as the active one where there is none, else beside that."""
        has_one = lookups.active_space(self._reading) is not None
        number = self._connection.execute(
            insert(schema.space)
            .values(
                identity=spec.space,
                spec=json.dumps(spec.to_json()),
                active=lookups.COMING if has_one else lookups.ACTIVE,
                precision=precision,
            )
            .returning(schema.space.c.id)
        ).scalar_one()
        return SpaceRow(number, spec, precision)

    def activate(self, space: SpaceRow) -> None:
        """Makes a space the one that searches use; all others are retired."""
        table = schema.space
        self._connection.execute(update(table).values(active=lookups.RETIRED))
        self._connection.execute(
            update(table).where(table.c.id == space.id).values(active=lookups.ACTIVE)
        )

    def retire(self, space: SpaceRow) -> None:
        """Says that nothing uses a space any more."""
        self._connection.execute(
            update(schema.space).where(schema.space.c.id == space.id).values(active=lookups.RETIRED)
        )

    def drop_some(self, space: SpaceRow, limit: int) -> bool:
        """Deletes up to `limit` vectors of a retired space, at last the space; whether it is gone.

        A portion at a time: all of a large space in one transaction would need its size again in
        SQLite's log.
        """
        for table in (schema.embedding, schema.look):
            chosen = select(table.c.id).where(table.c.space_id == space.id).limit(limit)
            found = self._connection.execute(delete(table).where(table.c.id.in_(chosen)))
            if found.rowcount:
                return False
        for table in (schema.tombstone, schema.snapshot):
            self._connection.execute(delete(table).where(table.c.space_id == space.id))
        self._connection.execute(delete(schema.space).where(schema.space.c.id == space.id))
        return True

    def set_precision(self, space: SpaceRow, precision: str) -> None:
        self._connection.execute(
            update(schema.space).where(schema.space.c.id == space.id).values(precision=precision)
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
        inner = relative(canonical(other.path), top)
        failed = lookups.failures_under(self._reading, other.id, b"")
        folders = {*lookups.folders_of(self._reading, other.id)}
        folders |= {os.path.dirname(row.path) for row in failed}
        within: dict[bytes, bytes] = {}
        for folder in folders:
            place = _place_within(top, other.path, folder)
            if place is not None:
                within[folder] = place
        if within:
            self._move(other, root, within, failed)
        if inner is not None:
            self._connection.execute(delete(schema.root).where(schema.root.c.id == other.id))

    def _move(
        self, other: RootRow, root: RootRow, within: Mapping[bytes, bytes], failed: Sequence[Any]
    ) -> None:
        """Moves what lies in some folders of a root to the places that these have in another."""

        def place_of(path: bytes) -> bytes | None:
            folder, name = os.path.split(path)
            if folder not in within:
                return None
            return os.path.join(within[folder], name) if name else within[folder]

        taken = {row.path for row in lookups.media_under(self._reading, root.id, b"")}
        moves, copies = [], []
        for row in lookups.media_under(self._reading, other.id, b""):
            place = place_of(row.path)
            if place is not None and place not in taken:
                moves.append((root.id, place, row.id))
                taken.add(place)  # an older program may have it by two names
            elif place is not None:
                copies.append(row.id)
        self.remove_media(copies)
        self._reading.executemany("UPDATE media SET root_id = ?, path = ? WHERE id = ?", moves)
        there = [(row.path, place_of(row.path)) for row in failed]
        self._reading.executemany(
            "UPDATE OR REPLACE failure SET root_id = ?, path = ? WHERE root_id = ? AND path = ?",
            [(root.id, place, other.id, path) for path, place in there if place is not None],
        )

    # -- media -----------------------------------------------------------------------------

    def add_media(self, new: NewMedia, space: SpaceRow) -> int:
        """Adds a file with its captions and all their vectors; returns the new id."""
        number = self._take_id("media")
        self._queue(
            "media",
            id=number,
            root_id=new.root_id,
            path=new.path,
            size=new.size,
            mtime_ns=new.mtime_ns,
            content_hash=new.content_hash,
            width=new.width,
            height=new.height,
            captured=new.captured,
            captured_from=new.captured_from,
            sidecar_size=new.sidecar[0] if new.sidecar else None,
            sidecar_mtime_ns=new.sidecar[1] if new.sidecar else None,
        )
        self._queue_vector(space, "image", number, new.vector)
        self.add_captions(number, new.captions, space)
        return number

    def add_captions(self, media_id: int, captions: Iterable[NewCaption], space: SpaceRow) -> None:
        for new in captions:
            number = self._take_id("caption")
            self._queue("caption", id=number, media_id=media_id, text=new.text, source=new.source)
            self._queue_vector(space, "caption", number, new.vector)

    def add_vectors(
        self,
        vectors: Mapping[int, NDArray[np.float32] | bytes],
        space: SpaceRow,
        modality: Modality,
    ) -> None:
        """Adds vectors (dim,) for media, or captions, that have none in a space, by id."""
        for number, vector in vectors.items():
            self._queue_vector(space, modality, number, vector)

    def add_checksums(self, rows: Iterable[tuple[int, int, bytes]]) -> None:
        """Of embeddings that have none: id, item and vector."""
        self._reading.executemany(
            "UPDATE embedding SET checksum = ? WHERE id = ?",
            [(of_vector(vector, item), number) for number, item, vector in rows],
        )

    def set_file(
        self, media_id: int, *, root_id: int, path: bytes, size: int, mtime_ns: int, modified: str
    ) -> None:
        """Says where a file lies now and what `stat` says of it; its content is the same.

        `modified` becomes its capture time where EXIF told none.
        """
        chosen = schema.media.c.id == media_id
        self._connection.execute(
            update(schema.media)
            .where(chosen)
            .values(root_id=root_id, path=path, size=size, mtime_ns=mtime_ns)
        )
        self._connection.execute(
            update(schema.media)
            .where(chosen, schema.media.c.captured_from == "mtime")
            .values(captured=modified)
        )

    def set_sidecar(self, media_id: int, sidecar: tuple[int, int] | None) -> None:
        size, mtime_ns = sidecar or (None, None)
        self._connection.execute(
            update(schema.media)
            .where(schema.media.c.id == media_id)
            .values(sidecar_size=size, sidecar_mtime_ns=mtime_ns)
        )

    def forget(self, path: bytes) -> tuple[list[int], bool]:
        """The media at or below an absolute path, and whether the index knows of the path.

        Roots there are no longer walked, and the ledger's entries there are struck off.
        """
        found: list[int] = []
        known = False
        for root, prefix in places_of(self._reading, path):
            rows = lookups.media_under(self._reading, root.id, prefix)
            failed = lookups.failures_under(self._reading, root.id, prefix)
            known = known or bool(rows or failed or not prefix)
            found.extend(row.id for row in rows)
            self.clear_failures((root.id, row.path) for row in failed)
            if not prefix:
                self.set_root(root.id, walked=False, exclude=())
        return found, known

    def drop_empty_roots(self, also: Iterable[int] = ()) -> None:
        """Deletes roots that hold nothing and are not walked, or are among `also`."""
        chosen = set(also)
        for root in lookups.roots(self._reading):
            may_go = not root.walked or root.id in chosen
            if may_go and lookups.is_empty(self._reading, root):
                self._connection.execute(delete(schema.root).where(schema.root.c.id == root.id))

    def remove_media(self, ids: Sequence[int]) -> None:
        """Removes files with their captions; every snapshot's copies become tombstones."""
        for chunk in lookups.chunks(ids):
            captions = list(
                self._connection.execute(
                    select(schema.caption.c.id).where(schema.caption.c.media_id.in_(chunk))
                ).scalars()
            )
            self.remove_captions(captions)
            self._bury("image", chunk)
            self._connection.execute(delete(schema.media).where(schema.media.c.id.in_(chunk)))

    def captions_of(self, media_id: int) -> list[tuple[int, str, str]]:
        """Id, text and source of the captions of a file, as of this transaction."""
        self.flush()
        rows = lookups.captions_of(self._reading, [media_id]).get(media_id, [])
        return [(row.id, row.text, row.source) for row in rows]

    def given_captions(self, media_id: int, space: SpaceRow) -> list[NewCaption]:
        """The captions that a file has from a captions file, with their vectors."""
        rows = lookups.captions_of(self._reading, [media_id]).get(media_id, [])
        given = [row for row in rows if lookups.is_from_file(row.source)]
        ids = [row.id for row in given]
        vectors = lookups.vectors_of(self._reading, space, "caption", ids)
        return [NewCaption(row.text, row.source, vectors[row.id]) for row in given]

    def set_source(self, ids: Sequence[int], source: str) -> None:
        """Says where captions come from now; their texts and vectors are the same."""
        for chunk in lookups.chunks(ids):
            self._connection.execute(
                update(schema.caption).where(schema.caption.c.id.in_(chunk)).values(source=source)
            )

    def remove_captions(self, ids: Sequence[int]) -> None:
        for chunk in lookups.chunks(ids):
            self._bury("caption", chunk)
            self._connection.execute(delete(schema.caption).where(schema.caption.c.id.in_(chunk)))

    def _bury(self, modality: Modality, ids: Sequence[int]) -> None:
        table = schema.embedding
        # The spaces stand at the front of the index over these columns.
        spaces = list(self._connection.execute(select(schema.space.c.id)).scalars())
        chosen = (
            table.c.space_id.in_(spaces) & (table.c.modality == modality) & table.c.item_id.in_(ids)
        )
        self._connection.execute(
            insert(schema.tombstone).from_select(
                ["space_id", "modality", "item_id"],
                select(table.c.space_id, table.c.modality, table.c.item_id).where(chosen),
            )
        )
        self._connection.execute(delete(table).where(chosen))

    # -- second looks ----------------------------------------------------------------------

    def add_looks(self, looks: Mapping[int, bytes], space: SpaceRow) -> None:
        """Keeps second looks at media, by id; what was removed meanwhile gets none."""
        table = schema.media.c.id
        there = {
            number
            for chunk in lookups.chunks(list(looks))
            for number in self._connection.execute(select(table).where(table.in_(chunk))).scalars()
        }
        rows = [
            {"media_id": number, "space_id": space.id, "content": content}
            for number, content in looks.items()
            if number in there
        ]
        if rows:
            self._connection.execute(insert(schema.look), rows)

    def remove_looks(self) -> None:
        self._connection.execute(delete(schema.look))

    # -- the ledger ------------------------------------------------------------------------

    def record_failure(
        self, root_id: int, path: bytes, size: int, mtime_ns: int, reason: str
    ) -> None:
        values = {
            "size": size,
            "mtime_ns": mtime_ns,
            "reason": reason,
            "failed_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._connection.execute(
            upsert(schema.failure)
            .values(root_id=root_id, path=path, **values)
            .on_conflict_do_update(index_elements=["root_id", "path"], set_=values)
        )

    def clear_failures(self, files: Iterable[tuple[int, bytes]]) -> None:
        """Strikes files off the ledger: roots and paths."""
        by_root: dict[int, list[bytes]] = {}
        for root_id, path in files:
            by_root.setdefault(root_id, []).append(path)
        for root_id, paths in by_root.items():
            for chunk in lookups.chunks(paths):
                self._connection.execute(
                    delete(schema.failure).where(
                        schema.failure.c.root_id == root_id, schema.failure.c.path.in_(chunk)
                    )
                )

    def forget_failures(self) -> None:
        """Has the files of the ledger tried again, as if they had changed."""
        self._connection.execute(update(schema.failure).values(size=-1))

    # -- snapshots -------------------------------------------------------------------------

    def set_snapshot(self, space: SpaceRow, modality: Modality, row: lookups.SnapshotRow) -> None:
        values = {
            "generation": row.generation,
            "file": row.file,
            "vectors": row.vectors,
            "last_embedding_id": row.last_embedding_id,
            "checksum": row.checksum,
            "cells": row.cells,
        }
        self._connection.execute(
            upsert(schema.snapshot)
            .values(space_id=space.id, modality=modality, **values)
            .on_conflict_do_update(index_elements=["space_id", "modality"], set_=values)
        )
        self._connection.execute(
            delete(schema.tombstone).where(
                schema.tombstone.c.space_id == space.id, schema.tombstone.c.modality == modality
            )
        )

    def set_cells(self, space: SpaceRow, modality: Modality, checksum: bytes) -> None:
        """Says that the cells over a snapshot are made."""
        table = schema.snapshot
        self._connection.execute(
            update(table)
            .where(table.c.space_id == space.id, table.c.modality == modality)
            .values(cells=checksum)
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
        for name in ("media", "caption", "embedding"):
            if rows := self._rows.pop(name, []):
                self._connection.execute(insert(schema.metadata.tables[name]), rows)

    def _queue(self, table: str, **values: Any) -> None:
        self._rows.setdefault(table, []).append(values)

    def _queue_vector(self, space: SpaceRow, modality: Modality, item_id: int, vector: Any) -> None:
        if not isinstance(vector, bytes):
            vector = np.ascontiguousarray(vector, dtype="<f4").tobytes()
        if len(vector) != 4 * space.spec.dim:
            raise ValueError(
                f"a vector of {len(vector) // 4} numbers in a {space.spec.dim}-d space"
            )
        self._queue(
            "embedding",
            space_id=space.id,
            modality=modality,
            item_id=item_id,
            vector=vector,
            checksum=of_vector(vector, item_id),
        )

    def _take_id(self, table: str) -> int:
        """The next id of a table. Ids are given here, so that rows can be written in bulk."""
        if table not in self._next:
            # AUTOINCREMENT's own memory: the highest id ever used, also where it was removed.
            used = self._connection.execute(
                text("SELECT seq FROM sqlite_sequence WHERE name = :name"), {"name": table}
            ).scalar()
            newest = self._connection.execute(
                select(func.max(schema.metadata.tables[table].c.id))
            ).scalar()
            self._next[table] = max(int(used or 0), int(newest or 0)) + 1
        number = self._next[table]
        self._next[table] += 1
        return number


def _place_within(top: bytes, root: bytes, folder: bytes) -> bytes | None:
    """Where a folder of a root stands below `top`; None where it does not."""
    rest = b""
    while (place := relative(os.path.realpath(join(root, folder)), top)) is None:
        if not folder:
            return None
        folder, name = os.path.split(folder)  # a link in there leads elsewhere
        rest = os.path.join(name, rest) if rest else name
    return os.path.join(place, rest) if rest else place

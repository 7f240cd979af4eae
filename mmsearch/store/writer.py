"""The one writer of an index: what it can change, and the vector files that it keeps."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.errors import DamageError, UnreadableError, UsageError
from mmsearch.store import filters
from mmsearch.store.catalog import Catalog
from mmsearch.store.files import make_folder, replacing
from mmsearch.store.paths import canonical, join, relative
from mmsearch.store.rows import RootRow, SnapshotRow, SpaceRow, TowerRow
from mmsearch.store.vectors import ivf_name
from mmsearch.types import IMAGE, TEXT, EncoderSpec

if TYPE_CHECKING:
    from mmsearch.store.faiss_index import FaissIndex
    from mmsearch.store.ivf_index import IvfIndex
    from mmsearch.store.mutations import Change

_DELETED = 8192  # rows, at once


@dataclass(frozen=True)
class Compaction:
    """When what is newer than a snapshot is folded into it."""

    long: int = 8192
    """A delta of so many is folded in at once."""
    short: int = 1024
    """At the end of a run one of so many is."""
    share: float = 0.1
    """Of the snapshot, at least: the work stays in proportion to what was added."""
    ivf_from: int = 100_000
    """Smaller snapshots are searched exactly, which is quick enough (docs/performance.md)."""


@dataclass(frozen=True)
class Writer:
    """What the one writer can do. Made by `Store.writer`."""

    catalog: Catalog
    folder: Path
    """Of the vector files."""
    compaction: Compaction

    @contextmanager
    def change(self) -> Iterator[Change]:
        """A transaction: everything in it is committed together, or nothing is."""
        from mmsearch.store.mutations import Change  # and SQLAlchemy with it

        with self.catalog.write() as connection:
            change = Change(connection)
            yield change
            change.finish()

    def space_of(self, spec: EncoderSpec, precision: str, *, beside: bool = False) -> SpaceRow:
        """The active space, which is made from `spec` in an index that has none yet.

        Args:
            precision: what the vectors to come are computed in.
            beside: for another model than the active space's: the space that is to take its
                place. Only one can be under way; one of a third model is given up.

        Raises:
            SpaceError: the index has another space, and `beside` is not asked for.
        """
        with self.catalog.read() as queries:
            space = queries.active_space()
            if space is not None and beside and space.spec.space != spec.space:
                space = queries.pending_space()
            elif space is not None:
                space = filters.require_space(queries, spec.space)
        if space is not None and space.spec.space != spec.space:
            with self.change() as change:
                change.drop(space)
            space = None
        if space is None:
            with self.change() as change:
                return change.add_space(spec, precision)
        if space.precision not in (precision, "mixed"):
            with self.change() as change:
                change.set_precision(space, "mixed")
        return space

    def switch_to(self, space: SpaceRow) -> None:
        """Makes a space the one that searches use, and deletes all others."""
        with self.change() as change:
            change.activate(space)
        self.mend()

    def drop_pending(self) -> SpaceRow | None:
        """Deletes the space that was to take the active one's place, and returns it, if any."""
        with self.catalog.read() as queries:
            pending = queries.pending_space()
        if pending is not None:
            with self.change() as change:
                change.drop(pending)
            self.mend()
        return pending

    def place(self, paths: Sequence[bytes]) -> tuple[dict[bytes, RootRow], set[bytes]]:
        """The root of each canonical path, and those paths that the index has already.

        That is the deepest root above it; for paths below none, a new one that is not walked.
        """
        with self.catalog.read() as queries:
            roots = queries.roots()
            tops = {root: canonical(root.path) for root in roots}
            known = {
                join(tops[root], row.path)
                for root in roots
                for row in queries.media_under(root.id, b"")
            }
        roots.sort(key=lambda root: len(tops[root]), reverse=True)
        found = {
            path: root
            for path in paths
            if (root := next((one for one in roots if relative(path, tops[one])), None)) is not None
        }
        rest = [path for path in paths if path not in found]
        if rest:
            folder = os.path.commonpath([os.path.dirname(path) for path in rest])
            with self.change() as change:
                root = change.add_root(folder, walked=False)
            found.update(dict.fromkeys(rest, root))
        return found, known

    def remove(self, paths: Sequence[bytes]) -> int:
        """Takes out all media at or below absolute paths, and roots that lie there; how many.

        Raises:
            UsageError: nothing lies at or below one of the paths.
        """
        chosen: dict[int, None] = {}
        with self.change() as change:
            for path in paths:
                found, known = change.forget(path)
                if not known:
                    raise UsageError(f"{os.fsdecode(path)}: nothing in the index lies there")
                chosen.update(dict.fromkeys(found))
            change.remove_media(list(chosen))
            change.drop_empty_roots()
        self.compact(only_if="short")
        return len(chosen)

    def compact(self, *, only_if: str = "always") -> None:
        """Writes new snapshots. `only_if`: "always", or where the delta is "short" or "long"."""
        for tower, row, waiting in self._loads():
            when, share = self.compaction, row.vectors * self.compaction.share if row else 0
            least = {"always": 1, "short": max(when.short, share), "long": max(when.long, share)}
            if waiting >= least[only_if]:
                self._write_snapshot(tower, row)
        if only_if != "long":  # in the midst of a run they would be made again and again
            self._make_ivf()

    def rewrite(self) -> None:
        """Writes all snapshots again."""
        for tower, row, _ in self._loads():
            if row is not None:
                self._write_snapshot(tower, row)

    def mend(self) -> None:
        """Writes snapshots whose files are gone, and deletes what nothing names any more."""
        make_folder(self.folder)
        self._delete_obsolete()
        for tower, row, _ in self._loads():
            if row is not None and not is_whole(self.folder / row.file, row, tower.dim):
                self._write_snapshot(tower, row)
        rows = [row for _, row, _ in self._loads() if row is not None]
        named = {name for row in rows for name in (row.file, ivf_name(row.file))}
        for path in self.folder.iterdir():
            if path.name not in named and path.is_file():
                path.unlink(missing_ok=True)

    def _delete_obsolete(self) -> None:
        with self.catalog.read() as queries:
            obsolete = queries.obsolete_spaces()
        for space in obsolete:
            is_gone = False
            while not is_gone:
                with self.change() as change:
                    is_gone = change.delete_some(space, _DELETED)

    def _loads(self) -> list[tuple[TowerRow, SnapshotRow | None, int]]:
        """For each tower: its snapshot, and how many rows wait to be folded in."""
        with self.catalog.read() as queries:
            rows = [(tower, queries.snapshot_of(tower)) for tower in queries.towers()]
            return [
                (tower, row, queries.count_delta(tower, row.last_embedding_id if row else 0))
                for tower, row in rows
            ]

    def _write_snapshot(self, tower: TowerRow, old: SnapshotRow | None) -> None:
        from mmsearch.store.faiss_index import FaissIndex

        generation = (old.generation if old else 0) + 1
        name = f"{tower.space_id}-{tower.key}-{generation}.faiss"
        path = self.folder / name
        with self.catalog.read() as queries:
            last = queries.last_embedding(tower)
            batches = ((ids, vectors) for _, ids, vectors in queries.embeddings_after(tower, 0))
            index = FaissIndex.build(tower.dim, batches)
        row = SnapshotRow(generation, name, len(index), last, self._keep(index, path))
        with self.change() as change:
            change.set_snapshot(tower, row)
        if old is not None and old.file != name:
            (self.folder / old.file).unlink(missing_ok=True)

    def _make_ivf(self) -> None:
        """Makes the inverted lists of large snapshots that have none yet."""
        loads = self._loads()
        for tower, row, _ in loads:
            if row is None or row.vectors < self.compaction.ivf_from:
                continue
            from mmsearch.store.faiss_index import FaissIndex
            from mmsearch.store.ivf_index import TRIAL, IvfIndex

            path = self.folder / ivf_name(row.file)
            exact = FaissIndex.open(self.folder / row.file, row.checksum)
            with suppress(FileNotFoundError, DamageError):  # else they are made again
                if row.ivf is not None:
                    IvfIndex.open(path, exact, row.ivf)
                    continue
            names = ivf_name(f"{tower.space_id}-{tower.key}-*.faiss")
            older = sorted(other for other in self.folder.glob(names) if other != path)
            # What asks is of another kind: a text for an image, an image for a caption.
            opposite = IMAGE if tower.modality == TEXT else TEXT
            with self.catalog.read() as stored:
                samples = [
                    stored.some_vectors(one, TRIAL)
                    for one, _, _ in loads
                    if (one.space_id, one.modality) == (tower.space_id, opposite)
                ]
            queries = next((one for one in samples if len(one) >= TRIAL // 2), None)
            ivf = IvfIndex.build(exact, queries, older[-1] if older else None)
            checksum = self._keep(ivf, path)
            with self.change() as change:
                change.set_ivf(tower, checksum)
            for other in older:
                other.unlink(missing_ok=True)

    def _keep(self, index: FaissIndex | IvfIndex, path: Path) -> bytes:
        """Saves an index: it appears whole under its name, or not at all; its checksum."""
        try:
            with replacing(path) as draft:
                return index.save(draft)
        except OSError as error:
            raise UnreadableError(
                f"{self.folder}: a vector file cannot be written: {error.strerror or error}; "
                "nothing is lost, the next 'mmsearch index' writes it"
            ) from error


def is_whole(path: Path, row: SnapshotRow, dim: int) -> bool:
    """Whether a vector file begins and is as long as it should; without FAISS, which takes a while.

    Whether all of it is what was written, its checksum tells (`verify`).
    """
    try:
        with path.open("rb") as file:
            begins = file.read(16)  # what it is, how wide and how many its vectors are
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    is_same = begins == struct.pack("<4siq", b"IxMp", dim, row.vectors)
    return is_same and size >= row.vectors * (4 * dim + 16) + 24

"""The store: a folder with a catalog, its vector files and a lock for the one writer."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from mmsearch.config import MARKER
from mmsearch.errors import DamageError, IndexInUse, IndexNotFound, UnreadableError, UsageError
from mmsearch.store import catalog
from mmsearch.store.catalog import Catalog
from mmsearch.store.files import draft_of, make_folder, sync_folder, write_durably
from mmsearch.store.migrations import FORMAT_VERSION
from mmsearch.store.paths import to_path
from mmsearch.store.queries import Queries
from mmsearch.store.reader import Reader, row_of
from mmsearch.store.rows import SpaceRow, TowerRow
from mmsearch.store.vectors import VectorView
from mmsearch.store.writer import Compaction, Writer
from mmsearch.types import IMAGE, TEXT, Facts, Ids, Modality, Status, Vectors

VECTORS = "vectors"
_LOCK = "writer.lock"
#: A repaired catalog, whole, on its way to its place.
REPAIRED = "catalog.repaired.sqlite3"
COMPACTION = Compaction()


@dataclass(frozen=True)
class Contents:
    """All of an index: ids, vectors (n, dim) and what they stand for, row by row."""

    image_ids: Ids
    image_vectors: Vectors
    image_paths: tuple[bytes, ...]
    image_facts: tuple[Facts, ...]
    caption_ids: Ids
    caption_vectors: Vectors
    caption_texts: tuple[str, ...]
    caption_sources: tuple[str, ...]
    caption_media: Ids
    """The id of the media that each caption belongs to."""


class Store:
    """An open index on disk. Readers never wait; one writer at a time."""

    def __init__(self, folder: Path, compaction: Compaction = COMPACTION) -> None:
        """Opens the index in `folder`.

        Args:
            compaction: when writers fold what is new into the vector files.

        Raises:
            IndexNotFound: there is none.
            FormatError: an older or newer program's, or not an index at all.
        """
        path = folder / catalog.FILE_NAME
        if not path.is_file() and (folder / REPAIRED).is_file():
            with writer_lock(folder):
                finish_repair(folder)
        if not path.is_file():
            refuse_orphans(folder)
            raise IndexNotFound(
                f"{folder}: no index there; make one with 'mmsearch index PATH', "
                "or name another with --index DIR"
            )
        self.folder = folder
        self.compaction = compaction
        self.catalog = Catalog(path)
        self._views: dict[TowerRow, VectorView] = {}
        self._views_lock = threading.Lock()
        self._identity = self.catalog.identity

    @classmethod
    def create(cls, folder: Path, compaction: Compaction = COMPACTION) -> Store:
        """Opens the index in `folder`, making an empty one where there is none.

        Raises:
            UsageError: the folder holds something else.
        """
        try:
            claim(folder)
            make_folder(folder / VECTORS)
            with writer_lock(folder):
                if not (folder / catalog.FILE_NAME).is_file():
                    refuse_orphans(folder)
                    Catalog.create(folder / catalog.FILE_NAME).close()
        except OSError as error:
            raise UnreadableError(f"{folder}: cannot be made an index: {error.strerror}") from error
        return cls(folder, compaction)

    def close(self) -> None:
        self.catalog.close()
        self._views.clear()

    # -- reading ---------------------------------------------------------------------------

    @property
    def views(self) -> dict[TowerRow, VectorView]:
        """The newest vectors that a search has seen, by tower."""
        with self._views_lock:
            return dict(self._views)

    def active_space(self) -> SpaceRow | None:
        with self.catalog.read() as queries:
            return queries.active_space()

    @contextmanager
    def reader(self, *modalities: Modality) -> Iterator[Reader]:
        """One consistent view of the index, which answers all that a query asks.

        Args:
            modalities: whose vectors will be needed; none is all. Others are opened on demand.

        Raises:
            DamageError: a vector file is missing.
        """
        missing = None
        while True:
            with self.catalog.read() as queries:
                space, revision = queries.active_space(), queries.revision()
                towers = space.towers if space else {}

                view_of = partial(self._view, queries, revision)
                try:  # a reader keeps these: their files may go while it reads
                    views = {
                        name: view_of(towers[name])
                        for name in modalities or towers if name in towers
                    }  # fmt: skip
                except DamageError as error:
                    gone = error.__cause__
                    if isinstance(gone, FileNotFoundError) and gone.filename != missing:
                        missing = gone.filename
                        continue  # a writer compacted meanwhile: now another file is named
                    raise
                yield Reader(queries, space, view_of, views)
                return

    def _view(self, queries: Queries, revision: int, tower: TowerRow) -> VectorView:
        """The vectors as of this very transaction; the newest view is kept for the next search.

        Raises:
            DamageError: the vector file is missing.
        """
        with self._views_lock:
            if self._identity != self.catalog.identity:  # a repair put another in its place
                self._views.clear()
                self._identity = self.catalog.identity
            try:
                return self._newest_view(queries, revision, tower)
            except FileNotFoundError as error:
                raise DamageError(
                    f"{self.folder}: a vector file is missing; run 'mmsearch repair', "
                    "which writes it again from the catalog"
                ) from error

    def _newest_view(self, queries: Queries, revision: int, tower: TowerRow) -> VectorView:
        view = self._views.get(tower)
        if view is not None and view.revision == revision:
            return view
        row = queries.snapshot_of(tower)
        behind = view is None or view.revision < revision
        if view is not None and behind and view.generation == (row.generation if row else 0):
            view = view.advanced(queries)
        else:
            view = VectorView.load(queries, tower, self.folder / VECTORS)
        # Another thread may have seen a newer state than this transaction does: its view stays.
        if behind:
            self._views[tower] = view
            for other in [one for one in self._views if one.space_id != tower.space_id]:
                del self._views[other]  # of the space before a switch
        return view

    def status(self) -> Status:
        with self.catalog.read() as queries:
            space = queries.active_space()
            pending = queries.pending_space()
            roots = {to_path(row.path): row.exclude for row in queries.roots()}
            return Status(
                path=self.folder,
                model=space.spec.model if space else "",
                space=space.spec.space if space else "",
                dim=space.spec.dim if space else 0,
                images=queries.count("media"),
                captions=queries.count("caption"),
                failures=queries.count("failure"),
                roots=tuple(roots),
                exclude={path: globs for path, globs in roots.items() if globs},
                bytes=_size(self.folder),
                format_version=FORMAT_VERSION,
                patches=queries.count_patches(space) if space else 0,
                pending=pending.spec.model if pending else "",
                missing=sum(
                    queries.count_without_vector(tower)
                    for tower in (pending.towers.values() if pending else ())
                    if tower.modality != TEXT
                ),
            )

    def contents(self) -> Contents:
        """All images and captions in the active space, in the order of the ids."""
        with self.catalog.read() as queries:
            space = queries.active_space()
            if space is None:
                raise IndexNotFound(f"{self.folder}: the index is empty; run 'mmsearch index PATH'")
            tower, of_captions = space.tower(IMAGE), space.tower(TEXT)
            image_ids, images = _all(queries, tower)
            caption_ids, captions = _all(queries, of_captions)
            shown = queries.items(tower, image_ids.tolist())
            texts = queries.items(of_captions, caption_ids.tolist())
            facts = queries.facts_of(shown[number].media_id for number in shown)
            sources = queries.caption_sources()
        return Contents(
            image_ids,
            images,
            tuple(row_of(shown, number).path for number in image_ids.tolist()),
            tuple(row_of(facts, shown[number].media_id) for number in image_ids.tolist()),
            caption_ids,
            captions,
            tuple(row_of(texts, number).caption or "" for number in caption_ids.tolist()),
            tuple(row_of(sources, number) for number in caption_ids.tolist()),
            np.array([texts[number].media_id for number in caption_ids.tolist()], dtype=np.int64),
        )

    def copy_catalog(self, to: Store) -> None:
        """Copies the catalog, as of now, into another store."""
        self.catalog.copy(to.catalog)

    # -- writing ---------------------------------------------------------------------------

    @contextmanager
    def writer(self, wait: float = 5.0) -> Iterator[Writer]:
        """Makes this process the index's writer; waits a while for another to end.

        Raises:
            IndexInUse: another process goes on writing.
        """
        with writer_lock(self.folder, wait):
            finish_repair(self.folder)
            if not self.catalog.path.is_file():
                raise IndexNotFound(f"{self.folder}: the index is gone")
            (self.folder / REPAIRED).unlink(missing_ok=True)  # of a repair that was cut off early
            writer = Writer(self.catalog, self.folder / VECTORS, self.compaction)
            writer.mend()
            yield writer


def _all(queries: Queries, tower: TowerRow) -> tuple[Ids, Vectors]:
    none = np.empty(0, np.int64), np.empty((0, tower.dim), np.float32)
    parts = [none, *((ids, vectors) for _, ids, vectors in queries.embeddings_after(tower, 0))]
    ids, vectors = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(ids)
    return ids[order], vectors[order]


def refuse_orphans(folder: Path) -> None:
    """Says so where an index has lost its catalog, rather than begin another in its place.

    Raises:
        DamageError: there are vector files and no catalog.
    """
    if (folder / MARKER).is_file() and any((folder / VECTORS).glob("*.faiss")):
        raise DamageError(
            f"{folder}: the catalog of this index is gone; move the folder away and 'mmsearch "
            "restore' a backup, or delete its folder 'vectors' to begin again"
        )


def claim(folder: Path) -> None:
    """Makes a folder, if it is not there, and marks it as mmsearch's own.

    Raises:
        UsageError: it holds something else.
        OSError: it cannot be written.
    """
    make_folder(folder)
    if (folder / MARKER).is_file():
        return
    if any(path.name != draft_of(folder / MARKER).name for path in folder.iterdir()):
        raise UsageError(
            f"{folder}: not empty and not an index of mmsearch; name an empty or a new folder with "
            "--index DIR"
        )
    content = {"what": "an index of mmsearch; see docs/format.md", "format": FORMAT_VERSION}
    write_durably(folder / MARKER, (json.dumps(content) + "\n").encode())


def finish_repair(folder: Path, kept: Path | None = None) -> None:
    """Puts a repaired catalog in the place of the damaged one, if that was moved away already.

    Its log follows it: beside another catalog SQLite would write it into that. Whoever calls this
    holds the lock, and only under that is it certain that the damaged one is still missing.

    Args:
        kept: where the damaged one was moved to.
    """
    path = folder / catalog.FILE_NAME
    if path.is_file() or not (folder / REPAIRED).is_file():
        return
    log, *others = catalog.companions(path)
    if log.is_file():
        log.replace(catalog.companions(kept or folder / "catalog.damaged.sqlite3")[0])
    for one in others:
        one.unlink(missing_ok=True)
    sync_folder(folder)
    (folder / REPAIRED).replace(path)
    sync_folder(folder)


@contextmanager
def writer_lock(folder: Path, wait: float = 5.0) -> Iterator[None]:
    """Makes this process the one that writes.

    Raises:
        IndexInUse: another process goes on writing.
        UnreadableError: nothing can be written there.
    """
    # The kernel drops the lock with the process that holds it, so a kill leaves none behind.
    lock = FileLock(folder / _LOCK, timeout=wait)
    with catalog.writing(folder):
        try:
            lock.acquire()
        except Timeout as error:
            raise IndexInUse(
                f"{folder}: another process is writing to this index; try again when it has ended"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _size(folder: Path) -> int:
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a writer may put another in its place
                total += os.stat(os.path.join(top, name)).st_size
    return total

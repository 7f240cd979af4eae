"""The store: a folder with a catalog, its vector files and a lock for the one writer."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from mmsearch.config import MARKER
from mmsearch.errors import DamageError, IndexInUse, IndexNotFound, UnreadableError, UsageError
from mmsearch.store import catalog, filters, lookups
from mmsearch.store.catalog import Catalog
from mmsearch.store.files import draft_of, make_folder, sync_folder, write_durably
from mmsearch.store.lookups import Item, MediaFacts, SpaceRow
from mmsearch.store.migrations import FORMAT_VERSION
from mmsearch.store.paths import to_path
from mmsearch.store.vector_index import Found, dot_products
from mmsearch.store.vectors import VectorView
from mmsearch.store.writer import Writer
from mmsearch.types import MODALITIES, Filter, Ids, Modality, Status, Vectors

T = TypeVar("T")

VECTORS = "vectors"
_LOCK = "writer.lock"
#: A repaired catalog, whole, on its way to its place.
REPAIRED = "catalog.repaired.sqlite3"

#: Captions that all say the same are spread over nothing: their cosines are compared with this.
_LEAST_DEVIATION = 0.02


@dataclass(frozen=True)
class Answer:
    """The items found for one query, best first."""

    scores: Sequence[float]
    ids: Sequence[int]
    items: Sequence[Item]


@dataclass(frozen=True)
class Usual:
    """How the scores of one query are spread over an index."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, scores: NDArray[np.floating]) -> Usual:
        if len(scores) < 2:  # nothing to compare with: the score itself has to do
            return cls(0.0, 1.0)
        return cls(float(scores.mean()), max(float(scores.std()), _LEAST_DEVIATION))


@dataclass(frozen=True)
class Evidence:
    """What speaks for each of m media, for one query; sorted by id."""

    media: Ids
    items: Sequence[Item]
    image: NDArray[np.float64]
    """The cosine of each image, (m,)."""
    caption: NDArray[np.float64]
    """The cosine of each one's best caption, (m,); NaN where it has none."""
    words: NDArray[np.float64]
    """BM25 of each one's captions, (m,); NaN where it has none."""
    usual_image: Usual
    usual_caption: Usual
    best_words: float
    """The highest BM25 of all; 0 where no caption holds any of the words."""


@dataclass(frozen=True)
class Contents:
    """All of an index: ids, vectors (n, dim) and what they stand for, row by row."""

    image_ids: Ids
    image_vectors: Vectors
    image_paths: tuple[bytes, ...]
    image_facts: tuple[MediaFacts, ...]
    caption_ids: Ids
    caption_vectors: Vectors
    caption_texts: tuple[str, ...]
    caption_sources: tuple[str, ...]
    caption_media: Ids
    """The id of the media that each caption belongs to."""


class Store:
    """An open index on disk. Readers never wait; one writer at a time."""

    def __init__(self, folder: Path) -> None:
        """Opens the index in `folder`.

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
        self.catalog = Catalog(path)
        self._views: dict[tuple[int, Modality], VectorView] = {}
        self._views_lock = threading.Lock()
        self._identity = self.catalog.identity

    @classmethod
    def create(cls, folder: Path) -> Store:
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
        return cls(folder)

    def close(self) -> None:
        self.catalog.close()
        self._views.clear()

    # -- reading ---------------------------------------------------------------------------

    def active_space(self) -> SpaceRow | None:
        with self.catalog.read() as connection:
            return lookups.active_space(connection)

    def search(
        self,
        space: str,
        queries: Vectors,
        to: Modality,
        k: int,
        where: Filter | None = None,
        *,
        exact: bool = False,
    ) -> list[Answer]:
        """The best k items of each query, all from one state of the index.

        Args:
            space: the identity of the queries' space.
            queries: shape (q, d).
            exact: compare with every vector, also where the index is large.

        Raises:
            SpaceError: the index's active space is another.
        """
        return self._again(lambda: self._search(space, queries, to, k, where, exact))

    def _again(self, look: Callable[[], T]) -> T:
        for _ in range(3):
            try:
                return look()
            except FileNotFoundError:
                continue  # a writer compacted between our look at the catalog and the file
        raise DamageError(
            f"{self.folder}: a vector file is missing; run 'mmsearch repair', which writes it anew "
            "from the catalog"
        )

    def _search(
        self,
        space: str,
        queries: Vectors,
        to: Modality,
        k: int,
        where: Filter | None,
        exact: bool,
    ) -> list[Answer]:
        with self.catalog.read() as connection:
            view = self._view(connection, filters.require_space(connection, space), to)
            among = filters.matching_ids(connection, where, to) if where else None
            found = view.search(queries, k, among, exact=exact)
            wanted = {int(number) for _, ids in found for number in ids}
            known = lookups.items(connection, to, sorted(wanted))
        return [_answer(one, known) for one in found]

    def has_captions(self, least: int = 1) -> bool:
        with self.catalog.read() as connection:
            return lookups.has_captions(connection, least)

    def evidence(
        self,
        space: str,
        query: Vectors,
        text: str,
        depth: int,
        where: Filter | None = None,
        *,
        exact: bool = False,
    ) -> Evidence:
        """All that speaks for the media that are near a query by their image or by their captions.

        Args:
            space: the identity of the query's space.
            query: shape (d,).
            text: what captions are to hold words of; "" for nothing.
            depth: how many are taken by each of image, captions and words.
            exact: compare with every vector, also where the index is large.

        Raises:
            SpaceError: the index's active space is another.
        """
        return self._again(lambda: self._evidence(space, query, text, depth, where, exact))

    def _evidence(
        self,
        space: str,
        query: Vectors,
        text: str,
        depth: int,
        where: Filter | None,
        exact: bool,
    ) -> Evidence:
        with self.catalog.read() as connection:
            row = filters.require_space(connection, space)
            views = {to: self._view(connection, row, to) for to in MODALITIES}
            among = {
                to: filters.matching_ids(connection, where, to) if where else None
                for to in MODALITIES
            }
            near = {
                # An image has several captions: more of them are needed for as many images.
                to: _scores(view, query, depth if to == "image" else 4 * depth, among[to], exact)
                for to, view in views.items()
            }
            by_words = lookups.media_with_words(connection, text, depth, among["image"])
            best_words = max(by_words.values(), default=0.0)
            best: dict[int, float] = {}
            owners = lookups.caption_owners(connection, captions=list(near["caption"]))
            for caption, cosine in near["caption"].items():  # the best ones first
                best.setdefault(_row(owners, caption), cosine)
            media = sorted({*near["image"], *best, *by_words})
            if len(by_words) == depth:  # there may be more
                by_words = lookups.media_with_words(connection, text, len(media), media)
            missing = np.array(
                [number for number in media if number not in near["image"]], np.int64
            )
            near["image"].update(_scores(views["image"], query, len(missing), missing))
            owners = lookups.caption_owners(
                connection, media=[number for number in media if number not in best]
            )
            missing = np.array(sorted(owners), np.int64)
            for caption, cosine in _scores(views["caption"], query, len(missing), missing).items():
                best.setdefault(owners[caption], cosine)
            items = lookups.items(connection, "image", media)
            for number in media:
                if number not in near["image"]:
                    raise DamageError.of_catalog(f"image {number} has no vector")
        return Evidence(
            media=np.array(media, np.int64),
            items=[_row(items, number) for number in media],
            image=np.array([near["image"][number] for number in media]),
            caption=np.array([best.get(number, np.nan) for number in media]),
            words=np.array(
                [by_words.get(number, 0.0 if number in best else np.nan) for number in media]
            ),
            usual_image=Usual.of(dot_products(query, views["image"].sample)),
            usual_caption=Usual.of(dot_products(query, views["caption"].sample)),
            best_words=best_words,
        )

    def _view(self, connection: sqlite3.Connection, space: SpaceRow, to: Modality) -> VectorView:
        """The vectors as of this very transaction; the newest view is kept for the next search."""
        revision = lookups.revision_of(connection)
        with self._views_lock:
            if self._identity != self.catalog.identity:  # a repair put another in its place
                self._views.clear()
                self._identity = self.catalog.identity
            view = self._views.get((space.id, to))
            if view is not None and view.revision == revision:
                return view
            row = lookups.snapshot_of(connection, space.id, to)
            behind = view is None or view.revision < revision
            if view is not None and behind and view.generation == (row.generation if row else 0):
                view = view.advanced(connection)
            else:
                view = VectorView.load(connection, space, to, self.folder / VECTORS)
            # Another thread may have seen a newer state than this transaction does: its view stays.
            if behind:
                self._views[space.id, to] = view
                for key in [key for key in self._views if key[0] != space.id]:
                    del self._views[key]  # of the space before a switch
            return view

    def status(self) -> Status:
        with self.catalog.read() as connection:
            space = lookups.active_space(connection)
            coming = lookups.coming_space(connection)
            roots = {to_path(row.path): row.exclude for row in lookups.roots(connection)}
            return Status(
                path=self.folder,
                model=space.spec.model if space else "",
                space=space.spec.space if space else "",
                dim=space.spec.dim if space else 0,
                images=lookups.count(connection, "media"),
                captions=lookups.count(connection, "caption"),
                failures=lookups.count(connection, "failure"),
                roots=tuple(roots),
                exclude={path: globs for path, globs in roots.items() if globs},
                bytes=_size(self.folder),
                format_version=FORMAT_VERSION,
                looks=lookups.count_looks(connection, space) if space else 0,
                coming=coming.spec.model if coming else "",
                lacking=(
                    lookups.count_without_vector(connection, coming, "image") if coming else 0
                ),
            )

    def looks(self, space: str, ids: Sequence[int]) -> tuple[dict[int, bytes], dict[int, Vectors]]:
        """The second looks at some images (`store.patches` unpacks them) and their own vectors.

        Both are by id; what is not there is left out.

        Raises:
            SpaceError: the index's active space is another.
        """
        with self.catalog.read() as connection:
            row = filters.require_space(connection, space)
            own = lookups.vectors_of(connection, row, "image", ids)
            vectors = {n: lookups.vectors_from(v, row.spec.dim)[0] for n, v in own.items()}
            return lookups.looks_of(connection, row, ids), vectors

    def contents(self) -> Contents:
        """Everything that is embedded in the active space, in the order of the ids."""
        with self.catalog.read() as connection:
            space = lookups.active_space(connection)
            if space is None:
                raise IndexNotFound(f"{self.folder}: the index is empty; run 'mmsearch index PATH'")
            image_ids, images = _all(connection, space, "image")
            caption_ids, captions = _all(connection, space, "caption")
            shown = lookups.items(connection, "image", image_ids.tolist())
            texts = lookups.items(connection, "caption", caption_ids.tolist())
            facts = lookups.facts_of(connection)
            sources = lookups.caption_sources(connection)
        return Contents(
            image_ids,
            images,
            tuple(_row(shown, number).path for number in image_ids.tolist()),
            tuple(_row(facts, number) for number in image_ids.tolist()),
            caption_ids,
            captions,
            tuple(_row(texts, number).caption or "" for number in caption_ids.tolist()),
            tuple(_row(sources, number) for number in caption_ids.tolist()),
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
            writer = Writer(self.catalog, self.folder / VECTORS)
            writer.mend()
            yield writer


def _scores(
    view: VectorView, query: Vectors, k: int, among: Ids | None, exact: bool = False
) -> dict[int, float]:
    """The cosines of the k items nearest to a query (d,), by id, the nearest first."""
    scores, ids = view.search(query[None], k, among, exact=exact)[0]
    return dict(zip(ids.tolist(), scores.tolist(), strict=True))


def _all(
    connection: sqlite3.Connection, space: SpaceRow, modality: Modality
) -> tuple[Ids, Vectors]:
    parts = [(i, v) for _, i, v in lookups.embeddings_after(connection, space, modality, 0)]
    if not parts:
        return np.empty(0, np.int64), np.empty((0, space.spec.dim), np.float32)
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
            "restore' a backup, or delete its folder 'vectors' to begin anew"
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
    try:
        lock.acquire()
    except Timeout as error:
        raise IndexInUse(
            f"{folder}: another process is writing to this index; try again when it has ended"
        ) from error
    except OSError as error:
        raise UnreadableError(f"{folder}: cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _answer(found: Found, known: dict[int, Item]) -> Answer:
    scores, ids = found
    items = [_row(known, number) for number in ids.tolist()]
    return Answer([float(score) for score in scores], [int(number) for number in ids], items)


def _row(rows: Mapping[int, T], number: int) -> T:
    """The row of an item that has a vector.

    Raises:
        DamageError: there is none.
    """
    if number not in rows:
        raise DamageError.of_catalog(f"there is a vector of nothing ({number})")
    return rows[number]


def _size(folder: Path) -> int:
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a writer may put another in its place
                total += os.stat(os.path.join(top, name)).st_size
    return total

"""What a search reads of an index: everything from one moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from mmsearch.errors import DamageError, IndexNotFound
from mmsearch.store.filters import matching_ids
from mmsearch.store.queries import Queries
from mmsearch.store.rows import Item, SpaceRow, TowerRow
from mmsearch.store.vector_index import Found
from mmsearch.store.vectors import VectorView
from mmsearch.types import TEXT, Filter, Ids, Modality, Vectors

T = TypeVar("T")


class Reader:
    """One consistent view of an index, for one thread; made by `Store.reader`.

    It is all that a search needs of a store. Scores are cosines, the higher the better.
    """

    def __init__(
        self,
        queries: Queries,
        space: SpaceRow | None,
        view_of: Callable[[TowerRow], VectorView],
        views: dict[Modality, VectorView],
    ) -> None:
        """Takes what is read from one transaction, what opens a tower's vectors, and open ones."""
        self._queries = queries
        self._space = space
        self._view_of = view_of
        self._views = views
        self._matching: dict[tuple[Filter, Modality], Ids] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever added to the index: it has no space yet."""
        return self._space is None

    @property
    def space(self) -> SpaceRow:
        """The space that searches use.

        Raises:
            IndexNotFound: the index is empty.
        """
        if self._space is None:
            raise IndexNotFound("the index is empty; run 'mmsearch index PATH'")
        return self._space

    def nearest(
        self,
        modality: Modality,
        queries: Vectors,
        k: int,
        where: Filter | None = None,
        *,
        exact: bool = False,
        group_by_medium: bool = False,
    ) -> list[Found]:
        """The best k items of each query: segments, or captions where the modality is "text".

        Args:
            queries: shape (q, dim).
            exact: compare with every vector, also where the index is large.
            group_by_medium: of each file only its best.

        Raises:
            UsageError: the index's model embeds nothing of that modality.
        """
        tower = self.space.tower(modality)
        among = self._among(tower, where) if where else None
        search = self._view(tower).search
        found = search(queries, k, among, exact=exact)
        if not group_by_medium or tower.modality == TEXT or not self._queries.has_parts():
            return found
        return [self._grouped(tower, row[None], k, among, exact, one)
                for row, one in zip(queries, found, strict=True)]  # fmt: skip

    def _grouped(
        self, tower: TowerRow, query: Vectors, k: int, among: Ids | None, exact: bool, found: Found
    ) -> Found:
        """The best of each file, of one query: as many more are looked for as others hide."""
        wanted = k
        while True:
            scores, ids = found
            owners = self.items(tower.modality, ids.tolist())
            first: dict[int, int] = {}
            for place, number in enumerate(ids.tolist()):
                first.setdefault(owners[number].media_id, place)
            if len(first) >= k or len(ids) < wanted:
                rows = np.array(list(first.values())[:k], np.int64)
                return scores[rows], ids[rows]
            wanted *= 2
            found = self._view(tower).search(query, wanted, among, exact=exact)[0]

    def vectors(self, modality: Modality, ids: Ids) -> Vectors:
        """The vectors of some items, (n, dim).

        Raises:
            DamageError: one of them has none.
        """
        wanted, places = np.unique(ids, return_inverse=True)
        found, vectors = self._view(self.space.tower(modality)).vectors_of(wanted)
        if len(found) < len(wanted):
            number = np.setdiff1d(wanted, found)[0]
            raise DamageError.of_catalog(f"{modality} {number} has no vector")
        return vectors[np.argsort(found)][places]

    def background(self, modality: Modality) -> Vectors:
        """Up to 1,024 of the vectors, evenly spaced: what scores are compared with."""
        return self._view(self.space.tower(modality)).sample

    def items(self, modality: Modality, ids: Sequence[int]) -> dict[int, Item]:
        """What hits show, by id.

        Raises:
            DamageError: one of them is not there.
        """
        found = self._queries.items(self.space.tower(modality), ids)
        return {number: row_of(found, number) for number in ids}

    def words(
        self, text: str, limit: int, where: Filter | None = None, among: Sequence[int] | None = None
    ) -> dict[int, float]:
        """The media whose captions hold a word of a text, with BM25 scores, the best first.

        Args:
            limit: how many at most.
            among: only these media. The scores are the same with any of them.
        """
        if among is None and where:
            among = self._among(None, where).tolist()
        return self._queries.media_with_words(text, limit, among)

    def owners(self, modality: Modality, ids: Ids) -> Ids:
        """The files that items belong to, (n,).

        Raises:
            DamageError: an item is not there.
        """
        tower = self.space.tower(modality)
        if tower.modality != TEXT and not self._queries.has_parts():
            return ids  # a file has the id of its first segment
        found, owners = self._queries.owners(tower, items=ids)
        missing = np.setdiff1d(ids, found)
        if len(missing):
            raise vector_of_nothing(missing[0])
        order = np.argsort(found)
        return owners[order][np.searchsorted(found[order], ids)]

    def items_of(self, modality: Modality, media: Ids) -> tuple[Ids, Ids]:
        """The items of some files, and the file of each, (n,) both."""
        return self._queries.owners(self.space.tower(modality), media=media)

    def patches(self, media: Sequence[int]) -> dict[int, bytes]:
        """The patch embeddings of those of some pictures that have any (`store.patches`)."""
        return self._queries.patches_of(self.space, media)

    def has_captions(self, least: int) -> bool:
        """Whether there are so many captions."""
        return self._queries.has_captions(least)

    def _view(self, tower: TowerRow) -> VectorView:
        if tower.modality not in self._views:
            self._views[tower.modality] = self._view_of(tower)
        return self._views[tower.modality]

    def _among(self, tower: TowerRow | None, where: Filter) -> Ids:
        key = where, tower.modality if tower else ""
        if key not in self._matching:
            self._matching[key] = matching_ids(self._queries, where, tower)
        return self._matching[key]


def row_of(rows: Mapping[int, T], number: int) -> T:
    """The row of an item that has a vector.

    Raises:
        DamageError: there is none.
    """
    if number not in rows:
        raise vector_of_nothing(number)
    return rows[number]


def vector_of_nothing(number: int) -> DamageError:
    return DamageError.of_catalog(f"there is a vector of nothing ({number})")

"""Measures retrieval both ways on an index whose images have captions."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.evaluation.ranking import (
    CUTOFFS,
    NOT_FOUND,
    TIE,
    Metrics,
    Ranks,
    metrics_of,
    rank_of_best,
    recall_at,
)
from mmsearch.store.store import Contents
from mmsearch.types import Ids, Modality, OnProgress, Progress, Vectors, no_progress

#: How far down a search is followed: the TREC runs are as long.
DEPTH = 100
_BLOCK = 256  # queries compared with everything at once


Rank = Callable[[Vectors, Modality, int], list[Ids]]
"""The search that is measured: query vectors, what to find, how many; ids, best first."""


@dataclass(frozen=True)
class Corpus:
    """The labelled set as the index holds it; rows of `images` and `captions` are vectors."""

    image_ids: Ids
    images: Vectors
    image_names: tuple[str, ...]
    caption_ids: Ids
    captions: Vectors
    texts: tuple[str, ...]
    owner: NDArray[np.int64]
    """For each caption, the row of its image."""

    @cached_property
    def text_ids(self) -> NDArray[np.int64]:
        """A number for each caption, the same for equal texts."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(text, len(numbers)) for text in self.texts], np.int64)

    @cached_property
    def repeated(self) -> int:
        """How many captions say what a caption of another image says, as class names do."""
        pairs = np.unique(np.stack([self.text_ids, self.owner]), axis=1)
        images = np.bincount(pairs[0], minlength=int(self.text_ids.max(initial=-1)) + 1)
        return int((images[self.text_ids] > 1).sum())

    def says(self, images: NDArray[np.int64], texts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether images (n,) have a caption that is one of some numbered texts (t,), (n, t)."""
        place = np.full(int(self.text_ids.max(initial=-1)) + 1, -1)
        place[texts] = np.arange(len(texts))
        row = np.full(len(self.images), -1)
        row[images] = np.arange(len(images))
        found = np.zeros((len(images), len(texts)), bool)
        rows, places = row[self.owner], place[self.text_ids]
        there = (rows >= 0) & (places >= 0)
        found[rows[there], places[there]] = True
        return found

    @classmethod
    def of(cls, held: Contents) -> Corpus:
        """All that an index holds."""
        row_of = {int(number): row for row, number in enumerate(held.image_ids)}
        return cls(
            image_ids=held.image_ids,
            images=held.image_vectors,
            image_names=tuple(os.fsdecode(path) for path in held.image_paths),
            caption_ids=held.caption_ids,
            captions=held.caption_vectors,
            texts=held.caption_texts,
            owner=np.array([row_of[int(media)] for media in held.caption_media], dtype=np.int64),
        )


@dataclass(frozen=True)
class Direction:
    """One direction's result.

    `top_rows` are the rows of the gallery that the search returned for each query, in the
    order in which they count (a tie puts the false item first), and `top_scores` their scores.
    """

    name: str
    metrics: Metrics
    one_answer: Metrics | None
    """The same where equal captions are one answer; None where no two images share one."""
    loss: dict[int, float]
    """Percentage points of Recall@K that the index loses against exact ranking."""
    ranks: Ranks
    top_rows: tuple[NDArray[np.int64], ...]
    top_scores: tuple[NDArray[np.float64], ...]
    queries: NDArray[np.int64]
    """The row of each query among the corpus's captions (t2i) or images (i2t)."""


@dataclass(frozen=True)
class RetrievalResult:
    """Both directions: text to image, image to text."""

    t2i: Direction
    i2t: Direction


def evaluate(
    corpus: Corpus,
    rank: Rank,
    on_progress: OnProgress = no_progress,
) -> RetrievalResult:
    """Text to image and image to text.

    The figures are of exact ranking; beside them stands what the index's own search loses.
    Images without captions are in the gallery, but ask nothing.

    Raises:
        UsageError: no image has a caption.
    """
    if not len(corpus.captions):
        raise UsageError("no image here has a caption: there is nothing to measure")
    # What asks and what is found is once each text; images that say the same are one answer to it.
    texts, once = np.unique(corpus.text_ids, return_index=True)
    all_images = np.arange(len(corpus.images))
    images = _Side("image", corpus.images, corpus.image_ids, all_images)
    captions = _Side("caption", corpus.captions, corpus.caption_ids, corpus.owner)

    def images_that_say(queries: NDArray[np.int64]) -> NDArray[np.bool_]:
        numbers, which = np.unique(corpus.text_ids[queries], return_inverse=True)
        return corpus.says(all_images, numbers).T[which]

    def texts_that_say(queries: NDArray[np.int64]) -> NDArray[np.bool_]:
        return corpus.says(queries, texts)

    return RetrievalResult(
        _direction(
            "t2i", captions, images, np.arange(len(corpus.captions)),
            (all_images, images_that_say) if corpus.repeated else None, rank, on_progress,
        ),
        _direction(
            "i2t", images, captions, np.unique(corpus.owner),
            (once, texts_that_say) if corpus.repeated else None, rank, on_progress,
        ),
    )  # fmt: skip


class _Side(NamedTuple):
    """What asks, or the gallery: vectors, their ids and the image each belongs to."""

    modality: Modality
    vectors: Vectors
    ids: Ids
    image: NDArray[np.int64]


_OneAnswer = tuple[
    NDArray[np.int64],  # the rows of the gallery where equal captions are one
    Callable[[NDArray[np.int64]], NDArray[np.bool_]],  # what is true among them, for some queries
]


def _direction(
    name: str,
    asking: _Side,
    gallery: _Side,
    queries: NDArray[np.int64],
    one_answer: _OneAnswer | None,
    rank: Rank,
    on_progress: OnProgress,
) -> Direction:
    """One direction; `queries` are the rows of the side that asks which do ask."""
    exact, served, once = [], [], []
    top_rows: list[NDArray[np.int64]] = []
    top_scores: list[NDArray[np.float64]] = []
    by_id = np.argsort(gallery.ids)
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        vectors = asking.vectors[block]
        scores = (vectors @ gallery.vectors.T).astype(np.float64)
        true = asking.image[block, None] == gallery.image[None, :]
        exact.append(rank_of_best(scores, true))
        if one_answer is not None:
            rows, true_of = one_answer
            once.append(rank_of_best(scores[:, rows], true_of(block)))
        for own, ok, found in zip(
            scores, true, rank(vectors, gallery.modality, DEPTH), strict=True
        ):
            places = by_id[np.searchsorted(gallery.ids, found, sorter=by_id)]
            # A tie is counted against us: within it, the false item comes first.
            places = places[np.lexsort((~ok[places], -(own[places] + TIE * ~ok[places])))]
            hit = np.flatnonzero(ok[places])
            served.append(hit[0] + 1 if len(hit) else NOT_FOUND)
            top_rows.append(places)
            top_scores.append(own[places])
        on_progress(Progress(name, start + len(block), len(queries)))
    ranks, clusters = np.concatenate(exact), asking.image[queries]
    metrics = metrics_of(ranks, clusters)
    loss = {k: metrics.recall[k] - recall_at(np.array(served), k) for k in CUTOFFS}
    merged = metrics_of(np.concatenate(once), clusters) if once else None
    return Direction(
        name, metrics, merged, loss, ranks, tuple(top_rows), tuple(top_scores), queries
    )

"""Measures retrieval both ways on an index whose images have captions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

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
    has_caption = np.unique(corpus.owner)
    everything = np.arange(len(corpus.captions))
    # What asks and what is found is once each text; images that say the same are one answer to it.
    texts, once = np.unique(corpus.text_ids, return_index=True)
    all_images = np.arange(len(corpus.images))

    def images_that_say(block: NDArray[np.int64]) -> NDArray[np.bool_]:
        numbers, which = np.unique(corpus.text_ids[block], return_inverse=True)
        return corpus.says(all_images, numbers).T[which]

    def texts_that_say(block: NDArray[np.int64]) -> NDArray[np.bool_]:
        return corpus.says(has_caption[block], texts)

    t2i = _direction(
        _Task("t2i", "image", everything, corpus.owner, corpus.captions),
        (corpus.images, corpus.image_ids, all_images),
        _OneAnswer(all_images, images_that_say) if corpus.repeated else None,
        rank,
        on_progress,
    )
    i2t = _direction(
        _Task("i2t", "caption", has_caption, has_caption, corpus.images[has_caption]),
        (corpus.captions, corpus.caption_ids, corpus.owner),
        _OneAnswer(once, texts_that_say) if corpus.repeated else None,
        rank,
        on_progress,
    )
    return RetrievalResult(t2i, i2t)


@dataclass(frozen=True)
class _Task:
    """Who asks: the queries' rows in the corpus, the image each belongs to, their vectors."""

    name: str
    to: Modality
    rows: NDArray[np.int64]
    image: NDArray[np.int64]
    vectors: Vectors


@dataclass(frozen=True)
class _OneAnswer:
    """The gallery where equal captions are one: which of its rows, and what is true among them."""

    rows: NDArray[np.int64]
    true: Callable[[NDArray[np.int64]], NDArray[np.bool_]]
    """For a block of queries, (q, rows)."""


def _direction(
    task: _Task,
    gallery: tuple[Vectors, Ids, NDArray[np.int64]],
    one_answer: _OneAnswer | None,
    rank: Rank,
    on_progress: OnProgress,
) -> Direction:
    """One direction; the gallery is its vectors, their ids and the image each belongs to."""
    vectors, ids, image = gallery
    exact, served, once = [], [], []
    top_rows: list[NDArray[np.int64]] = []
    top_scores: list[NDArray[np.float64]] = []
    by_id = np.argsort(ids)
    for block in _blocks(len(task.rows)):
        queries = task.vectors[block]
        scores = (queries @ vectors.T).astype(np.float64)
        true = task.image[block, None] == image[None, :]
        exact.append(rank_of_best(scores, true))
        if one_answer is not None:
            once.append(rank_of_best(scores[:, one_answer.rows], one_answer.true(block)))
        for own, ok, found in zip(scores, true, rank(queries, task.to, DEPTH), strict=True):
            places = by_id[np.searchsorted(ids, found, sorter=by_id)]
            # A tie is counted against us: within it, the false item comes first.
            places = places[np.lexsort((~ok[places], -(own[places] + TIE * ~ok[places])))]
            hit = np.flatnonzero(ok[places])
            served.append(hit[0] + 1 if len(hit) else NOT_FOUND)
            top_rows.append(places)
            top_scores.append(own[places])
        on_progress(Progress(task.name, int(block[-1]) + 1, len(task.rows)))
    ranks, from_index = np.concatenate(exact), np.array(served)
    metrics = metrics_of(ranks, task.image)
    loss = {k: metrics.recall[k] - recall_at(from_index, k) for k in CUTOFFS}
    merged = metrics_of(np.concatenate(once), task.image) if once else None
    return Direction(
        task.name, metrics, merged, loss, ranks, tuple(top_rows), tuple(top_scores), task.rows
    )


def _blocks(count: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, count, _BLOCK):
        yield np.arange(start, min(start + _BLOCK, count))

"""What a query's candidates score, each on its own, before the scores are fused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmsearch.store.reader import Reader
from mmsearch.store.vector_index import dot_products
from mmsearch.types import IMAGE, TEXT, Filter, Ids, Vectors

#: Captions that all say the same are spread over nothing: their cosines are compared with this.
_LEAST_DEVIATION = 0.02


@dataclass(frozen=True)
class Background:
    """How the scores of one query are spread over an index."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, scores: NDArray[np.floating]) -> Background:
        if len(scores) < 2:  # nothing to compare with: the score itself has to do
            return cls(0.0, 1.0)
        return cls(float(scores.mean()), max(float(scores.std()), _LEAST_DEVIATION))

    def scaled(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """How many deviations above the mean scores are."""
        return (scores - self.mean) / self.deviation


@dataclass(frozen=True)
class CandidateScores:
    """The scores of m media for one query; sorted by id."""

    media: Ids
    ids: Ids
    """The best segment of each, (m,): what a hit shows."""
    image: NDArray[np.float64]
    """The cosine of each image, (m,)."""
    caption: NDArray[np.float64]
    """The cosine of each one's best caption, (m,); NaN where it has none."""
    words: NDArray[np.float64]
    """BM25 of each one's captions, (m,); NaN where it has none."""
    image_background: Background
    caption_background: Background
    best_words: float
    """The highest BM25 of all; 0 where no caption holds any of the words."""


def find_candidates(
    reader: Reader, query: Vectors, text: str, depth: int, where: Filter, *, exact: bool = False
) -> CandidateScores:
    """All the scores of the media that are near a query by their image or by their captions.

    Args:
        query: shape (dim,).
        text: what captions are to hold words of; "" for nothing.
        depth: how many are taken by each of image, captions and words.
        exact: compare with every vector, also where the index is large.
    """
    image = _nearest(reader, IMAGE, query, depth, where, exact)
    # An image has several captions: more of them are needed for as many images.
    captions = _nearest(reader, TEXT, query, 4 * depth, where, exact)
    words = reader.words(text, depth, where)
    best_words = max(words.values(), default=0.0)
    media = np.unique(np.concatenate([image.media, captions.media, np.array([*words], np.int64)]))
    if len(words) == depth:  # there may be more
        words = reader.words(text, len(media), among=media.tolist())
    image = image.with_rest_of(media, reader, IMAGE, query)
    captions = captions.with_rest_of(media, reader, TEXT, query)
    media = image.media  # others may have captions, too
    caption = np.full(len(media), np.nan)
    has_caption = np.isin(media, captions.media)
    caption[has_caption] = captions.cosines[np.searchsorted(captions.media, media[has_caption])]
    without_words = np.where(has_caption, 0.0, np.nan)
    return CandidateScores(
        media=media,
        ids=image.items,
        image=image.cosines,
        caption=caption,
        words=np.array(list(map(words.get, media.tolist(), without_words.tolist()))),
        image_background=Background.of(dot_products(query, reader.background(IMAGE))),
        caption_background=Background.of(dot_products(query, reader.background(TEXT))),
        best_words=best_words,
    )


@dataclass(frozen=True)
class _Best:
    """The best item of each of some files; all (n,), sorted by file."""

    media: Ids
    items: Ids
    cosines: NDArray[np.float64]

    @classmethod
    def of(cls, media: Ids, items: Ids, cosines: NDArray[np.floating]) -> _Best:
        """Takes items with the files that they are of."""
        order = np.lexsort((items, -cosines, media))
        found, first = np.unique(media[order], return_index=True)
        best = order[first]
        return cls(found, items[best], cosines[best].astype(np.float64))

    def with_rest_of(self, media: Ids, reader: Reader, modality: str, query: Vectors) -> _Best:
        """The same of more files, as far as they have such items.

        Raises:
            DamageError: an item of theirs has no vector.
        """
        items, owners = reader.items_of(modality, np.setdiff1d(media, self.media))
        cosines = dot_products(query, reader.vectors(modality, items))
        return _Best.of(
            np.concatenate([self.media, owners]),
            np.concatenate([self.items, items]),
            np.concatenate([self.cosines, cosines]),
        )


def _nearest(
    reader: Reader, modality: str, query: Vectors, k: int, where: Filter, exact: bool
) -> _Best:
    """The files of the k items nearest to a query."""
    scores, ids = reader.nearest(modality, query[None], k, where, exact=exact)[0]
    return _Best.of(reader.owners(modality, ids), ids, scores)

"""What a query's candidates score, each on its own, before the scores are fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import DamageError
from mmsearch.store.reader import Reader
from mmsearch.store.rows import Item
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


@dataclass(frozen=True)
class CandidateScores:
    """The scores of m media for one query; sorted by id."""

    media: Ids
    items: Sequence[Item]
    image: NDArray[np.float64]
    """The cosine of each image, (m,)."""
    caption: NDArray[np.float64]
    """The cosine of each one's best caption, (m,); NaN where it has none."""
    words: NDArray[np.float64]
    """BM25 of each one's best caption, (m,); NaN where it has none."""
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
    shown = reader.items(TEXT, list(captions))
    best: dict[int, float] = {}
    for number, cosine in captions.items():  # the best ones first
        best.setdefault(shown[number].media_id, cosine)
    among = reader.ids(IMAGE, where)
    words = reader.words(text, depth, None if among is None else among.tolist())
    best_words = max(words.values(), default=0.0)
    media = sorted({*image, *best, *words})
    if len(words) == depth:  # there may be more
        words = reader.words(text, len(media), media)
    image |= _cosines(reader, IMAGE, query, [one for one in media if one not in image])
    owners = reader.captions_of([one for one in media if one not in best])
    for number, cosine in _cosines(reader, TEXT, query, list(owners)).items():
        owner = owners[number]
        best[owner] = max(cosine, best.get(owner, -np.inf))
    items = reader.items(IMAGE, media)
    media = [one for one in media if items[one].modality == IMAGE]  # others may have captions, too
    for one in media:
        if one not in image:
            raise DamageError.of_catalog(f"image {one} has no vector")
    return CandidateScores(
        media=np.array(media, np.int64),
        items=[items[one] for one in media],
        image=np.array([image[one] for one in media]),
        caption=np.array([best.get(one, np.nan) for one in media]),
        words=np.array([words.get(one, 0.0 if one in best else np.nan) for one in media]),
        image_background=Background.of(dot_products(query, reader.background(IMAGE))),
        caption_background=Background.of(dot_products(query, reader.background(TEXT))),
        best_words=best_words,
    )


def _nearest(
    reader: Reader, modality: str, query: Vectors, k: int, where: Filter, exact: bool
) -> dict[int, float]:
    """The cosines of the k items nearest to a query, by id, the nearest first."""
    scores, ids = reader.nearest(modality, query[None], k, where, exact=exact)[0]
    return dict(zip(ids.tolist(), scores.tolist(), strict=True))


def _cosines(reader: Reader, modality: str, query: Vectors, ids: Sequence[int]) -> dict[int, float]:
    """The cosines of some items, by id."""
    found = reader.vectors(modality, ids)
    if not found:
        return {}
    cosines = dot_products(query, np.stack(list(found.values())))
    return dict(zip(found, cosines.tolist(), strict=True))

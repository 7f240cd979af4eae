"""What a query's candidates score, each on its own, before the scores are fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import DamageError
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
    media = sorted({*image, *captions, *words})
    if len(words) == depth:  # there may be more
        words = reader.words(text, len(media), among=media)
    image |= _of_media(reader, IMAGE, query, [one for one in media if one not in image])
    captions |= _of_media(reader, TEXT, query, [one for one in media if one not in captions])
    media = [one for one in media if one in image]  # others may have captions, too
    return CandidateScores(
        media=np.array(media, np.int64),
        ids=np.array([image[one][1] for one in media], np.int64),
        image=np.array([image[one][0] for one in media]),
        caption=np.array([captions.get(one, (np.nan, 0))[0] for one in media]),
        words=np.array([words.get(one, 0.0 if one in captions else np.nan) for one in media]),
        image_background=Background.of(dot_products(query, reader.background(IMAGE))),
        caption_background=Background.of(dot_products(query, reader.background(TEXT))),
        best_words=best_words,
    )


Best = dict[int, tuple[float, int]]
"""The cosine of each file's best item, and that item's id, by the file's id."""


def _nearest(
    reader: Reader, modality: str, query: Vectors, k: int, where: Filter, exact: bool
) -> Best:
    """The files of the k items nearest to a query."""
    scores, ids = reader.nearest(modality, query[None], k, where, exact=exact)[0]
    owners = reader.owners(modality, items=ids.tolist())
    found: Best = {}
    for cosine, number in zip(scores.tolist(), ids.tolist(), strict=True):  # the best first
        found.setdefault(owners[number], (cosine, number))
    return found


def _of_media(reader: Reader, modality: str, query: Vectors, media: Sequence[int]) -> Best:
    """The same of some files.

    Raises:
        DamageError: an item of theirs has no vector.
    """
    owners = reader.owners(modality, media=media)
    vectors = reader.vectors(modality, list(owners))
    if len(vectors) < len(owners):
        number = min(set(owners) - set(vectors))
        raise DamageError.of_catalog(f"{modality} {number} has no vector")
    if not owners:
        return {}
    cosines = dot_products(query, np.stack([vectors[number] for number in owners]))
    found: Best = {}
    for (number, owner), cosine in zip(owners.items(), cosines.tolist(), strict=True):
        found[owner] = max(found.get(owner, (-np.inf, 0)), (cosine, number))
    return found

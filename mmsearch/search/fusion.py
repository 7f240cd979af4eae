"""One score for each image from what speaks for it: the image, its captions, their words.

Late fusion (Snoek et al. 2005): every modality is scored on its own, and the scores are put
together. For a text query an image has up to three: the cosine of the image, the cosine of its
best caption, and BM25 of its captions' words. The first two are put on one scale by how the
query's scores are spread over the index, the third by the best that the query gets.

An image without captions is ranked by its image alone, on that same scale. Captions tell more
than pixels, so an image that has them stands out more where they fit: to those without, as much is
added (BARE) as they need to be found as often as they would be without fusion.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.search.candidates import CandidateScores
from mmsearch.store.files import write_durably
from mmsearch.types import Fusion

FILE_NAME = "fusion.json"
NOT_TRAINED = "no weights were trained for this index; 'mmsearch train fusion' trains them"
SOURCES = ("image", "caption", "words")
#: The best BM25 of a query counts as much as an image four deviations above the mean.
BEST_WORDS = 4.0
#: Where the best is less than this, the words stand in about as many captions as not.
LEAST_WORDS = 1.0
#: Deviations that an image without captions is given: chosen on Flickr8k's val with captions on a
#: half and on a tenth of the photos; benchmarks/fusion.py measures it on test.
BARE = 0.2
#: Fewer captions give no scale to put their scores on.
LEAST_CAPTIONS = 30
_LEAST_SHARE = 1e-6
_FAR = 8.0  # deviations: what lies beyond tells no more
#: Cormack, Clarke and Buettcher 2009.
RRF_K = 60

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Weights:
    """What each source counts; they add up to 1."""

    image: float
    caption: float
    words: float


EQUAL = Weights(1 / 3, 1 / 3, 1 / 3)


def calibrated(candidates: CandidateScores) -> NDArray[np.float64]:
    """The three scores on one scale, (3, m): NaN where there is none."""
    image = candidates.image_background.scaled(candidates.image)
    caption = candidates.caption_background.scaled(candidates.caption)
    if candidates.best_words >= LEAST_WORDS:
        words = BEST_WORDS * candidates.words / candidates.best_words
    else:  # no caption holds any word that tells captions apart
        words = np.full_like(image, np.nan)
    return np.clip(np.stack([image, caption, words]), -_FAR, _FAR)


def weighted_mean(scores: NDArray[np.float64], weights: Weights) -> Scores:
    """The mean of the scores that an item has, (m,), and BARE more where that is one."""
    share = np.array([[weights.image], [weights.caption], [weights.words]])
    there = np.isfinite(scores)
    # What an item has counts also where it would count for nothing beside what it lacks.
    share = np.where(there, np.maximum(share, _LEAST_SHARE), 0.0)
    total: Scores = np.where(there, share * scores, 0.0).sum(axis=0)
    found: Scores = total / share.sum(axis=0) + BARE * (there.sum(axis=0) == 1)
    return found


def reciprocal_ranks(scores: NDArray[np.float64]) -> Scores:
    """Reciprocal rank fusion, (m,), as a mean over the scores that an item can have.

    Cormack et al. 2009 take the sum, which has the same order where all have all scores; items
    without captions would sink.
    """
    total = np.zeros(scores.shape[1])
    for row in scores:
        there = np.isfinite(row)
        order = np.argsort(np.where(there, -row, np.inf), kind="stable")
        rank = np.empty(len(order))
        rank[order] = np.arange(1, len(order) + 1)
        total += np.where(there, 1 / (RRF_K + rank), 0.0)
    found: Scores = total / np.isfinite(scores).sum(axis=0)
    return found


def fuse(candidates: CandidateScores, how: Fusion, weights: Weights | None) -> Scores:
    """One score for each of the media, (m,): NaN for what that fusion cannot find.

    Raises:
        UsageError: "trained", and nothing was.
    """
    if how in ("image", "caption"):
        return candidates.image if how == "image" else candidates.caption
    if how == "words":
        return np.where(candidates.words > 0, candidates.words, np.nan)
    scores = calibrated(candidates)
    if how == "rrf":
        return reciprocal_ranks(scores)
    if how != "trained":
        weights = EQUAL
    elif weights is None:
        raise UsageError(NOT_TRAINED)
    return weighted_mean(scores, weights)


def write_weights(folder: Path, weights: Weights, space: str) -> None:
    """Keeps trained weights beside an index."""
    document = {"version": 1, "space": space, "weights": asdict(weights)}
    write_durably(folder / FILE_NAME, (json.dumps(document, indent=2) + "\n").encode())


def read_weights(folder: Path, space: str) -> Weights | None:
    """The weights that were trained for an index, if they were, in the space that it has.

    Raises:
        UsageError: the file is damaged.
    """
    path = folder / FILE_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = Weights(**{name: float(document["weights"][name]) for name in SOURCES})
        values = np.array([found.image, found.caption, found.words])
        if document["version"] != 1 or not (values >= 0).all() or abs(values.sum() - 1) > 1e-6:
            raise ValueError("not weights that this program understands")
        is_for = str(document["space"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: cannot be used ({error}); delete it, or train the weights again with "
            "'mmsearch train fusion'"
        ) from error
    return found if is_for == space else None

"""Retrieval metrics as pure functions of scores and ranks.

Recall@K is what the CLIP papers report: the share of queries with at least one true item among
the first K (information retrieval calls it Success@k, or hit rate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmsearch.types import Vectors

#: Scores closer than this are a tie, and a tie is counted against us.
TIE = 1e-6
CUTOFFS = (1, 5, 10)
#: Pictures that a split needs: the recalls of fewer measure nothing.
LEAST = 10
_QUERIES = 512

Ranks = NDArray[np.int64]
"""The rank of each query's best true item, from 1."""
#: The rank of an item that a search did not bring up, as far as it was followed.
NOT_FOUND = int(np.iinfo(np.int64).max)


def rank_of_best(scores: NDArray[np.floating], true: NDArray[np.bool_]) -> Ranks:
    """The rank of the best true item: one more than the false items that score as much or more.

    Args:
        scores: shape (queries, items).
        true: shape (queries, items); every row has a true item.
    """
    best = np.where(true, scores, -np.inf).max(axis=1, keepdims=True)
    # Put so that a score that is no number counts against us: no comparison with it is true.
    ahead = ~(scores <= best - TIE) & ~true
    ranks: Ranks = 1 + ahead.sum(axis=1, dtype=np.int64)
    return ranks


def recall_at(ranks: Ranks, k: int) -> float:
    """The percentage of queries whose best true item has a rank up to k."""
    return float(100 * np.mean(ranks <= k))


def recalls(ranks: Ranks) -> dict[str, float]:
    """Recall@1/5/10 in percent, by names such as "R@1"."""
    return {f"R@{k}": recall_at(ranks, k) for k in CUTOFFS}


def both_ranks(images: Vectors, texts: Vectors, owner: NDArray[np.int64]) -> dict[str, Ranks]:
    """The rank of each query's best true item, both ways; text j belongs to image `owner[j]`."""
    row = np.arange(len(images))
    return {"t2i": _ranks(texts, owner, images, row), "i2t": _ranks(images, row, texts, owner)}


def _ranks(
    queries: Vectors, of: NDArray[np.int64], items: Vectors, belong: NDArray[np.int64]
) -> Ranks:
    """Block by block: all scores at once would fill the memory of large sets."""
    found = []
    for start in range(0, len(queries), _QUERIES):
        block = slice(start, start + _QUERIES)
        true = of[block, None] == belong[None, :]
        found.append(rank_of_best(queries[block] @ items.T, true))
    return np.concatenate(found)


def both_recalls(ranks: dict[str, Ranks]) -> dict[str, float]:
    """Recall@1/5/10 of the ranks of both ways, in percent, by names such as "t2i_R@1"."""
    return {
        f"{way}_{name}": value
        for way, found in ranks.items()
        for name, value in recalls(found).items()
    }


def recall_line(recall: dict[str, float]) -> str:
    """Six recalls for people."""
    return ", ".join(
        f"{way} " + "/".join(f"{recall[f'{way}_R@{k}']:.1f}" for k in CUTOFFS)
        for way in ("t2i", "i2t")
    )


def mean_reciprocal_rank(ranks: Ranks) -> float:
    """The mean of 1 / rank."""
    return float(np.mean(1 / ranks))


def bootstrap_interval(
    values: NDArray[np.floating],
    clusters: NDArray[np.int64],
    *,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95% percentile interval of a mean, by resampling whole clusters (Efron 1979).

    The captions of one image stand or fall together, so images are drawn, not captions:
    drawing captions would claim more certainty than there is.

    Args:
        values: one for each query.
        clusters: which cluster (image) each query belongs to.
    """
    low, high = np.percentile(_resampled(values, clusters, samples, seed), [2.5, 97.5])
    return float(low), float(high)


def _resampled(
    values: NDArray[np.floating], clusters: NDArray[np.int64], samples: int, seed: int
) -> NDArray[np.float64]:
    """The means of `samples` draws, (samples,)."""
    _, cluster = np.unique(clusters, return_inverse=True)
    sums = np.bincount(cluster, weights=values)
    sizes = np.bincount(cluster).astype(np.float64)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=samples)
    means: NDArray[np.float64] = (drawn @ sums) / (drawn @ sizes)
    return means


@dataclass(frozen=True)
class Difference:
    """How much better one of two systems is on the same queries, in their own unit."""

    mean: float
    low: float
    high: float
    """The 95% interval of the mean."""

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval lies above nothing."""
        return self.low > 0


def gain_line(gain: Difference) -> str:
    """A difference for people, in points."""
    return f"{gain.mean:+.1f} points [{gain.low:+.1f}, {gain.high:+.1f}]"


def paired_difference(
    *changes: tuple[NDArray[np.floating], NDArray[np.int64]], samples: int = 2000, seed: int = 0
) -> Difference:
    """The mean of after - before, with its bootstrap interval over clusters (Efron 1979).

    Pairing takes out how hard each query is, so that smaller differences show than by
    comparing two separate intervals.

    Args:
        changes: after - before of each query, and the cluster (image) of each query. Of several
            measures over the same clusters the mean is taken: the mean of their means.
    """
    sets = [np.unique(clusters) for _, clusters in changes]
    assert all(np.array_equal(sets[0], other) for other in sets[1:])
    # One seed and one number of clusters: every measure sees the same draws.
    drawn = [_resampled(values, clusters, samples, seed) for values, clusters in changes]
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    mean = np.mean([values.mean() for values, _ in changes])
    return Difference(float(mean), float(low), float(high))


def recall_gain(
    *compared: tuple[Ranks, Ranks, NDArray[np.int64]], cutoffs: Sequence[int] = CUTOFFS
) -> Difference:
    """How many points of Recall are gained, in the mean over the cutoffs and over what is compared.

    Args:
        compared: ranks after and before, and the cluster (image) of each query.
    """
    return paired_difference(
        *(
            (100.0 * (after <= k) - 100.0 * (before <= k), clusters)
            for after, before, clusters in compared
            for k in cutoffs
        )
    )


@dataclass(frozen=True)
class Metrics:
    """One direction's figures: percentages for recall, with their 95% intervals."""

    recall: dict[int, float]
    intervals: dict[int, tuple[float, float]]
    median_rank: float
    """Infinite where half of the queries' items were not found."""
    mrr: float
    """What was not found counts nothing."""
    queries: int


def metrics_of(ranks: Ranks, clusters: NDArray[np.int64]) -> Metrics:
    """Every figure of a direction from the ranks of its queries' best true items."""
    recall = {k: recall_at(ranks, k) for k in CUTOFFS}
    intervals = {k: bootstrap_interval(100.0 * (ranks <= k), clusters) for k in CUTOFFS}
    median = float(np.median(ranks))
    median = median if median < NOT_FOUND / 4 else np.inf
    return Metrics(recall, intervals, median, mean_reciprocal_rank(ranks), len(ranks))

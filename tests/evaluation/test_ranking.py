"""Metrics against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsearch.evaluation.ranking import (
    bootstrap_interval,
    mean_reciprocal_rank,
    metrics_of,
    rank_of_best,
    recall_at,
)


def ranks(scores, true):
    return rank_of_best(np.array(scores, float), np.array(true, bool)).tolist()


def test_the_rank_counts_false_items_ahead_of_the_best_true_one():
    # Query 1: the true item scores 0.9, nothing is ahead. Query 2: 0.3, two are ahead.
    assert ranks([[0.9, 0.5, 0.1], [0.8, 0.5, 0.3]], [[1, 0, 0], [0, 0, 1]]) == [1, 3]


def test_other_true_items_are_not_ahead():
    assert ranks([[0.9, 0.8, 0.7]], [[1, 1, 0]]) == [1]
    assert ranks([[0.9, 0.8, 0.7]], [[0, 1, 1]]) == [2]


def test_a_tie_is_counted_against_us():
    assert ranks([[0.5, 0.5, 0.5]], [[0, 1, 0]]) == [3]
    assert ranks([[0.5 - 5e-7, 0.5]], [[0, 1]]) == [2]
    assert ranks([[0.5 - 2e-6, 0.5]], [[0, 1]]) == [1]


def test_recall_is_the_share_of_queries_up_to_k():
    found = np.array([1, 2, 5, 6, 11])
    assert [recall_at(found, k) for k in (1, 5, 10)] == [20.0, 60.0, 80.0]


def test_reciprocal_ranks_by_hand():
    # (1 + 1/2 + 1/4) / 3
    assert mean_reciprocal_rank(np.array([1, 2, 4])) == pytest.approx(0.583333, abs=1e-6)


def test_all_figures_of_a_direction():
    metrics = metrics_of(np.array([1, 3, 10, 12]), np.arange(4))
    assert metrics.recall == {1: 25.0, 5: 50.0, 10: 75.0}
    assert (metrics.median_rank, metrics.queries) == (6.5, 4)


def test_the_interval_of_a_mean_is_near_the_normal_one():
    rng = np.random.default_rng(1)
    values = (rng.random(2000) < 0.3).astype(float)
    low, high = bootstrap_interval(values, np.arange(2000))
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 2000)
    assert low == pytest.approx(values.mean() - spread, abs=0.004)
    assert high == pytest.approx(values.mean() + spread, abs=0.004)


def test_captions_of_one_image_count_as_one():
    """Five copies of each value say nothing new: the interval stays as wide."""
    rng = np.random.default_rng(2)
    values = (rng.random(300) < 0.4).astype(float)
    alone = bootstrap_interval(values, np.arange(300))
    copies = bootstrap_interval(np.repeat(values, 5), np.repeat(np.arange(300), 5))
    assert copies == pytest.approx(alone)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_the_rank_is_that_of_a_sorted_list(queries, items, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, (queries, items)) / 5
    true = rng.random((queries, items)) < 0.3
    true[np.arange(queries), rng.integers(0, items, queries)] = True
    expected = []
    for row, own in zip(scores, true, strict=True):
        worst_case = sorted(range(items), key=lambda i: (-row[i], own[i]))
        best = max(row[own])
        ahead = [i for i in worst_case if row[i] >= best and not own[i]]
        expected.append(1 + len(ahead))
    assert rank_of_best(scores, true).tolist() == expected


def test_a_score_that_is_no_number_counts_against_us():
    scores = np.array([[np.nan, np.nan, np.nan], [0.5, np.nan, 0.1]])
    true = np.array([[True, False, False], [True, False, False]])
    assert rank_of_best(scores, true).tolist() == [3, 2]

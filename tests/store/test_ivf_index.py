"""Inverted lists over a large snapshot: against NumPy, through filters and deletes, on disk."""

from __future__ import annotations

import numpy as np
import pytest

from mmsearch.errors import DamageError
from mmsearch.store.faiss_index import FaissIndex
from mmsearch.store.ivf_index import IvfIndex, IvfSettings

pytestmark = pytest.mark.slow

COUNT, DIM = 30_000, 32


@pytest.fixture(scope="module")
def vectors():
    """Clusters, as photos of the same things are."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(300, DIM))
    found = centres[rng.integers(300, size=COUNT)] + rng.normal(scale=0.5, size=(COUNT, DIM))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def ids():
    """In no order, and with gaps."""
    return np.random.default_rng(6).permutation(3 * COUNT)[:COUNT].astype(np.int64)


@pytest.fixture(scope="module")
def exact(vectors, ids):
    return FaissIndex.build(DIM, [(ids[:9000], vectors[:9000]), (ids[9000:], vectors[9000:])])


@pytest.fixture(scope="module")
def queries():
    rng = np.random.default_rng(7)
    found = rng.normal(size=(60, DIM))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def quick(exact, queries):
    return IvfIndex.build(exact, queries)


def with_few(index, few):
    return IvfIndex(index.index, index.exact, IvfSettings(few=few))


def brute(vectors, ids, query, k, may):
    scores = vectors[may] @ query
    order = np.lexsort((ids[may], -scores))[:k]
    return scores[order], ids[may][order]


def recall(index, vectors, ids, queries, k, may, **limits):
    """Also checks that what is found is allowed, in order, and scored by the exact vectors."""
    hits = []
    row_of = {number: row for row, number in enumerate(ids.tolist())}
    for query, (scores, found) in zip(queries, index.search(queries, k, **limits), strict=True):
        _, true = brute(vectors, ids, query, k, may)
        assert len(found) == len(set(found.tolist())) <= k
        assert set(found.tolist()) <= set(ids[may].tolist())
        assert (np.diff(scores) <= 0).all()
        rows = [row_of[number] for number in found.tolist()]
        np.testing.assert_allclose(scores, vectors[rows] @ query, atol=1e-5)
        hits.append(len(set(found.tolist()) & set(true.tolist())) / len(true))
    return np.mean(hits)


@pytest.mark.parametrize("k", [1, 10, 100])
def test_it_finds_nearly_all_of_the_best(quick, vectors, ids, queries, k):
    everything = np.ones(COUNT, bool)
    assert recall(quick, vectors, ids, queries, k, everything) > 0.97


@pytest.mark.parametrize("share", [2, 10, 100, 1000])
def test_a_filter_costs_no_recall(quick, vectors, ids, queries, share):
    quick = with_few(quick, 100)
    may = np.random.default_rng(share).random(COUNT) < 1 / share
    among = np.sort(ids[may])
    assert recall(quick, vectors, ids, queries, 10, may, among=among) > 0.97


@pytest.mark.parametrize("kind", range(4))
def test_a_filter_may_leave_what_lies_far_from_the_query(quick, vectors, ids, queries, kind):
    """As the photos of one folder lie together."""
    quick = with_few(quick, 100)
    centre = vectors[1000 * kind]
    may = vectors @ centre > np.sort(vectors @ centre)[-3000]
    limits = {"among": np.sort(ids[may])}
    assert recall(quick, vectors, ids, queries, 10, may, **limits) > 0.97
    limits = {"without": np.sort(ids[may])}
    assert recall(quick, vectors, ids, vectors[may][:60], 10, ~may, **limits) > 0.97


def test_what_was_removed_is_not_found(quick, vectors, ids, queries):
    may = np.random.default_rng(1).random(COUNT) < 0.7
    without = np.sort(ids[~may])
    assert recall(quick, vectors, ids, queries, 10, may, without=without) > 0.97
    both = np.random.default_rng(2).random(COUNT) < 0.9
    among = np.sort(ids[both])
    limits = {"among": among, "without": without}
    assert recall(quick, vectors, ids, queries, 10, may & both, **limits) > 0.97


@pytest.mark.parametrize("share", [1, 2, 7, 9, 500, 10_000])
def test_exact_search_is_exact_whatever_is_left_out(exact, vectors, ids, queries, share):
    may = np.random.default_rng(share).random(COUNT) < 1 / share
    for limits in ({"among": np.sort(ids[may])}, {"without": np.sort(ids[~may])}):
        for query, (scores, found) in zip(
            queries[:10], exact.search(queries[:10], 12, **limits), strict=True
        ):
            true_scores, true = brute(vectors, ids, query, 12, may)
            np.testing.assert_array_equal(found, true)
            np.testing.assert_allclose(scores, true_scores, atol=1e-5)


@pytest.mark.parametrize("few", [0, 1000])
def test_unknown_ids_are_nobody(exact, quick, queries, few):
    quick = with_few(quick, few)
    strange = np.array([3 * COUNT + 5, 3 * COUNT + 9])
    for index in (exact, quick):
        (scores, found), *_ = index.search(queries[:1], 5, among=strange)
        assert len(scores) == len(found) == 0


def test_more_than_inverted_lists_are_for_is_searched_exactly(quick, exact, vectors, ids, queries):
    quick = IvfIndex(quick.index, exact, IvfSettings(most=50))
    everything = np.ones(COUNT, bool)
    assert recall(quick, vectors, ids, queries[:3], 60, everything) == 1.0


def test_a_saved_index_is_mapped_and_the_same(quick, exact, queries, tmp_path):
    path = tmp_path / "ivf"
    checksum = quick.save(path)
    again = IvfIndex.open(path, exact, checksum)
    for first, second in zip(quick.search(queries, 10), again.search(queries, 10), strict=True):
        np.testing.assert_array_equal(first[1], second[1])
    # Lists of another snapshot are none for this one.
    other = FaissIndex.build(DIM, [(exact.ids[:500], exact.vectors_at(np.arange(500)))])
    with pytest.raises(DamageError, match="damaged; run 'mmsearch repair'"):
        IvfIndex.open(path, other, checksum)
    with pytest.raises(FileNotFoundError):
        IvfIndex.open(tmp_path / "none", exact, checksum)
    whole = path.read_bytes()
    for damaged in (whole[:1000], whole[:5000] + b"?" + whole[5001:]):
        path.write_bytes(damaged)
        with pytest.raises(DamageError, match="damaged; run 'mmsearch repair'"):
            IvfIndex.open(path, exact, checksum)


def test_centroids_are_taken_over(quick, exact, vectors, ids, queries, tmp_path):
    path = tmp_path / "ivf"
    quick.save(path)
    again = IvfIndex.build(exact, queries, path)
    np.testing.assert_array_equal(
        again.index.quantizer.reconstruct_n(0, again.index.nlist),
        quick.index.quantizer.reconstruct_n(0, quick.index.nlist),
    )
    assert recall(again, vectors, ids, queries, 10, np.ones(COUNT, bool)) > 0.97
    few = FaissIndex.build(DIM, [(ids[:5000], vectors[:5000])])
    assert IvfIndex.build(few, queries, path).index.nlist < quick.index.nlist


def test_queries_that_lie_apart_make_it_look_through_more_lists(exact, vectors):
    one = IvfSettings(probes=1)
    near = IvfIndex.build(exact, vectors[:200], settings=one)
    apart = IvfIndex.build(exact, -vectors[:200], settings=one)
    assert 1 < near.index.nprobe < apart.index.nprobe
    assert recall_of(apart, exact, -vectors[200:400]) > 0.96


def test_the_effort_is_kept_in_the_file(quick, exact, tmp_path):
    before, quick.index.nprobe = quick.index.nprobe, 77
    try:
        checksum = quick.save(tmp_path / "ivf")
        assert IvfIndex.open(tmp_path / "ivf", exact, checksum).index.nprobe == 77
    finally:
        quick.index.nprobe = before


def test_without_queries_more_inverted_lists_are_looked_through(exact):
    assert IvfIndex.build(exact, None).index.nprobe == 2 * IvfSettings().probes


def test_lists_of_another_code_are_made_anew(quick, exact, queries, tmp_path):
    other = IvfIndex.build(exact, queries, settings=IvfSettings(code="RaBitQ4"))
    other.save(tmp_path / "ivf")
    again = IvfIndex.build(exact, queries, tmp_path / "ivf")
    assert again.index.code_size == quick.index.code_size


def recall_of(index, exact, queries):
    pairs = zip(index.search(queries, 10), exact.search(queries, 10), strict=True)
    return np.mean([len(np.intersect1d(a[1], b[1])) / 10 for a, b in pairs])

"""The contract of every vector index: NumPy brute force, values and order."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import DIM, unit_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsearch.errors import DamageError
from mmsearch.store.faiss_index import FaissIndex
from mmsearch.store.vector_index import ExactIndex


def faiss_in_memory(ids, vectors, _folder):
    middle = len(ids) // 2
    parts = [(ids[:middle], vectors[:middle]), (ids[middle:], vectors[middle:])]
    return FaissIndex.build(DIM, [part for part in parts if len(part[0])])


def faiss_mapped(ids, vectors, folder):
    path = folder / "index.faiss"
    checksum = faiss_in_memory(ids, vectors, folder).save(path)
    return FaissIndex.open(path, checksum)


def exact(ids, vectors, _folder):
    return ExactIndex(ids, vectors)


@pytest.fixture(params=[exact, faiss_in_memory, faiss_mapped])
def make(request, tmp_path):
    return lambda ids, vectors: request.param(ids, vectors, tmp_path)


def brute_force(ids, vectors, query, k, among=None, without=None):
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    rows = [
        (-score, int(number)) for score, number in zip(scores, ids, strict=True)
        if (among is None or number in among) and (without is None or number not in without)
    ]  # fmt: skip
    return sorted(rows)[:k]


def check(index, ids, vectors, queries, k, **limits):
    sets = {name: set(chosen.tolist()) for name, chosen in limits.items() if chosen is not None}
    answers = index.search(queries, k, **limits)
    assert len(answers) == len(queries)
    for query, (scores, found) in zip(queries, answers, strict=True):
        expected = brute_force(ids, vectors, query, k, **sets)
        assert found.tolist() == [number for _, number in expected]
        np.testing.assert_allclose(scores, [-score for score, _ in expected], atol=1e-5)


@pytest.fixture
def corpus():
    rng = np.random.default_rng(1)
    ids = rng.permutation(5000)[:300].astype(np.int64) + 1
    return ids, unit_vectors(rng, 300), unit_vectors(rng, 5)


@pytest.mark.parametrize("k", [1, 10, 299, 300, 1000])
def test_finds_the_nearest_in_order(make, corpus, k):
    ids, vectors, queries = corpus
    check(make(ids, vectors), ids, vectors, queries, k)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.0])
def test_finds_only_among_the_ids_it_may(make, corpus, share):
    ids, vectors, queries = corpus
    among = np.sort(ids[: int(len(ids) * share)])
    check(make(ids, vectors), ids, vectors, queries, 10, among=among)


def test_ids_that_are_not_there_change_nothing(make, corpus):
    ids, vectors, queries = corpus
    beyond = np.array([9_000, 10_000_000], dtype=np.int64)
    check(make(ids, vectors), ids, vectors, queries, 10, without=beyond)
    check(make(ids, vectors), ids, vectors, queries, 10, among=beyond)


def test_never_finds_what_is_removed(make, corpus):
    ids, vectors, queries = corpus
    gone = np.sort(ids[::2])
    check(make(ids, vectors), ids, vectors, queries, 300, without=gone)
    check(make(ids, vectors), ids, vectors, queries, 300, without=np.sort(ids))


def test_both_limits_hold_together(make, corpus):
    ids, vectors, queries = corpus
    among, gone = np.sort(ids[:50]), np.sort(ids[25:100])
    check(make(ids, vectors), ids, vectors, queries, 40, among=among, without=gone)


def test_an_empty_index_finds_nothing(make):
    empty = make(np.empty(0, np.int64), np.empty((0, DIM), np.float32))
    ((scores, ids),) = empty.search(unit_vectors(np.random.default_rng(0), 1), 10)
    assert (len(empty), len(scores), len(ids)) == (0, 0, 0)


def test_no_query_no_answer(make, corpus):
    ids, vectors, _ = corpus
    assert make(ids, vectors).search(np.empty((0, DIM), np.float32), 3) == []


def test_equal_scores_come_in_the_order_of_their_ids(make):
    vector = np.eye(1, DIM, dtype=np.float32)  # its products are exact, in whatever order
    ids = np.array([30, 10, 20], dtype=np.int64)
    ((_, found),) = make(ids, np.repeat(vector, 3, axis=0)).search(vector, 3)
    assert found.tolist() == [10, 20, 30]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_corpus_any_limits(data):
    count = data.draw(st.integers(0, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = rng.permutation(60)[:count].astype(np.int64) + 1
    vectors, queries = unit_vectors(rng, count), unit_vectors(rng, 2)
    chosen = st.none() | st.sets(st.integers(1, 60)).map(lambda s: np.array(sorted(s), np.int64))
    limits = {"among": data.draw(chosen), "without": data.draw(chosen)}
    k = data.draw(st.integers(1, 70))
    for index in (ExactIndex(ids, vectors), faiss_in_memory(ids, vectors, None)):
        check(index, ids, vectors, queries, k, **limits)


def test_a_file_that_is_gone_or_damaged_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        FaissIndex.open(tmp_path / "none.faiss", b"")
    (tmp_path / "bad.faiss").write_bytes(b"not an index")
    with pytest.raises(DamageError, match="damaged"):
        FaissIndex.open(tmp_path / "bad.faiss", b"")


def test_a_flipped_bit_anywhere_in_the_file_is_told_of_and_never_answered_from(tmp_path):
    rng = np.random.default_rng(4)
    ids, vectors = np.arange(5, 45), unit_vectors(rng, 40)
    path = tmp_path / "index.faiss"
    checksum = FaissIndex.build(DIM, [(ids, vectors)]).save(path)
    whole = path.read_bytes()
    query = unit_vectors(rng, 1)
    expected = FaissIndex.open(path, checksum).search(query, 40)[0]
    told = 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        for ask in ({}, {"among": ids[10:20]}):
            try:
                found = FaissIndex.open(path, checksum).search(query, 40, **ask)[0]
            except DamageError as error:
                assert "mmsearch repair" in str(error)
                told += 1
                continue
            assert ask, "all is read, so all is compared"
            keep = np.isin(expected[1], ids[10:20])
            np.testing.assert_array_equal(found[1], expected[1][keep])
            np.testing.assert_allclose(found[0], expected[0][keep], atol=1e-6)
    assert told > len(whole) // 7


def test_a_delta_grows_without_a_copy_and_older_views_of_it_stay():
    rng = np.random.default_rng(8)
    vectors = unit_vectors(rng, 300)
    first = ExactIndex(np.arange(100), vectors[:100])
    second = first.extended(np.arange(100, 101), vectors[100:101])
    third = second.extended(np.arange(101, 103), vectors[101:103])
    other = second.extended(np.arange(200, 202), vectors[200:202])  # beside the third
    assert np.shares_memory(second.ids, third.ids)
    for index, rows in (
        (first, [*range(100)]), (second, [*range(101)]), (third, [*range(103)]),
        (other, [*range(101), 200, 201]),
    ):  # fmt: skip
        assert index.ids.tolist() == rows
        for query in unit_vectors(rng, 3):
            ((scores, ids),) = index.search(query[None], 5)
            expected = np.argsort(-(vectors[rows] @ query))[:5]
            assert ids.tolist() == [rows[place] for place in expected]
            np.testing.assert_allclose(scores, vectors[ids] @ query, atol=1e-6)

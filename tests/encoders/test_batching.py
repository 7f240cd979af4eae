"""Graphs of one row that are to take many: what is followed, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from openvino import Model
from openvino import opset13 as op

from mmsearch.encoders.batching import NotFollowed, take_batches
from mmsearch.encoders.onnx_folder import _is_as_good_as
from mmsearch.encoders.openvino import Graph

WEIGHTS = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)


def attention(heads, tokens=5, width=12):
    """One row, (1, tokens, width), through attention as torch's exporter writes it."""
    rng = np.random.default_rng(1)
    x = op.parameter([1, tokens, width], np.float32)
    parts = []
    for _ in range(3):
        weights = rng.normal(size=(width, width)).astype(np.float32)
        rows = op.matmul(op.transpose(x, np.int64([1, 0, 2])), weights, False, False)
        split = op.reshape(rows, np.int64([tokens, heads, width // heads]), special_zero=False)
        parts.append(op.transpose(split, np.int64([1, 0, 2])))
    query, key, value = parts
    weights = op.softmax(op.matmul(query, key, False, True), 2)
    mixed = op.transpose(op.matmul(weights, value, False, False), np.int64([1, 0, 2]))
    rows = op.reshape(mixed, np.int64([tokens, width]), special_zero=False)
    rows = op.reshape(rows, np.int64([tokens, 1, width]), special_zero=False)
    return Model([op.reduce_mean(op.transpose(rows, np.int64([1, 0, 2])), np.int64([1]))], [x])


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 12, 17])
def test_rows_do_not_mix(heads, count):
    """Also where there are as many as heads, tokens or features."""
    batch = np.random.default_rng(2).normal(size=(count, 5, 12)).astype(np.float32)
    (alone,) = Graph(attention(heads))(batch)
    graph = attention(heads)
    take_batches(graph)
    (together,) = Graph(graph)(batch)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_what_is_the_same_for_all_is_repeated():
    x = op.parameter([1, 2, 6], np.float32)
    token = op.constant(WEIGHTS[None, :1])
    graph = Model([op.reduce_sum(op.concat([token, x], 1), np.int64([1]))], [x])
    take_batches(graph)
    batch = np.random.default_rng(2).normal(size=(4, 2, 6)).astype(np.float32)
    (found,) = Graph(graph)(batch)
    np.testing.assert_allclose(found, batch.sum(1) + WEIGHTS[0], atol=1e-5)


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: op.slice(x, np.int64([0]), np.int64([1]), np.int64([1]), np.int64([0])),
        lambda x: op.softmax(x, 0),
        lambda x: op.gather(x, np.int64([0]), np.int64(0)),
        lambda x: op.reduce_mean(x, np.int64([0]), True),
        lambda x: op.concat([x, op.constant(WEIGHTS[:1])], 0),
        lambda x: op.reverse_sequence(x, np.int64([6]), 0, 1),
    ],
)
def test_what_works_along_the_rows_is_refused(cut):
    x = op.parameter([1, 6], np.float32)
    with pytest.raises(NotFollowed):
        take_batches(Model([op.matmul(cut(x), WEIGHTS, False, False)], [x]))


def test_a_graph_of_more_rows_is_refused():
    x = op.parameter([2, 6], np.float32)
    with pytest.raises(NotFollowed, match="one row"):
        take_batches(Model([op.relu(x)], [x]))


def test_rows_that_changed_places_are_noticed():
    rows = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    assert _is_as_good_as(rows + 1e-6, rows)
    assert not _is_as_good_as(rows[[1, 2, 0]], rows)
    near = rows[:1] + 1e-5 * rows  # as of pictures that a model takes for one
    assert not _is_as_good_as(near[[1, 2, 0]], near)
    assert not _is_as_good_as(rows[[0, 0, 0]], rows[[0, 0, 0]])

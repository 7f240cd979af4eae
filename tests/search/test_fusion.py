"""Late fusion against slow and obvious versions of the same."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsearch.errors import UsageError
from mmsearch.networks.fusion import LateFusion
from mmsearch.search.candidates import Background, CandidateScores
from mmsearch.search.fusion import (
    BARE,
    EQUAL,
    Weights,
    calibrated,
    fuse,
    read_weights,
    reciprocal_ranks,
    weighted_mean,
    write_weights,
)


def evidence(image, caption, words, best=None):
    image, caption, words = (np.array(part, float) for part in (image, caption, words))
    return CandidateScores(
        np.arange(len(image)), np.arange(len(image)), image, caption, words,
        Background(0.2, 0.1), Background(0.5, 0.2),
        np.nanmax([0, *words]) if best is None else best,
    )  # fmt: skip


@st.composite
def tables(draw, least=1):
    """Scores (3, items): every item has an image's; captions and words it has both or neither."""
    count = draw(st.integers(least, 12))
    values = st.floats(-5, 5, allow_nan=False).map(lambda v: round(v, 3))
    rows = [draw(st.lists(values, min_size=count, max_size=count)) for _ in range(3)]
    bare = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    found = np.array(rows)
    found[1:, np.array(bare, bool)] = np.nan
    return found


shares = st.tuples(*[st.floats(0.01, 1)] * 3).map(lambda w: Weights(*(v / sum(w) for v in w)))


@given(tables(), shares)
def test_the_weighted_mean_is_over_what_an_item_has(scores, weights):
    expected = []
    for item in scores.T:
        if np.isnan(item[1]):
            expected.append(item[0] + BARE)
        else:
            expected.append(sum(w * v for w, v in zip(vars(weights).values(), item, strict=True)))
    np.testing.assert_allclose(weighted_mean(scores, weights), expected, atol=1e-9)


@given(tables())
def test_reciprocal_ranks_are_those_of_cormack(scores):
    """A mean instead of a sum: the same order where all items have all scores."""
    totals = np.zeros(scores.shape[1])
    for row in scores:
        order = sorted(np.flatnonzero(np.isfinite(row)), key=lambda i: (-row[i], i))
        for rank, item in enumerate(order, 1):
            totals[item] += 1 / (60 + rank)
    expected = totals / np.isfinite(scores).sum(axis=0)
    np.testing.assert_allclose(reciprocal_ranks(scores), expected, atol=1e-12)


@given(tables(), shares)
def test_the_network_fuses_as_the_search_does(scores, weights):
    network = LateFusion(3, BARE)
    with torch.no_grad():
        network.logits.copy_(torch.tensor([*vars(weights).values()]).log())
    network(torch.from_numpy(scores)).sum().backward()
    assert network.logits.grad.isfinite().all()
    np.testing.assert_allclose(
        network(torch.from_numpy(scores)).detach().numpy(), weighted_mean(scores, weights),
        atol=1e-6,
    )  # fmt: skip


def test_scores_are_put_on_one_scale():
    held = evidence([0.2, 0.5], [0.9, np.nan], [6, np.nan])
    np.testing.assert_allclose(calibrated(held), [[0, 3], [2, np.nan], [4, np.nan]], atol=1e-9)


def test_words_that_no_caption_holds_tell_nothing():
    held = evidence([0.2, 0.5], [0.9, np.nan], [0, np.nan])
    assert np.isnan(calibrated(held)[2]).all()
    np.testing.assert_allclose(fuse(held, "sum", None), [1, 3 + BARE])
    common = evidence(
        [0.2, 0.5], [0.9, np.nan], [1e-6, np.nan]
    )  # as BM25 of what all captions hold
    np.testing.assert_allclose(fuse(common, "sum", None), [1, 3 + BARE])


def test_no_score_counts_more_than_it_can_tell():
    """A caption apart from a thousand equal ones lies any number of deviations away."""
    held = dataclasses.replace(
        evidence([0.2, 0.2], [0.9, 0.1], [0, 0]), caption_background=Background(0.5, 1e-6)
    )
    np.testing.assert_allclose(calibrated(held)[1], [8, -8])


def test_items_without_captions_are_ranked_by_their_image():
    """A captioned one must be as good by all it has."""
    held = evidence([0.5, 0.5, 0.5], [np.nan, 1.2, 0.6], [np.nan, 9, 1])
    scores = fuse(held, "sum", None)
    assert scores[1] > scores[0] > scores[2]
    ranks = fuse(held, "rrf", None)
    assert ranks[0] > 0.9 * ranks[1]


def test_each_fusion_ranks_by_what_it_names():
    held = evidence([0.9, 0.1, 0.5], [0.1, 0.9, np.nan], [0, 3, np.nan])
    np.testing.assert_array_equal(fuse(held, "image", None), held.image)
    np.testing.assert_array_equal(fuse(held, "caption", None), held.caption)
    np.testing.assert_array_equal(fuse(held, "words", None), [np.nan, 3, np.nan])
    only_image = Weights(1, 0, 0)
    assert np.argmax(fuse(held, "trained", only_image)) == 0
    np.testing.assert_allclose(fuse(held, "trained", EQUAL), fuse(held, "sum", None))
    with pytest.raises(UsageError, match="train fusion"):
        fuse(held, "trained", None)


def test_an_image_counts_in_full_where_it_is_all_there_is():
    """Also where captions are all that counts."""
    held = evidence([0.5, 0.5], [np.nan, 0.7], [np.nan, 0], best=0)
    np.testing.assert_allclose(fuse(held, "trained", Weights(0, 1, 0)), [3 + BARE, 1], atol=1e-4)
    np.testing.assert_allclose(fuse(held, "trained", Weights(0, 0, 1)), [3 + BARE, 2])


def test_weights_are_kept_for_the_space_that_they_were_learned_in(tmp_path):
    weights = Weights(0.5, 0.3, 0.2)
    assert read_weights(tmp_path, "x") is None
    write_weights(tmp_path, weights, "x")
    assert read_weights(tmp_path, "x") == weights
    assert read_weights(tmp_path, "y") is None
    document = json.loads((tmp_path / "fusion.json").read_text())
    without_space = {key: value for key, value in document.items() if key != "space"}
    for bad in ("no JSON", "{}", "[]", json.dumps(without_space),
                json.dumps({**document, "version": 2}),
                json.dumps({**document, "weights": {"image": 2, "caption": -1, "words": 0}}),
                json.dumps(document).replace("0.5", "NaN")):  # fmt: skip
        (tmp_path / "fusion.json").write_text(bad)
        with pytest.raises(UsageError, match="train the weights again"):
            read_weights(tmp_path, "x")

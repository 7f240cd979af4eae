"""Learning to re-rank: what it learns from, that it learns, and how it is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import DIM, FakeEncoder, FakePatchEncoder, paint, unit_vectors

from mmsearch.errors import LabelsError, TrainingError
from mmsearch.search.rerank import Mix, Parts
from mmsearch.store.patches import pack_patches, unpack_patches
from mmsearch.training import rerank
from mmsearch.training.rerank import Candidates, Photos, Recipe

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(2)
KINDS = pytest.mark.parametrize("kind", ["interaction", "attention"])


def toys(count=64, kinds=12):
    """Photos of two things each, among other patches; captions that name the two."""
    things = unit_vectors(np.random.default_rng(0), kinds)
    pairs = [(a, b) for a in range(kinds) for b in range(a)][:count]
    rng = np.random.default_rng(1)
    views = []
    for _ in range(2):
        patches = unit_vectors(rng, count * 4).reshape(count, 4, DIM)
        for row, (a, b) in enumerate(pairs):
            places = rng.permutation(4)[:2]
            patches[row, places] = things[[a, b]] + 0.05 * unit_vectors(rng, 2)
        patches /= np.linalg.norm(patches, axis=2, keepdims=True)
        views.append(pack_patches(unit_vectors(rng, count), patches))
    tokens = [np.stack([things[a], things[b]]).astype(np.float16) for a, b in pairs for _ in "12"]
    owner = np.repeat(np.arange(count), 2)
    return Photos(views, unit_vectors(rng, count), tokens, unit_vectors(rng, 2 * count), owner)


def right_ones(network, photos):
    """How many captions have their own photo first."""
    dim = photos.vectors.shape[1]
    patches = torch.from_numpy(unpack_patches(photos.patches[0], dim)[1])
    tokens = torch.from_numpy(np.stack(photos.tokens[::2]).astype(np.float32))
    there = torch.ones(tokens.shape[:2], dtype=torch.bool)
    with torch.inference_mode():
        return (network(tokens, there, patches).argmax(dim=1) == torch.arange(len(tokens))).sum()


@KINDS
def test_it_learns_and_the_same_seed_gives_the_same(kind):
    photos = toys()
    recipe = Recipe(epochs=30, batch=16, alike=4, rate=3e-3)
    told = []
    network = rerank.fit_network(photos, kind, 0, recipe, told.append)
    assert told[-1].done == told[-1].total == 30 * 4
    assert not network.training
    untaught = rerank.fit_network(photos, kind, 0, Recipe(epochs=1, batch=64, alike=1, rate=0.0))
    assert right_ones(network, photos) > max(32, right_ones(untaught, photos))
    short = Recipe(epochs=2, batch=16, alike=4)
    states = [rerank.fit_network(photos, kind, seed, short).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["token.weight"], states[2]["token.weight"])


def test_what_are_no_numbers_is_refused():
    photos = toys(8)
    photos.patches[0][0] = b"\xff" * len(photos.patches[0][0])  # float16 of all ones is none
    network = rerank.fit_network(photos, "interaction", 0, Recipe(epochs=2, batch=8, alike=1))
    with pytest.raises(TrainingError, match="no numbers"):
        rerank.export_scoring(network, DIM)


def test_every_photo_comes_once_an_epoch_beside_those_that_look_like_it():
    vectors = np.repeat(unit_vectors(RNG, 8), 16, axis=0) + 0.01 * unit_vectors(RNG, 128)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    photos = Photos([], vectors, [], vectors, np.arange(128))
    batches = rerank.batches_of(photos, Recipe(1, batch=8, alike=4), np.random.default_rng(0))
    seen = [next(batches) for _ in range(16)]
    assert sorted(np.concatenate(seen).tolist()) == list(range(128))
    alike = [len({row // 16 for row in batch.tolist()}) for batch in seen]
    assert np.mean(alike) < 3.5  # of random ones it would be above 5
    near = rerank.neighbours(vectors, 15)
    assert all({n // 16 for n in row} == {place // 16} for place, row in enumerate(near.tolist()))
    assert all(place not in row for place, row in enumerate(near.tolist()))


def test_photos_are_looked_at_in_several_views(tmp_path):
    files = [paint(tmp_path / f"{n}.png", c) for n, c in enumerate(("red", "blue", "green"))]
    files.insert(1, tmp_path / "damaged.png")
    files[1].write_bytes(b"no picture")
    captions = [["red", "so red"], ["nothing"], ["blue"], ["green", "a green thing"]]
    local = FakePatchEncoder()
    found = rerank.embed_photos(FakeEncoder(), local, files, captions, tmp_path / "cache", 0)
    assert local.looked == 3 * Recipe.views
    assert found.owner.tolist() == [0, 0, 1, 2, 2]
    assert [len(rows) for rows in found.tokens] == [1, 2, 1, 1, 3]
    expected = FakeEncoder().encode("text", ["red", "so red", "blue", "green", "a green thing"])
    np.testing.assert_allclose(found.captions, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)
    assert len({view[0] for view in found.patches}) > 1  # no view is like another
    again = rerank.embed_photos(FakeEncoder(), local, files, captions, tmp_path / "cache", 0)
    assert again.patches == found.patches
    assert local.looked == 3 * Recipe.views  # kept
    with pytest.raises(LabelsError, match="none of the 1 photos"):
        rerank.embed_photos(
            FakeEncoder(), local, files[1:2], captions[1:2], tmp_path / "cache", 0
        )  # fmt: skip


def one(true, cosines, hubness=None, match=None):
    count = len(cosines)
    zeros = np.zeros(count, np.float32)
    cosines = np.array(cosines, np.float32)
    parts = Parts(
        cosines,
        zeros if hubness is None else np.array(hubness, np.float32),
        zeros if match is None else np.array(match, np.float32),
    )
    return Candidates(true, np.arange(count), cosines, parts)


def test_the_mix_is_what_finds_most():
    """The cosine has the true one second; hubness tells, the match misleads a little."""
    found = [one(1, [0.3, 0.29, 0.1], [0.5, 0.0, 0.0], [1, 0, 0]) for _ in range(4)]
    mix = rerank.choose_mix(found)
    assert mix == Mix(0.25, 0.0)
    found = [one(2, [0.3, 0.2, 0.25], None, [0, 0, 8]) for _ in range(4)]
    assert rerank.choose_mix(found) == Mix(0.0, 1 / 120)


def test_what_is_familiar_is_read_off_captions_that_were_held_out():
    captions = unit_vectors(RNG, 40)
    queries = unit_vectors(RNG, 200)
    low, high = rerank.familiar_from(queries, captions)
    near = np.sort(queries @ captions.T, axis=1)[:, -10:].mean(axis=1)
    assert np.mean(near < low) == pytest.approx(0.01, abs=0.006)
    assert np.mean(near < high) == pytest.approx(0.1, abs=0.006)


def test_figures_by_hand():
    found = [
        one(0, [0.3, 0.2]),
        one(1, [0.3, 0.2], [0.4, 0.0]),
        one(1, [0.3, 0.2], None, [0, 3]),
        one(9, [0.3, 0.2]),  # not found at all
    ]
    recalls, gain = rerank.measure(found, Mix(0.5, 0.1))
    firsts = {step: recalls[step]["R@1"] for step in rerank.STEPS}
    assert firsts == {"first": 25, "test-time augmentation": 25, "hubness": 50, "match": 75}
    assert [values["R@5"] for values in recalls.values()] == [75] * 4
    assert gain.mean == pytest.approx(50 / 3)
    assert rerank.ranks_of(found, None).tolist() == [1, 2, 2, 10**6]

"""Learning to compose: which pairs it learns from, how it is measured, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeEncoder, unit_vectors

from mmsearch.datasets import scene_changes, scenes
from mmsearch.learning import compose
from mmsearch.learning.compose import Triplets
from mmsearch.learning.features import Features
from mmsearch.search.compose import Composer, late

RNG = np.random.default_rng(5)


def test_drawn_triplets_keep_held_out_scenes_apart():
    told = []
    learn = compose.drawn_triplets(FakeEncoder(), 60, told.append, held_out=False)
    unseen = compose.drawn_triplets(FakeEncoder(), 20, told.append, held_out=True)
    assert len(learn.kinds) == len(learn.references) == len(learn.target_ids) == 60
    assert len(set(unseen.kinds)) > 3
    assert told[-1].done == 40
    held = scene_changes.is_held_out
    made = map(scene_changes.triplet, range(200))
    chosen = [t for t in made if not (held(t.target) or held(t.reference))][:60]
    assert learn.kinds == tuple(one.kind for one in chosen)
    meanings = [scenes.meaning(one.target) for one in chosen]
    same = learn.target_ids[:, None] == learn.target_ids[None, :]
    assert same.tolist() == [[a == b for b in meanings] for a in meanings]


def test_a_photo_starts_from_those_that_its_captions_are_nearest_to():
    """Two pairs of look-alikes: each photo's reference is the other one of its pair."""
    texts = np.array(
        [[1, 0, 0], [0.9, 0.1, 0], [0, 0, 1], [0, 0.1, 0.9], [0, 0.2, 0.8]], np.float32
    )
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    owner = np.array([0, 1, 2, 3, 3])
    found = compose.photo_triplets(Features(unit_vectors(RNG, 4, 3), texts, owner, ("test",) * 4))
    assert found.reference_ids[:4].tolist() == [1, 0, 3, 2]
    assert found.reference_ids[4] == 1  # the second caption of a photo starts from the next
    assert found.target_ids.tolist() == owner.tolist()
    np.testing.assert_array_equal(found.changes, texts)


def some_triplets(count=40, shown=12):
    ids = RNG.integers(0, shown, (2, count))
    pictures = unit_vectors(RNG, shown)
    return Triplets(
        pictures[ids[0]], unit_vectors(RNG, count), pictures[ids[1]], ids[0], ids[1],
        tuple(RNG.choice(["colour", "add"], count)),
    )  # fmt: skip


@pytest.mark.parametrize("without", [False, True])
def test_ranks_are_counted_over_all_that_is_shown(without):
    part = some_triplets()
    pictures = {
        **dict(zip(part.reference_ids.tolist(), part.references, strict=True)),
        **dict(zip(part.target_ids.tolist(), part.targets, strict=True)),
    }
    if without:
        keep = part.reference_ids != part.target_ids
        part = Triplets(
            part.references[keep], part.changes[keep], part.targets[keep],
            part.reference_ids[keep], part.target_ids[keep], (),
        )  # fmt: skip
        part = Triplets(**{**vars(part), "kinds": ("add",) * int(keep.sum())})
    found = compose.ranks_of(part, late, without_reference=without)
    for row, rank in enumerate(found):
        query = part.references[row] + part.changes[row]
        cosines = {n: vector @ query / np.linalg.norm(query) for n, vector in pictures.items()}
        true = cosines.pop(int(part.target_ids[row]))
        if without:
            cosines.pop(int(part.reference_ids[row]))
        assert rank == 1 + sum(other >= true - 1e-6 for other in cosines.values())


def test_figures_are_told_by_kind_and_over_all():
    part = some_triplets()
    rows = compose.compare(part, lambda image, text: late(image, 3 * text))
    assert [row.kind for row in rows] == ["colour", "add", "all drawn scenes"]
    assert [row.queries for row in rows] == [
        part.kinds.count("colour"), part.kinds.count("add"), 40
    ]  # fmt: skip
    plain = compose.ranks_of(part, late)
    assert rows[-1].late["R@5"] == pytest.approx(100 * np.mean(plain <= 5))
    same = compose.compare(part, late)[-1]
    assert (same.gain.mean, same.gain.low, same.gain.high) == (0, 0, 0)


def swapped(count, seed):
    """A rule that no sum follows: the change says which half of the reference turns its sign."""
    rng = np.random.default_rng(seed)
    references = unit_vectors(rng, count)
    which = rng.integers(0, 2, count)
    signs = np.ones((2, references.shape[1]), np.float32)
    signs[0, :8], signs[1, 8:] = -1, -1
    changes = np.eye(references.shape[1], dtype=np.float32)[which]
    ids = np.arange(count)
    return Triplets(
        references, changes, references * signs[which], ids, ids + count, ("colour",) * count
    )


def test_a_rule_is_learned_and_the_same_seed_gives_the_same(monkeypatch):
    monkeypatch.setattr(compose, "_STEPS", 250)
    learn, unseen = swapped(2000, 0), swapped(200, 1)
    told = []
    network = compose.fit_network([learn], 0, told.append)
    composer = Composer({n: v.detach().numpy() for n, v in network.state_dict().items()})
    assert np.mean(compose.ranks_of(unseen, composer) <= 5) > 0.8
    assert np.mean(compose.ranks_of(unseen, late) <= 5) < 0.2
    assert (told[-1].done, told[-1].total) == (250, 250)
    monkeypatch.setattr(compose, "_STEPS", 5)
    once, again, other = (compose.fit_network([learn], seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not all(torch.equal(once[name], other[name]) for name in once)


def test_what_is_kept_is_what_was_measured(monkeypatch):
    for name, value in {"LEARNED": 80, "MEASURED": 30, "_STEPS": 8}.items():
        monkeypatch.setattr(compose, name, value)
    found = compose.learn_compose(FakeEncoder(), None)
    unseen = compose.drawn_triplets(FakeEncoder(), 30, lambda progress: None, held_out=True)
    assert found.measured == (compose.compare(unseen, Composer(found.weights)),)
    assert found.is_gain == (found.measured[0][-1].gain.low > 0)

"""Learning to compose: which pairs it learns from, how it is measured, and that it learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import FakeEncoder, unit_vectors

from mmsearch.datasets import scene_changes, scenes
from mmsearch.errors import UsageError
from mmsearch.search.compose import Composer, weighted_sum
from mmsearch.training import compose
from mmsearch.training.compose import Triplets
from mmsearch.training.sets import Features

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(5)


def test_drawn_triplets_keep_held_out_scenes_apart():
    told = []
    learn = compose.drawn_triplets(FakeEncoder(), 60, told.append, held_out=False)
    unseen = compose.drawn_triplets(FakeEncoder(), 20, told.append, held_out=True)
    assert len(learn.kinds) == len(learn.references) == len(learn.target_ids) == 60
    assert len(set(unseen.kinds)) > 3
    assert all(scene_changes.is_held_out(t.target) for t in compose.changes(20, held_out=True))
    of_unseen = [scenes.meaning(t.target) for t in compose.changes(20, held_out=True)]
    assert not {scenes.meaning(t.target) for t in compose.changes(60, held_out=False)} & {
        *of_unseen
    }
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
    """What is shown has another picture each time."""
    ids = RNG.integers(0, shown, (2, count))
    vectors = (unit_vectors(RNG, count) for _ in range(3))
    return Triplets(*vectors, ids[0], ids[1], tuple(RNG.choice(["colour", "add"], count)))


@pytest.mark.parametrize("without", [False, True])
def test_ranks_are_counted_over_all_that_is_shown(without):
    part = some_triplets()
    others = part.reference_ids != part.target_ids
    part = Triplets(*(np.array(value)[others] for value in vars(part).values()))
    found = compose.ranks_of(part, weighted_sum, without_reference=without)
    for row, rank in enumerate(found):
        pictures = {  # one picture of each, but of this query's own two those that it has
            **dict(zip(part.reference_ids[::-1], part.references[::-1], strict=True)),
            **dict(zip(part.target_ids[::-1], part.targets[::-1], strict=True)),
            part.reference_ids[row]: part.references[row],
            part.target_ids[row]: part.targets[row],
        }
        query = part.references[row] + part.changes[row]
        cosines = {n: vector @ query / np.linalg.norm(query) for n, vector in pictures.items()}
        true = cosines.pop(part.target_ids[row])
        if without:
            cosines.pop(part.reference_ids[row])
        assert rank == 1 + sum(other >= true - 1e-6 for other in cosines.values())


def test_a_picture_alone_finds_itself_first_and_then_never_the_target():
    part = some_triplets()
    others = part.reference_ids != part.target_ids
    part = Triplets(*(np.array(value)[others] for value in vars(part).values()))
    assert compose.ranks_of(part, lambda image, text: image).min() == 2


def test_figures_are_told_by_kind_and_over_the_better_plain_way():
    part = some_triplets()
    rows = compose.compare(part, lambda image, text: weighted_sum(image, 3 * text))
    assert [row.kind for row in rows] == ["colour", "add", "all drawn scenes"]
    assert [row.queries for row in rows] == [
        part.kinds.count("colour"), part.kinds.count("add"), 40
    ]  # fmt: skip
    assert rows[-1].targets == len(set(part.target_ids.tolist()))
    plain = {
        "sum": compose.ranks_of(part, weighted_sum),
        "text": compose.ranks_of(part, lambda image, text: text),
    }
    assert rows[-1].sum["R@5"] == pytest.approx(100 * np.mean(plain["sum"] <= 5))
    assert rows[-1].text["R@5"] == pytest.approx(100 * np.mean(plain["text"] <= 5))
    means = {way: np.mean([ranks <= k for k in (1, 5, 10)]) for way, ranks in plain.items()}
    assert rows[-1].over == max(means, key=means.get)
    mine = compose.ranks_of(part, lambda image, text: weighted_sum(image, 3 * text))
    mean = 100 * np.mean([mine <= k for k in (1, 5, 10)]) - 100 * max(means.values())
    assert rows[-1].gain.mean == pytest.approx(mean)


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


def test_a_rule_is_learned_and_the_same_seed_gives_the_same():
    learn, unseen = swapped(2000, 0), swapped(200, 1)
    told = []
    network = compose.fit_network([learn], 0, told.append, 250)
    composer = Composer(compose.export_composer(network), 16)
    assert np.mean(compose.ranks_of(unseen, composer) <= 5) > 0.8
    assert np.mean(compose.ranks_of(unseen, weighted_sum) <= 5) < 0.2
    assert (told[-1].done, told[-1].total) == (250, 250)
    once, again, other = (
        compose.fit_network([learn], seed, steps=5).state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not all(torch.equal(once[name], other[name]) for name in once)


def test_what_answers_to_the_same_words_is_not_held_against_a_target(monkeypatch):
    """Two targets of one meaning: with each other as negatives the loss could not get so low."""
    losses = []
    keep = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy",
        lambda logits, true: losses.append(logits.detach()) or keep(logits, true),
    )  # fmt: skip
    rows = unit_vectors(RNG, 4)
    part = Triplets(rows, rows, rows, np.array([5, 6, 7, 1]), np.array([1, 1, 2, 3]), ("add",) * 4)
    compose.fit_network([part], 0, steps=1)
    (logits,) = losses
    masked = torch.isinf(logits)
    # Target 1 stands twice as a target and once as a reference.
    assert sorted(masked.sum(dim=1).tolist()) == [0, 0, 2, 2]
    assert not masked.diagonal().any()


def photos_of(count, seed=0):
    """Photos in three splits whose captions say what they show."""
    rng = np.random.default_rng(seed)
    images = unit_vectors(rng, 3 * count)
    texts = np.repeat(images, 2, axis=0) + 0.1 * unit_vectors(rng, 6 * count)
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    splits = ("train",) * count + ("val",) * count + ("test",) * count
    return Features(images, texts, np.repeat(np.arange(3 * count), 2), splits)


def test_what_is_kept_is_what_was_measured_and_test_photos_are_not_learned_from():
    recipe = compose.Recipe(trained_on=80, measured_on=30, steps=8)
    photos = photos_of(20)
    found = compose.train_composer(FakeEncoder(), photos, recipe=recipe)
    composer = Composer(found.network, FakeEncoder().spec.dim)
    unseen = compose.drawn_triplets(FakeEncoder(), 30, lambda progress: None, held_out=True)
    assert found.drawn == compose.compare(unseen, composer)
    test = compose.photo_triplets(photos.of("test"))
    assert found.photos == compose.compare(test, composer)[-1]
    drawn = compose.drawn_triplets(FakeEncoder(), 80, lambda progress: None, held_out=False)
    of_photos = compose.photo_triplets(photos.of("train"))
    np.testing.assert_array_equal(of_photos.changes, photos.of("train").texts)
    # The same seed gives the same, so these are what it learned from, and in this order.
    learned = compose.export_composer(compose.fit_network([drawn, of_photos], 0, steps=8))
    assert found.network.weights == learned.weights
    without = compose.train_composer(FakeEncoder(), None, recipe=recipe)
    assert without.photos is None
    assert not without.is_for_photos


def test_photos_that_share_a_caption_are_no_change_from_each_other():
    """Photos 0, 1 and 2 are joined by captions that two of them have; 3 has its own."""
    rows = unit_vectors(RNG, 3, 3)
    texts = np.stack([rows[0], rows[0], rows[1], rows[1], rows[2]])
    owner = np.array([0, 1, 1, 2, 3])
    photos = Features(unit_vectors(RNG, 4, 3), texts, owner, ("test",) * 4)
    found = compose.photo_triplets(photos)
    assert found.target_ids.tolist() == [0, 0, 0, 0, 3]
    assert found.reference_ids.tolist() == [3, 3, 3, 3, 0]
    alike = Features(photos.images, texts[[0, 0, 0, 0]], np.arange(4), photos.splits)
    with pytest.raises(UsageError, match="all have the same captions"):
        compose.photo_triplets(alike)


class Watched(np.ndarray):
    """Vectors that count the batches that are taken of them."""

    taken = 0

    def __getitem__(self, rows):
        self.taken += 1
        return np.asarray(self)[rows]


def test_parts_have_their_share_of_the_steps():
    drawn = replace(some_triplets(90), kinds=("add",) * 90)
    photos = replace(some_triplets(30), kinds=(compose.PHOTOS,) * 30)
    for part, least, most in (
        (drawn, 3, 18),  # a quarter of 40
        (some(drawn, 5), 10, 30),  # never more than a half
    ):
        changes = photos.changes.view(Watched)
        compose.fit_network([part, replace(photos, changes=changes)], 0, steps=40)
        assert least <= changes.taken <= most


def some(part, count):
    return Triplets(*(value[:count] for value in vars(part).values()))

"""What a batch holds depends on the seed and the step, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import Rows, paired_vectors

from mmsearch.errors import LabelsError, UsageError
from mmsearch.training.batches import (
    Examples,
    Plan,
    Source,
    Taught,
    drop_words,
    load_batches,
    load_images,
)


def sources(*sizes, weights=None):
    found = []
    for number, size in enumerate(sizes):
        image, texts = paired_vectors(size, seed=number)
        weight = weights[number] if weights else 1.0
        found.append(Source(f"s{number}", Rows(image), texts, weight))
    return found


@given(st.integers(0, 300), st.integers(0, 5))
def test_a_batch_is_a_function_of_seed_and_step(step, seed):
    sets = sources(20, 9)
    first, again = Plan(sets, 8, seed), Plan(sets, 8, seed)
    for other in range(0, step, 37):
        again.batch(other)  # what was drawn before must not matter
    assert first.batch(step) == again.batch(step)


def test_no_picture_stands_twice_in_a_batch_and_every_pass_shows_most():
    plan = Plan(sources(21, 10), 8, seed=3)
    for turn in range(3):
        seen = []
        for step in range(turn * 5, turn * 5 + 5):
            places = [row.place for row in plan.batch(step) if row.source == 0]
            assert len(set(places)) == len(places) == 4
            seen += places
        assert len(set(seen)) == 20


def test_weights_share_a_batch():
    plan = Plan(sources(50, 50, 50, weights=[5, 2, 1]), 32, seed=0)
    assert plan.rows == [20, 8, 4]
    counts = np.bincount([row.source for row in plan.batch(7)])
    assert counts.tolist() == [20, 8, 4]


def test_a_batch_larger_than_a_set_is_refused():
    with pytest.raises(UsageError, match="fewer than the 16"):
        Plan(sources(8), 16, seed=0)


def test_a_weight_too_small_for_a_batch_is_refused():
    with pytest.raises(UsageError, match="no row of a batch"):
        Plan(sources(50, 50, weights=[100, 1]), 16, seed=0)


def test_processes_part_a_batch_between_them():
    sets = sources(32)
    examples, plan = Examples(sets), Plan(sets, 8, 0)
    whole = next(load_batches(examples, plan, range(3, 4)))
    parts = [next(load_batches(examples, plan, range(3, 4), rank=r, world=2)) for r in range(2)]
    for place, rank in enumerate((0, 1)):
        assert torch.equal(whole.image[place::2], parts[rank].image)
        assert torch.equal(whole.text[place::2], parts[rank].text)


def test_workers_load_what_one_process_loads():
    sets = sources(16)
    examples, plan = Examples(sets), Plan(sets, 4, 0)
    alone = list(load_batches(examples, plan, range(4)))
    helped = list(load_batches(examples, plan, range(4), workers=2))
    assert all(torch.equal(a.image, b.image) for a, b in zip(alone, helped, strict=True))


class Vanishing(Rows):
    def load(self, place, seed):
        raise LabelsError(f"{place}.png: gone")


def test_a_picture_that_vanishes_is_named_also_by_a_worker():
    """In one line: torch would put a worker's whole traceback into the message."""
    sets = [Source("x", Vanishing(torch.rand(8, 2)), [torch.ones(1, 3)] * 8)]
    for workers in (0, 1):
        batches = load_batches(Examples(sets), Plan(sets, 8, 0), range(1), workers=workers)
        with pytest.raises(LabelsError, match=r"^\d+\.png: gone$"):
            next(batches)
        with pytest.raises(LabelsError, match=r"^0\.png: gone$"):
            next(load_images(sets[0].images, 4, workers))


def test_images_come_in_order_from_workers_too():
    rows = Rows(torch.arange(10.0)[:, None])
    for workers in (0, 2):
        found = torch.cat(list(load_images(rows, 4, workers)))
        assert found.flatten().tolist() == list(range(10))


def test_a_teacher_s_vectors_belong_to_the_same_picture_and_caption():
    image, texts = paired_vectors(12)
    source = Source("s", Rows(image), texts, teacher=Taught(image, texts))
    batch = next(load_batches(Examples([source]), Plan([source], 6, 0), range(1)))
    assert torch.equal(batch.image, batch.teacher_image)
    assert torch.equal(batch.text, batch.teacher_text)


@given(st.integers(1, 9), st.floats(0, 0.95), st.integers(0, 99))
def test_dropping_words_keeps_both_ends_the_order_and_a_word(words, share, seed):
    tokens = torch.zeros(12, dtype=torch.long)
    tokens[0], tokens[words + 1] = 49406, 49407
    tokens[1 : words + 1] = torch.arange(100, 100 + words)
    found = drop_words(tokens, share, np.random.default_rng(seed))
    end = int(found.argmax())
    kept = found[1:end].tolist()
    assert found[0] == 49406
    assert found[end] == 49407
    assert len(kept) >= 1
    assert kept == sorted(kept)
    assert set(kept) <= set(tokens[1 : words + 1].tolist())
    assert (found[end + 1 :] == 0).all()
    if share == 0:
        assert torch.equal(found, tokens)

"""Drawn scenes: the same each time, varied, and described by their captions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mmsearch.datasets import scene_art, scenes
from mmsearch.datasets.scenes import COLOURS, KINDS, Scene, Thing


def test_a_seed_gives_the_same_scene_and_the_same_pixels():
    assert scenes.scene(42) == scenes.scene(42)
    first, second = (np.asarray(scene_art.render(scenes.scene(42))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (scene_art.HEIGHT, scene_art.WIDTH, 3)


def test_a_gallery_has_every_kind_and_no_caption_twice():
    gallery = scenes.gallery(150, seed=0)
    assert {scene.kind for scene in gallery} == set(KINDS)
    everything = [scenes.captions(scene)[0] for scene in gallery]
    assert len(set(everything)) == 150


def test_every_scene_is_described_by_three_different_captions():
    for seed in range(500):
        captions = scenes.captions(scenes.scene(seed))
        assert len(captions) == 3
        assert len(set(captions)) > 1
        assert all(text.strip() and text == text.strip() for text in captions)


def test_what_no_caption_says_may_vary():
    one = scenes.scene(7)
    other = replace(one, seed=8)
    assert scenes.captions(one) == scenes.captions(other)
    assert (np.asarray(scene_art.render(one)) != np.asarray(scene_art.render(other))).any()


def test_two_scenes_mean_the_same_where_one_is_the_other_turned_round():
    circle, square = Thing("circle", "red"), Thing("square", "blue")
    one = Scene("relation", (circle, square), "white", "below", 1)
    turned = Scene("relation", (square, circle), "white", "above", 2)
    assert scenes.meaning(one) == scenes.meaning(turned)
    other = replace(turned, things=(circle, square))
    assert scenes.meaning(one) != scenes.meaning(other)
    inside = replace(one, detail="inside")
    assert scenes.meaning(inside) != scenes.meaning(replace(inside, things=(square, circle)))


def centre_of(image, colour):
    pixels = np.asarray(image, dtype=int)
    near = np.abs(pixels - np.array(COLOURS[colour])).max(axis=2) < 30
    rows, columns = np.nonzero(near)
    return columns.mean(), rows.mean()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("relation", ["above", "below", "left of", "right of"])
def test_a_relation_is_drawn_as_it_is_said(relation, seed):
    scene = Scene(
        "relation", (Thing("circle", "red"), Thing("square", "blue")), "white", relation, seed
    )
    image = scene_art.render(scene)
    (x1, y1), (x2, y2) = centre_of(image, "red"), centre_of(image, "blue")
    truth = {"above": y1 < y2, "below": y1 > y2, "left of": x1 < x2, "right of": x1 > x2}
    assert truth[relation]
    assert relation in scenes.captions(scene)[0]


@pytest.mark.parametrize("count", range(2, 7))
def test_a_count_is_drawn_as_it_is_said(count):
    scene = Scene("count", (Thing("square", "red", count),), "white", "", 3)
    pixels = np.asarray(scene_art.render(scene), dtype=int)
    near = np.abs(pixels - np.array(COLOURS["red"])).max(axis=2) < 30
    assert blobs(near) == count
    assert scenes.captions(scene)[0] == f"{scenes.NUMBERS[count]} red squares"


def blobs(mask):
    """How many connected areas there are: flood fill, the slow and obvious way."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    count = 0
    while left:
        count += 1
        stack = [left.pop()]
        while stack:
            y, x = stack.pop()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
    return count

"""Changes of drawn scenes: one respect each, said in words that name it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmsearch.datasets import scene_changes, scenes
from mmsearch.datasets.scene_changes import CHANGES


def differing(one, other):
    """In which respects two scenes differ."""
    found = {name for name in ("kind", "setting", "detail") if vars(one)[name] != vars(other)[name]}
    for before, after in zip(one.things, other.things, strict=True):
        found |= {name for name in vars(before) if vars(before)[name] != vars(after)[name]}
    return found


def test_a_seed_gives_the_same_change():
    assert scene_changes.triplet(5) == scene_changes.triplet(5)
    assert scene_changes.triplet(5) != scene_changes.triplet(6)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_in_the_one_respect_that_it_says(kind):
    allowed = {
        "colour": ({"colour"}, {"setting"}), "count": ({"count"},), "shape": ({"noun"},),
        "relation": ({"detail"},), "add": ({"detail"},), "remove": ({"detail"},),
    }[kind]  # fmt: skip
    for seed in range(300):
        found = scene_changes.triplet(seed, (kind,))
        assert found.kind == kind
        assert differing(found.reference, found.target) in allowed
        assert scenes.meaning(found.reference) != scenes.meaning(found.target)
        assert found.reference.seed != found.target.seed


@pytest.mark.parametrize("kind", CHANGES)
def test_the_words_name_what_is_new_or_what_goes(kind):
    for seed in range(300):
        found = scene_changes.triplet(seed, (kind,))
        (before, after) = found.reference, found.target
        changed = [(b, a) for b, a in zip(before.things, after.things, strict=True) if a != b]
        if kind == "colour":
            named = changed[0][1].colour if changed else after.setting
        elif kind == "count":
            named = scenes.NUMBERS[changed[0][1].count]
        elif kind == "shape":
            named = changed[0][1].noun.removesuffix("y")
        elif kind == "relation":
            first, second = (thing.noun for thing in after.things)
            named = after.detail
            if found.words.index(first) > found.words.index(second):
                named = scenes.INVERSE[named]
        else:
            named = (after.detail or before.detail).removeprefix("a ")
        assert named in found.words
        goes = any(word in found.words.split() for word in ("without", "no", "remove"))
        assert goes == (kind == "remove")


def test_one_is_never_said_of_those_that_are_there():
    made = [scene_changes.triplet(seed, ("count",)) for seed in range(300)]
    single = [one for one in made if one.target.things[0].count == 1]
    assert len(single) > 10
    assert not any("of them" in one.words for one in single)


def test_an_added_thing_was_not_there_and_a_removed_one_is_gone():
    for seed in range(100):
        added = scene_changes.triplet(seed, ("add",))
        assert (added.reference.detail, bool(added.target.detail)) == ("", True)
        removed = scene_changes.triplet(seed, ("remove",))
        assert (bool(removed.reference.detail), removed.target.detail) == (True, "")


def test_a_scene_is_held_out_however_it_is_drawn_or_told():
    held = [s for s in map(scenes.scene, range(1000)) if scene_changes.is_held_out(s)]
    assert 100 < len(held) < 300
    for scene in held:
        assert scene_changes.is_held_out(replace(scene, seed=scene.seed + 1))
        if scene.detail in scenes.INVERSE and scene.kind == "relation":
            turned = replace(scene, things=scene.things[::-1], detail=scenes.INVERSE[scene.detail])
            assert scene_changes.is_held_out(turned)

"""Changes of drawn scenes: "this picture, but ..." with the picture that is meant.

Each changes one thing that captions mention, so the target is right by construction. What no
caption mentions (positions, sizes, shades) is drawn again, so that a target is not found by being
nearly the same pixels.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

from mmsearch.datasets import scenes
from mmsearch.datasets.scenes import Scene

Change = Literal["colour", "count", "shape", "relation", "add", "remove"]
CHANGES: tuple[Change, ...] = get_args(Change)

T = TypeVar("T")

_SEEDS = 1 << 40
_HELD_OUT = 5  # one scene in so many


@dataclass(frozen=True)
class Triplet:
    """A reference, how it is to change, in words, and what it then is."""

    kind: Change
    reference: Scene
    words: str
    target: Scene


def triplet(seed: int, kinds: Sequence[Change] = CHANGES) -> Triplet:
    """The change of a seed; the kinds are equally likely."""
    rng = random.Random(f"change {seed}")
    kind = rng.choice(kinds)
    reference = scenes.scene(rng.randrange(_SEEDS), _CHANGEABLE[kind])
    while not (found := _MAKERS[kind](rng, reference)):
        reference = scenes.scene(rng.randrange(_SEEDS), _CHANGEABLE[kind])
    target, phrases = found
    return Triplet(
        kind, reference, rng.choice(phrases), replace(target, seed=rng.randrange(_SEEDS))
    )


def is_held_out(scene: Scene) -> bool:
    """Whether a scene, however it is drawn, is one to measure on and not to learn from."""
    return zlib.crc32(scenes.captions(scenes.meaning(scene))[0].encode()) % _HELD_OUT == 0


_Made = tuple[Scene, list[str]] | None
_CHANGEABLE = {
    "colour": ("shape", "count", "face", "vehicle", "animal"),
    "count": ("count", "animal"),
    "shape": ("shape", "count", "relation", "vehicle", "animal"),
    "relation": ("relation",),
    "add": ("landscape", "face"),
    "remove": ("landscape", "face"),
}
#: Kinds whose things have places, and colours, of their own.
_PLACED = ("vehicle", "animal")


def _colour(rng: random.Random, what: Scene) -> _Made:
    thing = what.things[0]
    if thing.colour == "no":  # hair
        return None
    if what.kind == "shape" and rng.random() < 0.3:
        new = _other(rng, [c for c in scenes.COLOURS if c != thing.colour], what.setting)
        words = [f"but on {scenes.with_article(new)} background", f"make the background {new}",
                 f"the same with {scenes.with_article(new)} background",
                 f"the background {new} instead of {what.setting}"]  # fmt: skip
        return replace(what, setting=new), words
    if what.kind == "face":
        new = _other(rng, [hair for hair in scenes.HAIR if hair != "no"], thing.colour)
        words = [f"but with {new} hair", f"the same person with {new} hair",
                 f"make the hair {new}", f"{new} hair instead of {thing.colour}"]  # fmt: skip
    else:
        ground = [colour for colour in scenes.COLOURS if colour != what.setting]
        palette = scenes.palette(thing.noun) if what.kind in _PLACED else ground
        new = _other(rng, palette, thing.colour)
        words = [f"but {new}", f"the same in {new}",
                 f"make {'it' if thing.count == 1 else 'them'} {new}",
                 f"{new} instead of {thing.colour}", f"in {new}"]  # fmt: skip
    return replace(what, things=(replace(thing, colour=new),)), words


def _count(rng: random.Random, what: Scene) -> _Made:
    thing = what.things[0]
    new = _other(rng, range(2, 7) if what.kind == "count" else range(1, 4), thing.count)
    said, old = scenes.NUMBERS[new], scenes.NUMBERS[thing.count]
    nouns = thing.noun if new == 1 else scenes.plural(thing.noun)
    words = [f"make it {said}", f"the same with {said} {nouns}",
             f"{said} {nouns} instead of {old}", f"only {said}" if new < thing.count
             else f"more of them: {said}"]  # fmt: skip
    if new > 1:  # "one of them" would be about one of those that are there
        words.append(f"but {said} of them")
    return replace(what, things=(replace(thing, count=new),)), words


def _shape(rng: random.Random, what: Scene) -> _Made:
    thing = rng.choice(what.things)
    if what.kind in _PLACED:
        nouns = [
            noun
            for noun, places in (scenes.VEHICLES | scenes.ANIMALS).items()
            if what.setting in places and thing.colour in scenes.palette(noun)
        ]
    else:
        nouns = list(scenes.SHAPES)
    used = {one.noun for one in what.things}
    if used.issuperset(nouns):
        return None
    new = rng.choice([noun for noun in nouns if noun not in used])
    say = scenes.with_article if thing.count == 1 else scenes.plural
    one, other = say(new), say(thing.noun)
    words = [f"but {one}", f"{one} instead of {other}", f"replace {other} by {one}",
             f"{one} in place of the {_bare(other)}"]  # fmt: skip
    if len(what.things) > 1:  # which of the two has to be said
        words = words[1:]
    things = tuple(replace(t, noun=new) if t is thing else t for t in what.things)
    return replace(what, things=things), words


def _relation(rng: random.Random, what: Scene) -> _Made:
    first, second = what.things
    new = _other(rng, scenes.RELATIONS, what.detail)
    link = scenes.related(new)
    words = [
        f"but the {first.noun} {link} the {second.noun}",
        f"move the {first.noun} {link} the {second.noun}",
        f"with the {first.colour} {first.noun} {link} the {second.colour} {second.noun}",
    ]
    if new in scenes.INVERSE:
        back = scenes.related(scenes.INVERSE[new])
        words.append(f"but the {second.noun} {back} the {first.noun}")
    return replace(what, detail=new), words


def _add(rng: random.Random, what: Scene) -> _Made:
    if what.detail:
        return None
    extras = scenes.EXTRAS if what.kind == "landscape" else scenes.WEARS
    new = rng.choice([extra for extra in extras if extra])
    return replace(what, detail=new), [f"but with {new}", f"add {new}", f"with {new}",
                                       f"the same and {new}"]  # fmt: skip


def _remove(_rng: random.Random, what: Scene) -> _Made:
    if not what.detail:
        return None
    bare = _bare(what.detail)
    return replace(what, detail=""), [f"but without {what.detail}", f"remove the {bare}",
                                      f"without the {bare}", f"no {bare}"]  # fmt: skip


_MAKERS: dict[Change, Callable[[random.Random, Scene], _Made]] = {
    "colour": _colour, "count": _count, "shape": _shape,
    "relation": _relation, "add": _add, "remove": _remove,
}  # fmt: skip


def _other(rng: random.Random, choices: Sequence[T], old: T) -> T:
    return rng.choice([one for one in choices if one != old])


def _bare(phrase: str) -> str:
    """A phrase without its article."""
    return phrase.removeprefix("a ").removeprefix("an ")

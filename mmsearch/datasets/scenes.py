"""Drawn scenes: seeded pictures with captions that are right by construction.

A `Scene` is what the picture shows, `captions` says it in words and
`scene_art.render` paints it, so a caption can never drift from its picture. The demo's
gallery and a share of what the bundled model learns from come from here (from different
seeds); whoever needs pairs that differ in one respect changes a field with
`dataclasses.replace` and renders both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 130, 30),
    "yellow": (250, 208, 44),
    "green": (50, 150, 70),
    "blue": (36, 92, 200),
    "purple": (126, 60, 170),
    "pink": (244, 140, 180),
    "brown": (125, 80, 45),
    "black": (30, 30, 34),
    "white": (250, 250, 250),
    "gray": (140, 142, 148),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
RELATIONS = ("above", "below", "left of", "right of", "inside")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

SKIES = ("a clear blue sky", "a cloudy sky", "a sunset", "a starry night sky")
LANDS = ("mountains", "the sea", "a forest", "a desert", "green hills", "a city", "a snowy field")
EXTRAS = ("", "a house", "a big tree", "a sailing boat", "a hot air balloon", "a rainbow")

MOODS = ("happy", "sad", "surprised", "angry")
HAIR = ("black", "brown", "yellow", "red", "gray", "no")
WEARS = ("", "glasses", "a hat", "a beard")

VEHICLES = {
    "car": ("a city street", "a desert road", "a snowy road", "a country road"),
    "bus": ("a city street", "a country road", "a snowy road"),
    "truck": ("a desert road", "a country road", "a city street"),
    "bicycle": ("a country road", "a city street"),
    "train": ("a bridge", "the countryside"),
    "airplane": ("the clouds", "the night sky"),
    "boat": ("the open sea", "a lake"),
    "rocket": ("the night sky", "the clouds"),
}
ANIMALS = {
    "cat": ("grass", "a carpet"),
    "dog": ("grass", "snow", "a beach"),
    "rabbit": ("grass", "snow"),
    "bird": ("a branch", "the sky"),
    "fish": ("the water",),
    "snail": ("grass", "a beach"),
    "butterfly": ("flowers", "the sky"),
    "elephant": ("a savanna", "grass"),
}
FUR = ("black", "white", "brown", "gray", "orange")
BRIGHT = ("red", "orange", "yellow", "blue", "purple", "pink", "green")

#: Another way to say a word, used by every caption after a scene's first.
SYNONYMS = {
    "circle": "round disc",
    "square": "box shape",
    "gray": "grey",
    "purple": "violet",
    "yellow": "golden yellow",
    "car": "automobile",
    "truck": "lorry",
    "bicycle": "bike",
    "airplane": "plane",
    "boat": "ship",
    "rabbit": "bunny",
    "cat": "kitty",
    "dog": "puppy",
    "happy": "smiling",
    "sad": "unhappy",
    "angry": "cross-looking",
}


@dataclass(frozen=True)
class Thing:
    """Something drawn: a noun, its colour and how many of it there are."""

    noun: str
    colour: str
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """What one picture shows.

    `setting` is the place, the sky or the background colour; `detail` is what a kind
    has besides (a relation between two shapes, what a face wears, what stands in a
    landscape). `seed` moves only what no caption mentions: positions, sizes, shades.
    """

    kind: str
    things: tuple[Thing, ...]
    setting: str
    detail: str
    seed: int


KINDS = ("shape", "count", "relation", "landscape", "face", "vehicle", "animal")


def scene(seed: int, kinds: Sequence[str] = KINDS) -> Scene:
    """The scene of a seed; the kinds, all of them or those that are named, are equally likely."""
    rng = random.Random(f"scene {seed}")
    kind = rng.choice(kinds)
    return _SAMPLERS[kind](rng, seed)


def gallery(count: int, *, seed: int) -> list[Scene]:
    """`count` scenes whose first captions all differ, taken from consecutive seeds."""
    found: dict[str, Scene] = {}
    while len(found) < count:
        candidate = scene(seed)
        found.setdefault(captions(candidate)[0], candidate)
        seed += 1
    return list(found.values())


def meaning(what: Scene) -> Scene:
    """A scene as its captions tell it: equal for all that they would tell alike."""
    detail, things = what.detail, what.things
    if detail in ("below", "right of"):
        detail, things = INVERSE[detail], things[::-1]
    return replace(what, things=things, detail=detail, seed=0)


def captions(what: Scene) -> list[str]:
    """Three captions, each complete: anyone of them describes the whole scene."""
    return list(_CAPTIONS[what.kind](what))


def _two_colours(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(sorted(COLOURS), 2)
    return first, second


def _sample_shape(rng: random.Random, seed: int) -> Scene:
    colour, ground = _two_colours(rng)
    return Scene("shape", (Thing(rng.choice(SHAPES), colour),), ground, "", seed)


def _sample_count(rng: random.Random, seed: int) -> Scene:
    colour = rng.choice([c for c in sorted(COLOURS) if c != "white"])
    return Scene(
        "count", (Thing(rng.choice(SHAPES), colour, rng.randint(2, 6)),), "white", "", seed
    )


def _sample_relation(rng: random.Random, seed: int) -> Scene:
    colours = rng.sample([c for c in sorted(COLOURS) if c != "white"], 2)
    shapes = rng.sample(SHAPES, 2)
    relation = rng.choice(RELATIONS)
    things = tuple(Thing(s, c) for s, c in zip(shapes, colours, strict=True))
    return Scene("relation", things, "white", relation, seed)


def _sample_landscape(rng: random.Random, seed: int) -> Scene:
    return Scene(
        "landscape",
        (Thing(rng.choice(LANDS), ""),),
        rng.choice(SKIES),
        rng.choice(EXTRAS),
        seed,
    )


def _sample_face(rng: random.Random, seed: int) -> Scene:
    return Scene("face", (Thing(rng.choice(MOODS), rng.choice(HAIR)),), "", rng.choice(WEARS), seed)


def _sample_vehicle(rng: random.Random, seed: int) -> Scene:
    noun = rng.choice(sorted(VEHICLES))
    return Scene(
        "vehicle", (Thing(noun, rng.choice(BRIGHT)),), rng.choice(VEHICLES[noun]), "", seed
    )


def _sample_animal(rng: random.Random, seed: int) -> Scene:
    noun = rng.choice(sorted(ANIMALS))
    colour = rng.choice(BRIGHT if noun in ("bird", "fish", "butterfly") else FUR)
    thing = Thing(noun, colour, rng.choice((1, 1, 2, 3)))
    return Scene("animal", (thing,), rng.choice(ANIMALS[noun]), "", seed)


_SAMPLERS = {
    "shape": _sample_shape,
    "count": _sample_count,
    "relation": _sample_relation,
    "landscape": _sample_landscape,
    "face": _sample_face,
    "vehicle": _sample_vehicle,
    "animal": _sample_animal,
}


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def plural(noun: str) -> str:
    irregular = {"fish": "fish", "butterfly": "butterflies", "bunny": "bunnies", "kitty": "kitties",
                 "puppy": "puppies", "cross": "crosses"}  # fmt: skip
    return irregular.get(noun, noun + "s")


def _say(word: str) -> str:
    return SYNONYMS.get(word, word)


def _name(thing: Thing, *, other_words: bool = False) -> str:
    colour, noun = thing.colour, thing.noun
    if other_words:
        colour, noun = _say(colour), _say(noun)
    if thing.count == 1:
        return with_article(f"{colour} {noun}")
    return f"{NUMBERS[thing.count]} {colour} {plural(noun)}"


def _shape_captions(what: Scene) -> Iterator[str]:
    (thing,) = what.things
    ground = what.setting
    yield f"{_name(thing)} on {with_article(ground)} background"
    yield f"{with_article(ground)} picture with {_name(thing, other_words=True)} in the middle"
    yield f"one {thing.noun} painted {thing.colour}, the background is {ground}"


def _count_captions(what: Scene) -> Iterator[str]:
    (thing,) = what.things
    yield f"{_name(thing)}"
    yield f"there are {_name(thing, other_words=True)} in this picture"
    yield f"a drawing of {thing.count} {thing.colour} {plural(thing.noun)}"


#: What a relation is called from its other end; "inside" has no such word.
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def _relation_captions(what: Scene) -> Iterator[str]:
    first, second = what.things
    relation = what.detail
    link = f"to the {relation}" if relation.endswith(" of") else relation
    yield f"{_name(first)} {link} {_name(second)}"
    yield f"{_name(first, other_words=True)} is {link} {_name(second, other_words=True)}"
    inverse = INVERSE.get(relation)
    if inverse is None:
        yield f"{_name(second)} around {_name(first)}"
    else:
        turned = f"to the {inverse}" if inverse.endswith(" of") else inverse
        yield f"{_name(second)} {turned} {_name(first)}"


def _landscape_captions(what: Scene) -> Iterator[str]:
    land, sky = what.things[0].noun, what.setting
    extra = f" with {what.detail}" if what.detail else ""
    yield f"{land} under {sky}{extra}"
    yield f"a view of {land}{extra}, {sky} overhead"
    yield f"a landscape: {land} and {sky}" + (f", and there is {what.detail}" if extra else "")


def _face_captions(what: Scene) -> Iterator[str]:
    mood, hair = what.things[0].noun, what.things[0].colour
    has = "no hair" if hair == "no" else f"{hair} hair"
    bald = "a bald head" if hair == "no" else has
    wears = f" and {what.detail}" if what.detail else ""
    yield f"{with_article(mood)} face with {has}{wears}"
    yield f"a cartoon of {with_article(_say(mood))} person with {bald}{wears}"
    yield f"somebody with {bald}{wears} looks {_say(mood)}"


_PLACE = {"the clouds": "among", "the night sky": "in", "the sky": "in", "a bridge": "on"}


def _vehicle_captions(what: Scene) -> Iterator[str]:
    (thing,) = what.things
    place = what.setting
    link = _PLACE.get(place, "in" if place == "the countryside" else "on")
    yield f"{_name(thing)} {link} {place}"
    yield f"{_name(thing, other_words=True)} is seen {link} {place}"
    yield f"a drawing of {place} with {_name(thing)}"


def _animal_captions(what: Scene) -> Iterator[str]:
    (thing,) = what.things
    place = what.setting
    link = _PLACE.get(place, "in" if place in ("the water", "snow") else "on")
    yield f"{_name(thing)} {link} {place}"
    yield f"{_name(thing, other_words=True)} {link} {place}"
    yield f"a drawing with {_name(thing)}, {link} {place}"


_CAPTIONS = {
    "shape": _shape_captions,
    "count": _count_captions,
    "relation": _relation_captions,
    "landscape": _landscape_captions,
    "face": _face_captions,
    "vehicle": _vehicle_captions,
    "animal": _animal_captions,
}

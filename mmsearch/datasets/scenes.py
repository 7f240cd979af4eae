"""Drawn scenes: seeded pictures with captions that are right by construction.

A `Scene` is what the picture shows, `captions` says it in words and
`scene_art.render` paints it, so a caption can never drift from its picture. The demo's
gallery and a share of what the bundled model learns from come from here (from different
seeds); whoever needs pairs that differ in one respect changes a field with
`dataclasses.replace` and renders both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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
_ON_WHITE = sorted(set(COLOURS) - {"white"})

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
    if what.detail in ("below", "right of"):
        return replace(what, things=what.things[::-1], detail=INVERSE[what.detail], seed=0)
    return replace(what, seed=0)


def captions(what: Scene) -> list[str]:
    """Three captions, each complete: anyone of them describes the whole scene."""
    first, last = what.things[0], what.things[-1]
    setting, detail, hair = what.setting, what.detail, first.colour
    has = "no hair" if hair == "no" else f"{hair} hair"
    words = {
        "one": _name(first),
        "same_one": _name(first, _other_word),
        "another": _name(last),
        "same_another": _name(last, _other_word),
        "noun": first.noun,
        "nouns": plural(first.noun),
        "colour": first.colour,
        "count": first.count,
        "setting": setting,
        "a_setting": with_article(setting),
        "at": _PLACE.get(setting, "on"),
        "beside": related(detail),
        "back": related(INVERSE.get(detail, "around")),
        "a_mood": with_article(first.noun),
        "a_same_mood": with_article(_other_word(first.noun)),
        "same_mood": _other_word(first.noun),
        "hair": has,
        "head": "a bald head" if hair == "no" else has,
        "with_it": detail and f" with {detail}",
        "and_it": detail and f" and {detail}",
        "there_is": detail and f", and there is {detail}",
    }
    return [caption.format(**words) for caption in _CAPTIONS[what.kind]]


#: `captions` says what the names stand for; those with "same" are in other words.
_CAPTIONS = {
    "shape": (
        "{one} on {a_setting} background",
        "{a_setting} picture with {same_one} in the middle",
        "one {noun} painted {colour}, the background is {setting}",
    ),
    "count": (
        "{one}",
        "there are {same_one} in this picture",
        "a drawing of {count} {colour} {nouns}",
    ),
    "relation": (
        "{one} {beside} {another}",
        "{same_one} is {beside} {same_another}",
        "{another} {back} {one}",
    ),
    "landscape": (
        "{noun} under {setting}{with_it}",
        "a view of {noun}{with_it}, {setting} overhead",
        "a landscape: {noun} and {setting}{there_is}",
    ),
    "face": (
        "{a_mood} face with {hair}{and_it}",
        "a cartoon of {a_same_mood} person with {head}{and_it}",
        "somebody with {head}{and_it} looks {same_mood}",
    ),
    "vehicle": (
        "{one} {at} {setting}",
        "{same_one} is seen {at} {setting}",
        "a drawing of {setting} with {one}",
    ),
    "animal": (
        "{one} {at} {setting}",
        "{same_one} {at} {setting}",
        "a drawing with {one}, {at} {setting}",
    ),
}

#: What is said before a place, where that is not "on".
_PLACE = {
    "the clouds": "among",
    "the night sky": "in",
    "the sky": "in",
    "the countryside": "in",
    "the water": "in",
    "snow": "in",
}

#: What a relation is called from its other end; "inside" has no such word.
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def related(relation: str) -> str:
    """A relation as it is said between two nouns."""
    return f"to the {relation}" if relation.endswith(" of") else relation


def palette(noun: str) -> tuple[str, ...]:
    """The colours that a vehicle or an animal may have."""
    return BRIGHT if noun in VEHICLES or noun in ("bird", "fish", "butterfly") else FUR


def _sample_shape(rng: random.Random, seed: int) -> Scene:
    colour, ground = rng.sample(sorted(COLOURS), 2)
    return Scene("shape", (Thing(rng.choice(SHAPES), colour),), ground, "", seed)


def _sample_count(rng: random.Random, seed: int) -> Scene:
    colour = rng.choice(_ON_WHITE)
    thing = Thing(rng.choice(SHAPES), colour, rng.randint(2, 6))
    return Scene("count", (thing,), "white", "", seed)


def _sample_relation(rng: random.Random, seed: int) -> Scene:
    colours, shapes = rng.sample(_ON_WHITE, 2), rng.sample(SHAPES, 2)
    return Scene(
        "relation", tuple(map(Thing, shapes, colours)), "white", rng.choice(RELATIONS), seed
    )


def _sample_landscape(rng: random.Random, seed: int) -> Scene:
    land = Thing(rng.choice(LANDS), "")
    return Scene("landscape", (land,), rng.choice(SKIES), rng.choice(EXTRAS), seed)


def _sample_face(rng: random.Random, seed: int) -> Scene:
    return Scene("face", (Thing(rng.choice(MOODS), rng.choice(HAIR)),), "", rng.choice(WEARS), seed)


def _sample_vehicle(rng: random.Random, seed: int) -> Scene:
    thing = Thing(rng.choice(sorted(VEHICLES)), rng.choice(BRIGHT))
    return Scene("vehicle", (thing,), rng.choice(VEHICLES[thing.noun]), "", seed)


def _sample_animal(rng: random.Random, seed: int) -> Scene:
    noun = rng.choice(sorted(ANIMALS))
    thing = Thing(noun, rng.choice(palette(noun)), rng.choice((1, 1, 2, 3)))
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
    return ("an " if phrase.startswith(tuple("aeiou")) else "a ") + phrase


def plural(noun: str) -> str:
    irregular = {"fish": "fish", "butterfly": "butterflies", "bunny": "bunnies", "kitty": "kitties",
                 "puppy": "puppies", "cross": "crosses"}  # fmt: skip
    return irregular.get(noun, noun + "s")


def _other_word(word: str) -> str:
    return SYNONYMS.get(word, word)


def _name(thing: Thing, say: Callable[[str], str] = str) -> str:
    colour, noun = say(thing.colour), say(thing.noun)
    if thing.count == 1:
        return with_article(f"{colour} {noun}")
    return f"{NUMBERS[thing.count]} {colour} {plural(noun)}"

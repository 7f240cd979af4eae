"""Paints a `Scene` with Pillow's drawing primitives.

What always looks the same is a table of parts, which `Brush.draw` draws; what is random is code.
The random numbers of a scene are drawn in a fixed order: a change of it changes every picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw

from mmsearch.datasets.scenes import COLOURS, Scene

WIDTH, HEIGHT = 320, 240
_OVERSAMPLE = 3  # painted larger and reduced: Pillow's own primitives are not smooth

Colour = tuple[int, ...]


class Part(NamedTuple):
    """One primitive of a drawing; with a width it is stroked, without one it is filled.

    `at` is x, y, width and height of a box; the centre and the two radii of an oval; x and y of
    every point of a path. A colour that is a name is one that differs from scene to scene. `arc`
    is what there is of a stroked oval, in degrees clockwise from its right.
    """

    kind: Literal["box", "oval", "path"]
    at: tuple[float, ...]
    colour: Colour | str
    width: float = 0
    arc: tuple[float, float] = (0, 360)


Drawing = tuple[Part, ...]


def render(what: Scene) -> Image.Image:
    """The scene as an RGB picture of 320 x 240 pixels; the same scene gives the same pixels."""
    brush = Brush(random.Random(f"art {what.seed}"))
    _PAINTERS[what.kind](brush, what)
    return brush.image.resize((WIDTH, HEIGHT), Image.Resampling.BOX)


class Brush:
    """Paints in the final picture's pixels; keeps the random numbers of one scene."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.image = Image.new("RGB", (WIDTH * _OVERSAMPLE, HEIGHT * _OVERSAMPLE), "white")
        self._draw = ImageDraw.Draw(self.image)

    def shade(self, name: str, spread: int = 14) -> Colour:
        """The named colour, a little lighter or darker each time."""
        shift = self.rng.randint(-spread, spread)
        return tuple(min(255, max(0, part + shift)) for part in COLOURS[name])

    def draw(
        self, drawing: Drawing, x: float = 0, y: float = 0, scale: float = 1, **colours: Colour
    ) -> None:
        """Draws parts whose origin is at (x, y); `colours` are those that they name."""
        for kind, at, name, width, arc in drawing:
            colour = colours[name] if isinstance(name, str) else name
            if kind == "path":
                points = zip(at[::2], at[1::2], strict=True)
                placed = [n for px, py in points for n in (x + px * scale, y + py * scale)]
                self.path(placed, colour, width * scale)
                continue
            place = (x + at[0] * scale, y + at[1] * scale, at[2] * scale, at[3] * scale)
            if kind == "box":
                self.box(*place, colour)
            else:
                self.oval(*place, colour, width * scale, arc)

    def fill(self, colour: Colour) -> None:
        self.box(0, 0, WIDTH, HEIGHT, colour)

    def gradient(self, top: Colour, bottom: Colour, until: float = HEIGHT) -> None:
        for row in range(0, round(until), 2):
            self.box(0, row, WIDTH, 2, _blend(top, bottom, row / until))

    def box(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        self._draw.rectangle(_larger(x, y, x + width, y + height), fill=colour)

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Colour,
        width: float = 0, arc: tuple[float, float] = (0, 360),
    ) -> None:  # fmt: skip
        """An ellipse around (x, y) with the radii rx and ry; with a width, its outline."""
        bounds = _larger(x - rx, y - ry, x + rx, y + ry)
        if width:
            self._draw.arc(bounds, *arc, fill=colour, width=round(width * _OVERSAMPLE))
        else:
            self._draw.ellipse(bounds, fill=colour)

    def path(self, points: Sequence[float], colour: Colour, width: float = 0) -> None:
        """A polygon, given as x and y of its points in turn; with a width, a line through them."""
        if width:
            stroke = round(width * _OVERSAMPLE)
            self._draw.line(_larger(*points), fill=colour, width=stroke, joint="curve")
        else:
            self._draw.polygon(_larger(*points), fill=colour)


def _larger(*numbers: float) -> list[float]:
    return [number * _OVERSAMPLE for number in numbers]


def _blend(first: Colour, second: Colour, mix: float) -> Colour:
    return tuple(round(a + (b - a) * mix) for a, b in zip(first, second, strict=True))


WHITE, INK = (255, 255, 255), (35, 35, 40)
GRASS, SAND, SNOW = (104, 170, 84), (232, 208, 150), (240, 245, 250)
GLASS, STONE, WOOD = (176, 218, 240), (110, 110, 118), (110, 74, 44)


# -- shapes, of radius 1 -------------------------------------------------------------------


def _regular(radius: float, corners: int, inner: float = 1, y: float = 0) -> Part:
    """A regular polygon around (0, y), or a star whose every other corner is nearer to it."""
    numbers: list[float] = []
    for i in range(corners):
        angle = -math.pi / 2 + 2 * math.pi * i / corners
        reach = radius * (inner if i % 2 else 1)
        numbers += (reach * math.cos(angle), y + reach * math.sin(angle))
    return Part("path", tuple(numbers), "paint")


_SHAPES: dict[str, Drawing] = {
    "circle": (Part("oval", (0, 0, 1, 1), "paint"),),
    "ring": (Part("oval", (0, 0, 1, 1), "paint", 0.3),),
    "square": (Part("box", (-0.88, -0.88, 1.76, 1.76), "paint"),),
    "triangle": (_regular(1.1, 3, y=0.15),),
    "star": (_regular(1.1, 10, 0.42),),
    "diamond": (Part("path", (0, -1.1, 0.75, 0, 0, 1.1, -0.75, 0), "paint"),),
    "cross": (
        Part("box", (-0.3, -1, 0.6, 2), "paint"),
        Part("box", (-1, -0.3, 2, 0.6), "paint"),
    ),
    "heart": (
        Part("oval", (-0.52, -0.3, 0.52, 0.52), "paint"),
        Part("oval", (0.52, -0.3, 0.52, 0.52), "paint"),
        Part("path", (-0.98, -0.06, 0.98, -0.06, 0, 1), "paint"),
    ),
}


def _paint_shape(brush: Brush, what: Scene) -> None:
    (thing,) = what.things
    brush.fill(brush.shade(what.setting, 8))
    x, y = WIDTH / 2 + brush.rng.uniform(-25, 25), HEIGHT / 2 + brush.rng.uniform(-12, 12)
    size = brush.rng.uniform(60, 92)
    brush.draw(_SHAPES[thing.noun], x, y, size, paint=brush.shade(thing.colour, 8))


def _paint_count(brush: Brush, what: Scene) -> None:
    (thing,) = what.things
    brush.fill(brush.shade(what.setting, 4))
    cells = [(x, y) for y in (66, 174) for x in (58, 160, 262)]
    for x, y in brush.rng.sample(cells, thing.count):
        jitter, size = brush.rng.uniform(-8, 8), brush.rng.uniform(32, 42)
        paint = brush.shade(thing.colour, 8)
        brush.draw(_SHAPES[thing.noun], x + jitter, y - jitter, size, paint=paint)


def _paint_relation(brush: Brush, what: Scene) -> None:
    first, second = (_SHAPES[thing.noun] for thing in what.things)
    brush.fill(brush.shade(what.setting, 4))
    x, y = WIDTH / 2 + brush.rng.uniform(-20, 20), HEIGHT / 2
    paint, other = (brush.shade(thing.colour, 8) for thing in what.things)
    if what.detail == "inside":
        brush.draw(second, x, y, 104, paint=other)
        brush.oval(x, y, 52, 52, brush.shade("white", 4))  # room that keeps the two apart
        brush.draw(first, x, y, 36, paint=paint)
        return
    dx, dy = {"above": (0, -58), "below": (0, 58), "left of": (-72, 0), "right of": (72, 0)}[
        what.detail
    ]
    size = brush.rng.uniform(42, 50)
    brush.draw(first, x + dx, y + dy, size, paint=paint)
    brush.draw(second, x - dx, y - dy, size, paint=other)


# -- landscapes ----------------------------------------------------------------------------

_HORIZON = 150

#: By a word in its name: the colours of a sky above and below, and of the sun or the moon in it,
#: with its height and its radius.
_SKIES: dict[str, tuple[Colour, Colour, Colour, float, float]] = {
    "night": ((8, 10, 40), (30, 36, 84), (244, 240, 210), 38, 18),
    "sunset": ((120, 60, 130), (252, 160, 70), (255, 214, 110), _HORIZON - 18, 30),
    "cloud": ((150, 170, 190), (205, 214, 222), (236, 238, 242), 0, 0),
    "": ((80, 160, 236), (190, 224, 250), (255, 226, 80), 36, 20),
}
_CLOUD: Drawing = (
    Part("oval", (-1, 0.2, 0.6, 0.42), "cloud"),
    Part("oval", (0, -0.2, 0.8, 0.56), "cloud"),
    Part("oval", (0.9, 0.15, 0.65, 0.455), "cloud"),
    Part("oval", (0, 0.35, 0.7, 0.49), "cloud"),
)
_TREE: Drawing = (
    Part("box", (-0.08, -0.4, 0.16, 0.4), (100, 66, 40)),
    Part("oval", (-0.25, -0.7, 0.34, 0.32), "green"),
    Part("oval", (0.25, -0.7, 0.34, 0.32), "green"),
    Part("oval", (0, -0.92, 0.34, 0.32), "green"),
)
_FIR: Drawing = (
    _TREE[0],
    Part("path", (0, -1.1, -0.22, -0.68, 0.22, -0.68), "green"),
    Part("path", (0, -0.85, -0.3, -0.43, 0.3, -0.43), "green"),
    Part("path", (0, -0.6, -0.38, -0.18, 0.38, -0.18), "green"),
)
_SNOWCAP: Drawing = (Part("path", (-22, 24, 0, 0, 22, 24, 6, 18, -6, 26), "snow"),)
_CACTUS: Drawing = (
    Part("box", (0, 0, 11, 62), "green"),
    Part("box", (-20, 20, 20, 8), "green"),
    Part("box", (-20, 6, 8, 20), "green"),
)

#: The ground of each land.
_LANDS: dict[str, Colour] = {
    "the sea": (28, 96, 160),
    "mountains": (96, 140, 84),
    "a forest": (64, 116, 58),
    "a desert": SAND,
    "green hills": GRASS,
    "a city": (90, 92, 98),
    "a snowy field": SNOW,
}

#: What may stand in a landscape: its parts, its place down the picture and its size.
_EXTRAS: dict[str, tuple[Drawing, float, float]] = {
    "": ((), 0, 0),
    "a house": (
        (
            Part("box", (-0.5, -0.7, 1, 0.7), (236, 214, 176)),
            Part("path", (-0.6, -0.7, 0.6, -0.7, 0, -1.2), (178, 58, 44)),
            Part("box", (-0.1, -0.36, 0.22, 0.36), (104, 64, 36)),
            Part("box", (-0.34, -0.52, 0.16, 0.16), (120, 186, 226)),
            Part("box", (0.22, -0.52, 0.16, 0.16), (120, 186, 226)),
        ),
        216,
        70,
    ),
    "a big tree": (_TREE, 222, 120),
    "a sailing boat": (
        (
            Part("path", (-40, 0, 40, 0, 26, 20, -26, 20), (120, 70, 40)),
            Part("path", (-2, -6, -2, -74, -36, -6), (250, 250, 250)),
            Part("path", (4, -6, 4, -66, 32, -6), (220, 60, 60)),
        ),
        190,
        1,
    ),
    "a hot air balloon": (
        (
            Part("oval", (0, 0, 34, 38), (214, 60, 60)),
            Part("oval", (0, 0, 14, 38), (250, 210, 70)),
            Part("path", (-20, 30, -8, 58), INK, 1.5),
            Part("path", (20, 30, 8, 58), INK, 1.5),
            Part("box", (-9, 56, 18, 14), (130, 84, 44)),
        ),
        0,
        1,
    ),
    "a rainbow": (
        tuple(
            Part("oval", (0, 0, 146 - i * 8, 130 - i * 8), COLOURS[band], 8, (180, 360))
            for i, band in enumerate(("red", "orange", "yellow", "green", "blue", "purple"))
        ),
        170,
        1,
    ),
}


def _sky(brush: Brush, name: str, until: float = _HORIZON) -> None:
    x = brush.rng.uniform(60, WIDTH - 60)
    word = next(word for word in _SKIES if word in name)
    top, bottom, colour, y, radius = _SKIES[word]
    brush.gradient(top, bottom, until)
    if word == "night":
        for _ in range(45):
            r = brush.rng.uniform(0.6, 1.8)
            brush.oval(brush.rng.uniform(0, WIDTH), brush.rng.uniform(0, until), r, r, WHITE)
    if word == "cloud":
        for i in range(6):
            cx, cy = 30 + i * 56 + brush.rng.uniform(-12, 12), brush.rng.uniform(24, until * 0.6)
            brush.draw(_CLOUD, cx, cy, brush.rng.uniform(18, 30), cloud=colour)
    else:
        brush.oval(x, y, radius, radius, colour)


def _fir(brush: Brush, x: float, y: float, size: float) -> None:
    brush.draw(_FIR, x, y, size, green=brush.shade("green", 22))


def _city(brush: Brush, ground: float, *, night: bool) -> None:
    x = -6.0
    while x < WIDTH:
        width, height = brush.rng.uniform(24, 44), brush.rng.uniform(50, 116)
        wall = brush.rng.choice([(92, 100, 118), (128, 120, 124), (74, 84, 104)])
        brush.box(x, ground - height, width, height, wall)
        for wx in range(round(x) + 5, round(x + width) - 6, 9):
            for wy in range(round(ground - height) + 6, round(ground) - 8, 12):
                lit = brush.rng.random() < 0.6
                brush.box(wx, wy, 5, 6, (250, 226, 120) if night and lit else (176, 200, 220))
        x += width + 3


def _land(brush: Brush, name: str, sky: str) -> None:
    rng = brush.rng
    dim = 0.45 if "night" in sky else 0.2 if "sunset" in sky else 0.0

    def tone(colour: Colour) -> Colour:
        return _blend(colour, (14, 16, 40), dim)

    brush.box(0, _HORIZON, WIDTH, HEIGHT - _HORIZON, tone(_LANDS[name]))
    if name == "the sea":
        for _ in range(26):
            x, y = rng.uniform(0, WIDTH), rng.uniform(_HORIZON + 6, HEIGHT)
            brush.path((x, y, x + 24, y), tone((120, 180, 220)), 1.5)
    elif name == "mountains":
        for i in range(4):
            x, peak, foot = 20 + i * 92 + rng.uniform(-20, 20), rng.uniform(42, 84), _HORIZON + 2
            brush.path((x - 90, foot, x, peak, x + 90, foot), tone((112, 112, 128)))
            brush.draw(_SNOWCAP, x, peak, snow=tone(SNOW))
    elif name == "a forest":
        for i in range(22):
            _fir(brush, rng.uniform(0, WIDTH), 150 + i * 4, rng.uniform(60, 84))
    elif name == "a desert":
        for x in (70, 190, 290):
            brush.oval(x + rng.uniform(-30, 30), _HORIZON + 16, 110, 26, tone((222, 190, 124)))
        brush.draw(_CACTUS, rng.uniform(60, 250), 140, green=tone((60, 120, 60)))
    elif name == "green hills":
        for x in (40, 160, 290):
            middle, mix = x + rng.uniform(-20, 20), rng.random()
            brush.oval(middle, _HORIZON + 40, 120, 72, tone(_blend(GRASS, (60, 140, 60), mix)))
    elif name == "a city":
        _city(brush, 176, night="night" in sky)
    else:  # a snowy field
        for _ in range(5):
            _fir(brush, rng.uniform(10, WIDTH), rng.uniform(150, 190), 44)
        for _ in range(60):
            brush.oval(rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), 1.8, 1.8, WHITE)


def _paint_landscape(brush: Brush, what: Scene) -> None:
    _sky(brush, what.setting)
    _land(brush, what.things[0].noun, what.setting)
    x = brush.rng.uniform(70, WIDTH - 70)
    drawing, y, size = _EXTRAS[what.detail]
    if what.detail == "a hot air balloon":
        y = brush.rng.uniform(56, 76)
    elif what.detail == "a rainbow":
        x = WIDTH / 2
    brush.draw(drawing, x, y, size, green=brush.shade("green", 22))


# -- faces, around the middle of the head --------------------------------------------------


def _eyes(height: float, slope: float) -> Drawing:
    """Two eyes and their brows, which rise outwards by the slope (a negative one: they fall)."""
    return (
        Part("oval", (-27, -14, 13, height), WHITE),
        Part("oval", (-27, -14, 6, 6), INK),
        Part("path", (-40, -33 - slope, -14, -33 + slope), INK, 4),
        Part("oval", (27, -14, 13, height), WHITE),
        Part("oval", (27, -14, 6, 6), INK),
        Part("path", (14, -33 + slope, 40, -33 - slope), INK, 4),
    )


#: The eyes and the mouth of each mood.
_MOODS: dict[str, tuple[Drawing, Part]] = {
    "happy": (_eyes(9, 0), Part("oval", (0, 24, 32, 26), (170, 40, 50), 6, (10, 170))),
    "sad": (_eyes(9, -8), Part("oval", (0, 62, 28, 24), (150, 50, 60), 6, (200, 340))),
    "surprised": (_eyes(15, 0), Part("oval", (0, 44, 13, 18), (120, 30, 40))),
    "angry": (_eyes(9, 9), Part("path", (-26, 46, 26, 46), (140, 40, 50), 7)),
}
_NOSE = Part("path", (0, -4, -6, 18, 4, 18), "nose", 3)
_HEAD = Part("oval", (0, 0, 70, 82), "skin")
_HAIRY_HEAD: Drawing = (
    Part("oval", (0, -22, 80, 84), "hair"),
    _HEAD,
    Part("oval", (0, 0, 70, 82), "fringe", 20, (200, 340)),
)

#: What a face wears under its mouth and over it.
_WEARS: dict[str, tuple[Drawing, Drawing]] = {
    "": ((), ()),
    "a beard": ((Part("oval", (0, 0, 70, 82), "beard", 26, (20, 160)),), ()),
    "glasses": (
        (),
        (
            Part("oval", (-27, -14, 22, 20), INK, 4),
            Part("oval", (27, -14, 22, 20), INK, 4),
            Part("path", (-6, -14, 6, -14), INK, 4),
        ),
    ),
    "a hat": (
        (),
        (Part("box", (-96, -78, 192, 14), "hat"), Part("box", (-56, -124, 112, 52), "hat")),
    ),
}


def _paint_face(brush: Brush, what: Scene) -> None:
    rng, mood, hair = brush.rng, what.things[0].noun, what.things[0].colour
    brush.fill(rng.choice([(200, 224, 240), (226, 240, 214), (250, 232, 210), (232, 222, 244)]))
    skin = rng.choice([(255, 220, 186), (240, 194, 150), (198, 140, 96), (130, 86, 58)])
    x = WIDTH / 2 + rng.uniform(-16, 16)
    colours: dict[str, Colour] = {"skin": skin, "nose": _blend(skin, INK, 0.35)}
    if hair != "no":
        colours |= {"hair": brush.shade(hair), "fringe": brush.shade(hair)}
    if what.detail == "a beard":
        colours["beard"] = brush.shade("brown" if hair == "no" else hair)
    elif what.detail == "a hat":
        colours["hat"] = brush.shade(rng.choice(["red", "blue", "green", "purple"]))
    head = (_HEAD,) if hair == "no" else _HAIRY_HEAD
    (eyes, mouth), (under, over) = _MOODS[mood], _WEARS[what.detail]
    brush.draw((*head, *eyes, _NOSE, *under, mouth, *over), x, 128, 1, **colours)


# -- vehicles ------------------------------------------------------------------------------


def _wheels(r: float, y: float, *xs: float) -> Drawing:
    return tuple(
        Part("oval", (x, y, radius, radius), colour)
        for x in xs
        for radius, colour in ((r, INK), (r * 0.45, (190, 190, 196)))
    )


def _wagon(left: float, top: float) -> Drawing:
    return (
        Part("box", (left, top, 98, 62), "body"),
        *(Part("box", (left + x, -64, 20, 22), GLASS) for x in (10, 38, 66)),
        *_wheels(11, -8, left + 20, left + 78),
    )


#: How far down the picture each vehicle is, and its parts.
_VEHICLES: dict[str, tuple[float, Drawing]] = {
    "car": (
        206,
        (
            Part("path", (-46, -34, -28, -62, 30, -62, 50, -34), "body"),
            Part("path", (-36, -36, -23, -56, -2, -56, -2, -36), GLASS),
            Part("path", (5, -36, 5, -56, 26, -56, 39, -36), GLASS),
            Part("box", (-78, -36, 156, 28), "body"),
            *_wheels(17, -8, -44, 44),
        ),
    ),
    "bus": (
        206,
        (
            Part("box", (-96, -88, 192, 80), "body"),
            *(Part("box", (x, -76, 22, 26), GLASS) for x in range(-86, 94, 30)),
            *_wheels(17, -6, -58, 58),
        ),
    ),
    "truck": (
        206,
        (
            Part("box", (-96, -92, 128, 82), "body"),
            Part("path", (38, -10, 38, -66, 70, -66, 94, -36, 94, -10), "dark"),
            Part("path", (48, -36, 48, -58, 67, -58, 82, -36), GLASS),
            *_wheels(16, -6, -66, -28, 68),
        ),
    ),
    "bicycle": (
        206,
        (
            Part("oval", (-48, -32, 32, 32), INK, 4),
            Part("oval", (48, -32, 32, 32), INK, 4),
            Part("path", (-48, -32, -18, -78, 34, -78, 0, -32, -48, -32), "body", 6),
            Part("path", (-18, -78, 0, -32), "body", 6),
            Part("path", (48, -32, 32, -92, 48, -96), "body", 6),
            Part("path", (-34, -88, -6, -88), INK, 7),
        ),
    ),
    "train": (
        190,
        (
            *_wagon(-150, -74),
            *_wagon(-44, -74),
            *_wagon(62, -84),
            Part("path", (-150, -22, 160, -22), INK, 4),
        ),
    ),
    "airplane": (
        112,
        (
            Part("path", (-104, -4, -122, -44, -100, -44, -70, -6), "body"),
            Part("oval", (0, 0, 108, 20), "body"),
            Part("path", (-6, 4, 34, 4, -30, 62, -52, 62), "dark"),
            *(Part("oval", (x, -4, 5, 5), GLASS) for x in range(-60, 80, 20)),
        ),
    ),
    "boat": (
        190,
        (
            Part("box", (-44, -62, 80, 32), WHITE),
            *(Part("oval", (x, -46, 7, 7), GLASS) for x in (-28, -4, 20)),
            Part("box", (-6, -92, 22, 32), "body"),
            Part("path", (-92, -32, 96, -32, 66, 8, -70, 8), "body"),
        ),
    ),
    "rocket": (
        120,
        (
            Part("path", (-14, 46, 14, 46, 0, 96), (250, 170, 40)),
            Part("path", (-24, 12, -46, 54, -20, 46), "fin"),
            Part("path", (24, 12, 46, 54, 20, 46), "fin"),
            Part("oval", (0, 0, 26, 78), "body"),
            Part("oval", (0, -22, 11, 11), GLASS),
        ),
    ),
}

_ROAD: Drawing = (
    Part("box", (0, 176, WIDTH, 64), (96, 98, 104)),
    *(Part("box", (x, 216, 26, 4), (246, 240, 214)) for x in range(6, WIDTH, 48)),
)

#: The land of each place on the ground, and what is built there.
_PLACES: dict[str, tuple[str, Drawing]] = {
    "the open sea": ("the sea", ()),
    "a lake": ("the sea", (Part("box", (0, 222, WIDTH, 18), GRASS),)),
    "a bridge": (
        "the sea",
        (
            Part("box", (0, 190, WIDTH, 10), STONE),
            *(Part("box", (x, 198, 12, 42), STONE) for x in range(20, WIDTH, 70)),
        ),
    ),
    "the countryside": ("green hills", (Part("box", (0, 190, WIDTH, 6), (120, 100, 80)),)),
    "a country road": ("green hills", _ROAD),
    "a city street": ("a city", _ROAD),
    "a desert road": ("a desert", _ROAD),
    "a snowy road": ("a snowy field", _ROAD),
}


def _paint_place(brush: Brush, place: str) -> None:
    if place not in _PLACES:
        _sky(brush, place, HEIGHT)
        return
    land, drawing = _PLACES[place]
    _sky(brush, "clear")
    if place == "a lake":
        for x in range(-10, WIDTH, 36):
            _fir(brush, x + brush.rng.uniform(0, 20), 158, 56)
    _land(brush, land, "clear")
    brush.draw(drawing)


def _paint_vehicle(brush: Brush, what: Scene) -> None:
    (thing,) = what.things
    _paint_place(brush, what.setting)
    x = WIDTH / 2 + brush.rng.uniform(-24, 24)
    y, drawing = _VEHICLES[thing.noun]
    body = brush.shade(thing.colour, 8)
    brush.draw(drawing, x, y, body=body, dark=_blend(body, INK, 0.25), fin=_blend(body, INK, 0.3))


# -- animals: small enough that one to three of them fit -----------------------------------


def _eye(x: float, y: float) -> Drawing:
    return Part("oval", (x, y, 4.5, 4.5), WHITE), Part("oval", (x, y, 2.6, 2.6), INK)


_SNAIL_BODY, _RABBIT_EAR, _BIRD_LEG = (214, 184, 130), (244, 176, 186), (220, 140, 40)

_ANIMALS: dict[str, Drawing] = {
    "cat": (
        Part("path", (34, 20, 58, 4, 54, -24), "fur", 9),
        Part("oval", (8, 18, 34, 30), "fur"),
        Part("oval", (-18, -22, 26, 23), "fur"),
        Part("path", (-42, -24, -38, -56, -22, -40), "fur"),
        *_eye(-28, -25),
        Part("path", (-24, -12, -50, -8), "dark", 1.5),
        Part("path", (6, -24, 2, -56, -14, -40), "fur"),
        *_eye(-8, -25),
        Part("path", (-12, -12, 14, -8), "dark", 1.5),
        Part("path", (-22, -17, -14, -17, -18, -12), (240, 130, 150)),
    ),
    "dog": (
        Part("path", (46, -2, 64, -30), "fur", 8),
        Part("oval", (8, 6, 42, 20), "fur"),
        *(Part("path", (x, 14, x, 48), "fur", 10) for x in (-24, -10, 28, 42)),
        Part("oval", (-38, -20, 22, 19), "fur"),
        Part("oval", (-58, -12, 15, 10), "fur"),
        Part("oval", (-71, -15, 5, 4), INK),
        Part("oval", (-28, -16, 8, 20), "dark"),
        *_eye(-43, -26),
    ),
    "rabbit": (
        Part("oval", (8, 20, 32, 28), "fur"),
        Part("oval", (40, 30, 10, 10), "light"),
        Part("oval", (-20, -10, 20, 19), "fur"),
        Part("oval", (-28, -48, 7, 28), "fur"),
        Part("oval", (-28, -48, 3, 20), _RABBIT_EAR),
        Part("oval", (-12, -48, 7, 28), "fur"),
        Part("oval", (-12, -48, 3, 20), _RABBIT_EAR),
        *_eye(-27, -14),
        Part("oval", (-38, -6, 4, 3), (230, 120, 140)),
        Part("oval", (-6, 44, 20, 7), "dark"),
    ),
    "bird": (
        Part("path", (28, 4, 66, -10, 62, 16), "dark"),
        Part("oval", (0, 4, 36, 24), "fur"),
        Part("oval", (-32, -16, 18, 17), "fur"),
        Part("path", (-48, -20, -66, -13, -48, -9), (244, 160, 40)),
        Part("path", (-8, -2, 28, -34, 22, 8), "dark"),
        *_eye(-36, -20),
        Part("path", (-6, 26, -6, 40), _BIRD_LEG, 3),
        Part("path", (8, 26, 8, 40), _BIRD_LEG, 3),
    ),
    "fish": (
        Part("path", (34, 0, 66, -26, 66, 26), "dark"),
        Part("oval", (0, 0, 42, 25), "fur"),
        Part("path", (-4, -22, 16, -40, 20, -18), "dark"),
        *_eye(-24, -6),
        Part("path", (-8, -14, -4, 0, -8, 14), "dark", 3),
    ),
    "snail": (
        Part("oval", (-4, 36, 56, 11), _SNAIL_BODY),
        Part("path", (-48, 34, -56, 4), _SNAIL_BODY, 9),
        Part("path", (-56, 6, -66, -14), _SNAIL_BODY, 3),
        Part("path", (-56, 6, -48, -14), _SNAIL_BODY, 3),
        Part("oval", (8, 4, 36, 36), "fur"),
        Part("oval", (8, 4, 26, 26), "dark"),
        Part("oval", (8, 4, 17, 17), "fur"),
        Part("oval", (8, 4, 8, 8), "dark"),
    ),
    "butterfly": (
        Part("oval", (-30, -18, 27, 25), "fur"),
        Part("oval", (-24, 22, 20, 19), "dark"),
        Part("oval", (-32, -18, 9, 9), WHITE),
        Part("path", (0, -34, -14, -56), INK, 2.5),
        Part("oval", (30, -18, 27, 25), "fur"),
        Part("oval", (24, 22, 20, 19), "dark"),
        Part("oval", (32, -18, 9, 9), WHITE),
        Part("path", (0, -34, 14, -56), INK, 2.5),
        Part("oval", (0, 0, 6, 36), INK),
    ),
    "elephant": (
        Part("oval", (14, -8, 48, 36), "fur"),
        *(Part("path", (x, 16, x, 48), "fur", 15) for x in (-18, 4, 34, 52)),
        Part("oval", (-36, -20, 27, 26), "fur"),
        Part("path", (-56, -14, -66, 14, -60, 40), "fur", 13),
        Part("oval", (-18, -22, 18, 24), "dark"),
        *_eye(-44, -28),
        Part("path", (-50, 0, -74, 14, -48, 8), WHITE),
    ),
}


def _field(colour: Colour) -> Part:
    return Part("box", (0, 130, WIDTH, HEIGHT - 130), colour)


_FLOWER: Drawing = (
    *(Part("oval", (x, y, 4, 4), "petal") for x, y in ((-5, 0), (5, 0), (0, -5), (0, 5))),
    Part("oval", (0, 0, 3, 3), (250, 200, 60)),
)

#: What is always there where animals are.
_GROUNDS: dict[str, Drawing] = {
    "the sky": (),
    "a carpet": (
        Part("box", (0, 0, WIDTH, HEIGHT), (226, 214, 200)),
        Part("oval", (WIDTH / 2, 188, 156, 50), (150, 50, 60)),
        Part("oval", (WIDTH / 2, 188, 130, 38), (200, 130, 90)),
    ),
    "a beach": (_field(SAND), Part("box", (0, 120, WIDTH, 22), (40, 120, 180))),
    "a branch": (
        _field(GRASS),
        Part("path", (0, 202, WIDTH, 190), WOOD, 12),
        *(Part("oval", (x, 184 + x % 3 * 9, 14, 7), (84, 150, 70)) for x in range(20, WIDTH, 46)),
    ),
    "snow": (_field(SNOW),),
    "a savanna": (_field((206, 178, 92)),),
    "grass": (_field(GRASS),),
    "flowers": (_field(GRASS),),
}


def _ground(brush: Brush, place: str) -> None:
    rng = brush.rng
    if place == "the water":
        brush.gradient((60, 160, 210), (10, 60, 130))
        for _ in range(14):
            r = rng.uniform(2, 6)
            x, y = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)
            brush.oval(x, y, r, r, (200, 230, 250), 1.2)
        return
    if place != "a carpet":
        _sky(brush, "clear", HEIGHT if place == "the sky" else 130)
    brush.draw(_GROUNDS[place])
    if place in ("grass", "flowers"):
        for _ in range(40):
            x, y = rng.uniform(0, WIDTH), rng.uniform(140, HEIGHT)
            brush.path((x, y, x + 3, y - 9), (70, 140, 60), 1.6)
    if place == "flowers":
        for _ in range(24):
            x, y = rng.uniform(0, WIDTH), rng.uniform(140, HEIGHT)
            petal = COLOURS[rng.choice(("pink", "yellow", "white", "red", "purple"))]
            brush.draw(_FLOWER, x, y, petal=petal)


def _paint_animal(brush: Brush, what: Scene) -> None:
    (thing,) = what.things
    _ground(brush, what.setting)
    scale = {1: 1.25, 2: 0.88, 3: 0.68}[thing.count] * brush.rng.uniform(0.93, 1.07)
    y = 116 if what.setting in ("the sky", "the water") else 148
    for place in range(thing.count):
        x = WIDTH * (place + 0.5) / thing.count + brush.rng.uniform(-8, 8)
        fur = brush.shade(thing.colour, 8)
        dark = _blend(fur, WHITE, 0.22) if thing.colour == "black" else _blend(fur, INK, 0.3)
        brush.draw(
            _ANIMALS[thing.noun], x, y + brush.rng.uniform(-8, 8), scale,
            fur=fur, dark=dark, light=_blend(fur, WHITE, 0.5),
        )  # fmt: skip


_PAINTERS: dict[str, Callable[[Brush, Scene], None]] = {
    "shape": _paint_shape,
    "count": _paint_count,
    "relation": _paint_relation,
    "landscape": _paint_landscape,
    "face": _paint_face,
    "vehicle": _paint_vehicle,
    "animal": _paint_animal,
}

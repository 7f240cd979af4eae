"""Paints a `Scene` with Pillow's drawing primitives."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from mmsearch.datasets.scenes import COLOURS, Scene, Thing

WIDTH, HEIGHT = 320, 240
_OVERSAMPLE = 3  # painted larger and reduced: Pillow's own primitives are not smooth

Colour = tuple[int, int, int]
Point = tuple[float, float]


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
        red, green, blue = (min(255, max(0, part + shift)) for part in COLOURS[name])
        return red, green, blue

    def fill(self, colour: Colour) -> None:
        self.box(0, 0, WIDTH, HEIGHT, colour)

    def box(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        self._draw.rectangle(self._scale((x, y), (x + width, y + height)), fill=colour)

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Colour | None, *,
        outline: Colour | None = None, width: float = 1,
    ) -> None:  # fmt: skip
        """An ellipse around (x, y) with the radii rx and ry."""
        self._draw.ellipse(
            self._scale((x - rx, y - ry), (x + rx, y + ry)),
            fill=colour,
            outline=outline,
            width=round(width * _OVERSAMPLE),
        )

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self._draw.polygon(self._scale(*points), fill=colour)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        self._draw.line(
            self._scale(*points), fill=colour, width=round(width * _OVERSAMPLE), joint="curve"
        )

    def arc(
        self, x: float, y: float, rx: float, ry: float, start: float, end: float,
        colour: Colour, width: float,
    ) -> None:  # fmt: skip
        self._draw.arc(
            self._scale((x - rx, y - ry), (x + rx, y + ry)),
            start, end, fill=colour, width=round(width * _OVERSAMPLE),
        )  # fmt: skip

    def gradient(self, top: Colour, bottom: Colour, until: float = HEIGHT) -> None:
        for row in range(0, round(until), 2):
            mix = row / until
            self.box(0, row, WIDTH, 2, _blend(top, bottom, mix))

    @staticmethod
    def _scale(*points: Point) -> list[Point]:
        return [(x * _OVERSAMPLE, y * _OVERSAMPLE) for x, y in points]


def _blend(first: Colour, second: Colour, mix: float) -> Colour:
    red, green, blue = (round(a + (b - a) * mix) for a, b in zip(first, second, strict=True))
    return red, green, blue


WHITE, INK = (255, 255, 255), (35, 35, 40)
GRASS, SAND, SNOW = (104, 170, 84), (232, 208, 150), (240, 245, 250)


# -- shapes --------------------------------------------------------------------------------


def _regular(x: float, y: float, radius: float, corners: int, inner: float = 1) -> list[Point]:
    points = []
    for i in range(corners):
        angle = -math.pi / 2 + 2 * math.pi * i / corners
        reach = radius * (inner if i % 2 else 1)
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return points


def _shape(brush: Brush, name: str, x: float, y: float, r: float, colour: Colour) -> None:
    if name == "circle":
        brush.oval(x, y, r, r, colour)
    elif name == "ring":
        brush.oval(x, y, r, r, None, outline=colour, width=r * 0.3)
    elif name == "square":
        brush.box(x - r * 0.88, y - r * 0.88, r * 1.76, r * 1.76, colour)
    elif name == "triangle":
        brush.polygon(_regular(x, y + r * 0.15, r * 1.1, 3), colour)
    elif name == "star":
        brush.polygon(_regular(x, y, r * 1.1, 10, 0.42), colour)
    elif name == "diamond":
        brush.polygon([(x, y - r * 1.1), (x + r * 0.75, y), (x, y + r * 1.1), (x - r * 0.75, y)],
                      colour)  # fmt: skip
    elif name == "cross":
        brush.box(x - r * 0.3, y - r, r * 0.6, r * 2, colour)
        brush.box(x - r, y - r * 0.3, r * 2, r * 0.6, colour)
    else:  # heart
        half = r * 0.52
        brush.oval(x - half, y - r * 0.3, half, half, colour)
        brush.oval(x + half, y - r * 0.3, half, half, colour)
        brush.polygon([(x - r * 0.98, y - r * 0.06), (x + r * 0.98, y - r * 0.06), (x, y + r)],
                      colour)  # fmt: skip


def _paint_shape(brush: Brush, what: Scene) -> None:
    (thing,) = what.things
    brush.fill(brush.shade(what.setting, 8))
    x, y = WIDTH / 2 + brush.rng.uniform(-25, 25), HEIGHT / 2 + brush.rng.uniform(-12, 12)
    _shape(brush, thing.noun, x, y, brush.rng.uniform(60, 92), brush.shade(thing.colour, 8))


def _paint_count(brush: Brush, what: Scene) -> None:
    (thing,) = what.things
    brush.fill(brush.shade(what.setting, 4))
    cells = [(x, y) for y in (66, 174) for x in (58, 160, 262)]
    for x, y in brush.rng.sample(cells, thing.count):
        jitter = brush.rng.uniform(-8, 8)
        _shape(brush, thing.noun, x + jitter, y - jitter, brush.rng.uniform(32, 42),
               brush.shade(thing.colour, 8))  # fmt: skip


def _paint_relation(brush: Brush, what: Scene) -> None:
    first, second = what.things
    brush.fill(brush.shade(what.setting, 4))
    x, y = WIDTH / 2 + brush.rng.uniform(-20, 20), HEIGHT / 2
    colours = brush.shade(first.colour, 8), brush.shade(second.colour, 8)
    if what.detail == "inside":
        _shape(brush, second.noun, x, y, 104, colours[1])
        brush.oval(x, y, 52, 52, brush.shade("white", 4))  # room that keeps the two apart
        _shape(brush, first.noun, x, y, 36, colours[0])
        return
    dx, dy = {"above": (0, -58), "below": (0, 58), "left of": (-72, 0), "right of": (72, 0)}[
        what.detail
    ]
    size = brush.rng.uniform(42, 50)
    _shape(brush, first.noun, x + dx, y + dy, size, colours[0])
    _shape(brush, second.noun, x - dx, y - dy, size, colours[1])


# -- landscapes ----------------------------------------------------------------------------


def _cloud(brush: Brush, x: float, y: float, size: float, colour: Colour = WHITE) -> None:
    for dx, dy, r in ((-1, 0.2, 0.6), (0, -0.2, 0.8), (0.9, 0.15, 0.65), (0, 0.35, 0.7)):
        brush.oval(x + dx * size, y + dy * size, r * size, r * size * 0.7, colour)


def _stars(brush: Brush, until: float) -> None:
    for _ in range(45):
        r = brush.rng.uniform(0.6, 1.8)
        brush.oval(brush.rng.uniform(0, WIDTH), brush.rng.uniform(0, until), r, r, WHITE)


def _sky(brush: Brush, name: str, until: float = 150) -> None:
    x = brush.rng.uniform(60, WIDTH - 60)
    if "night" in name:
        brush.gradient((8, 10, 40), (30, 36, 84), until)
        _stars(brush, until)
        brush.oval(x, 38, 18, 18, (244, 240, 210))
    elif "sunset" in name:
        brush.gradient((120, 60, 130), (252, 160, 70), until)
        brush.oval(x, until - 18, 30, 30, (255, 214, 110))
    elif "cloudy" in name or "clouds" in name:
        brush.gradient((150, 170, 190), (205, 214, 222), until)
        for i in range(6):
            _cloud(brush, 30 + i * 56 + brush.rng.uniform(-12, 12),
                   brush.rng.uniform(24, until * 0.6), brush.rng.uniform(18, 30),
                   (236, 238, 242))  # fmt: skip
    else:
        brush.gradient((80, 160, 236), (190, 224, 250), until)
        brush.oval(x, 36, 20, 20, (255, 226, 80))


def _tree(brush: Brush, x: float, y: float, size: float, *, fir: bool = False) -> None:
    brush.box(x - size * 0.08, y - size * 0.4, size * 0.16, size * 0.4, (100, 66, 40))
    green = brush.shade("green", 22)
    if fir:
        for step in range(3):
            top = y - size * (1.1 - step * 0.25)
            half = size * (0.22 + step * 0.08)
            brush.polygon([(x, top), (x - half, top + size * 0.42), (x + half, top + size * 0.42)],
                          green)  # fmt: skip
    else:
        for dx, dy in ((-0.25, 0.7), (0.25, 0.7), (0, 0.92)):
            brush.oval(x + dx * size, y - dy * size, size * 0.34, size * 0.32, green)


def _house(brush: Brush, x: float, y: float, size: float) -> None:
    brush.box(x - size / 2, y - size * 0.7, size, size * 0.7, (236, 214, 176))
    brush.polygon([(x - size * 0.6, y - size * 0.7), (x + size * 0.6, y - size * 0.7),
                   (x, y - size * 1.2)], (178, 58, 44))  # fmt: skip
    brush.box(x - size * 0.1, y - size * 0.36, size * 0.22, size * 0.36, (104, 64, 36))
    for dx in (-0.34, 0.22):
        brush.box(x + dx * size, y - size * 0.52, size * 0.16, size * 0.16, (120, 186, 226))


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
    dim = 0.45 if "night" in sky else 0.2 if "sunset" in sky else 0.0

    def tone(colour: Colour) -> Colour:
        return _blend(colour, (14, 16, 40), dim)

    horizon = 150
    if name == "the sea":
        brush.box(0, horizon, WIDTH, HEIGHT - horizon, tone((28, 96, 160)))
        for _ in range(26):
            x, y = brush.rng.uniform(0, WIDTH), brush.rng.uniform(horizon + 6, HEIGHT)
            brush.line([(x, y), (x + 24, y)], tone((120, 180, 220)), 1.5)
    elif name == "mountains":
        brush.box(0, horizon, WIDTH, HEIGHT - horizon, tone((96, 140, 84)))
        for i in range(4):
            x, peak = 20 + i * 92 + brush.rng.uniform(-20, 20), brush.rng.uniform(42, 84)
            brush.polygon([(x - 90, horizon + 2), (x, peak), (x + 90, horizon + 2)],
                          tone((112, 112, 128)))  # fmt: skip
            brush.polygon([(x - 22, peak + 24), (x, peak), (x + 22, peak + 24), (x + 6, peak + 18),
                           (x - 6, peak + 26)], tone(SNOW))  # fmt: skip
    elif name == "a forest":
        brush.box(0, horizon, WIDTH, HEIGHT - horizon, tone((64, 116, 58)))
        for i in range(22):
            _tree(brush, brush.rng.uniform(0, WIDTH), 150 + i * 4, brush.rng.uniform(60, 84),
                  fir=True)  # fmt: skip
    elif name == "a desert":
        brush.box(0, horizon, WIDTH, HEIGHT - horizon, tone(SAND))
        for x in (70, 190, 290):
            brush.oval(x + brush.rng.uniform(-30, 30), horizon + 16, 110, 26, tone((222, 190, 124)))
        x = brush.rng.uniform(60, 250)
        brush.box(x, 140, 11, 62, tone((60, 120, 60)))
        brush.box(x - 20, 160, 20, 8, tone((60, 120, 60)))
        brush.box(x - 20, 146, 8, 20, tone((60, 120, 60)))
    elif name == "green hills":
        brush.box(0, horizon, WIDTH, HEIGHT - horizon, tone(GRASS))
        for x in (40, 160, 290):
            brush.oval(x + brush.rng.uniform(-20, 20), horizon + 40, 120, 72,
                       tone(_blend(GRASS, (60, 140, 60), brush.rng.random())))  # fmt: skip
    elif name == "a city":
        brush.box(0, horizon, WIDTH, HEIGHT - horizon, tone((90, 92, 98)))
        _city(brush, 176, night="night" in sky)
    else:  # a snowy field
        brush.box(0, horizon, WIDTH, HEIGHT - horizon, tone(SNOW))
        for _ in range(5):
            _tree(brush, brush.rng.uniform(10, WIDTH), brush.rng.uniform(150, 190), 44, fir=True)
        for _ in range(60):
            brush.oval(brush.rng.uniform(0, WIDTH), brush.rng.uniform(0, HEIGHT), 1.8, 1.8, WHITE)


def _extra(brush: Brush, name: str) -> None:
    x = brush.rng.uniform(70, WIDTH - 70)
    if name == "a house":
        _house(brush, x, 216, 70)
    elif name == "a big tree":
        _tree(brush, x, 222, 120)
    elif name == "a sailing boat":
        brush.polygon([(x - 40, 190), (x + 40, 190), (x + 26, 210), (x - 26, 210)], (120, 70, 40))
        brush.polygon([(x - 2, 184), (x - 2, 116), (x - 36, 184)], (250, 250, 250))
        brush.polygon([(x + 4, 184), (x + 4, 124), (x + 32, 184)], (220, 60, 60))
    elif name == "a hot air balloon":
        y = brush.rng.uniform(56, 76)
        brush.oval(x, y, 34, 38, (214, 60, 60))
        brush.oval(x, y, 14, 38, (250, 210, 70))
        brush.line([(x - 20, y + 30), (x - 8, y + 58)], INK, 1.5)
        brush.line([(x + 20, y + 30), (x + 8, y + 58)], INK, 1.5)
        brush.box(x - 9, y + 56, 18, 14, (130, 84, 44))
    elif name == "a rainbow":
        bands = ("red", "orange", "yellow", "green", "blue", "purple")
        for i, colour in enumerate(bands):
            brush.arc(WIDTH / 2, 170, 146 - i * 8, 130 - i * 8, 180, 360, COLOURS[colour], 8)


def _paint_landscape(brush: Brush, what: Scene) -> None:
    _sky(brush, what.setting)
    _land(brush, what.things[0].noun, what.setting)
    _extra(brush, what.detail)


# -- faces ---------------------------------------------------------------------------------


def _paint_face(brush: Brush, what: Scene) -> None:
    mood, hair = what.things[0].noun, what.things[0].colour
    ground = brush.rng.choice([(200, 224, 240), (226, 240, 214), (250, 232, 210), (232, 222, 244)])
    brush.fill(ground)
    skin = brush.rng.choice([(255, 220, 186), (240, 194, 150), (198, 140, 96), (130, 86, 58)])
    x, y = WIDTH / 2 + brush.rng.uniform(-16, 16), 128
    if hair != "no":
        brush.oval(x, y - 22, 80, 84, brush.shade(hair))
    brush.oval(x, y, 70, 82, skin)
    if hair != "no":
        brush.arc(x, y, 70, 82, 200, 340, brush.shade(hair), 20)
    wide = 15 if mood == "surprised" else 9
    for side in (-27, 27):
        brush.oval(x + side, y - 14, 13, wide, WHITE)
        brush.oval(x + side, y - 14, 6, 6, INK)
        slope = {"angry": 9, "sad": -8}.get(mood, 0) * (1 if side < 0 else -1)
        brush.line([(x + side - 13, y - 33 - slope), (x + side + 13, y - 33 + slope)], INK, 4)
    brush.line([(x, y - 4), (x - 6, y + 18), (x + 4, y + 18)], _blend(skin, INK, 0.35), 3)
    if what.detail == "a beard":
        brush.arc(x, y, 70, 82, 20, 160, brush.shade("brown" if hair == "no" else hair), 26)
    if mood == "happy":
        brush.arc(x, y + 24, 32, 26, 10, 170, (170, 40, 50), 6)
    elif mood == "sad":
        brush.arc(x, y + 62, 28, 24, 200, 340, (150, 50, 60), 6)
    elif mood == "surprised":
        brush.oval(x, y + 44, 13, 18, (120, 30, 40))
    else:
        brush.line([(x - 26, y + 46), (x + 26, y + 46)], (140, 40, 50), 7)
    if what.detail == "glasses":
        for side in (-27, 27):
            brush.oval(x + side, y - 14, 22, 20, None, outline=INK, width=4)
        brush.line([(x - 6, y - 14), (x + 6, y - 14)], INK, 4)
    elif what.detail == "a hat":
        colour = brush.shade(brush.rng.choice(["red", "blue", "green", "purple"]))
        brush.box(x - 96, y - 78, 192, 14, colour)
        brush.box(x - 56, y - 124, 112, 52, colour)


# -- vehicles ------------------------------------------------------------------------------


def _wheel(brush: Brush, x: float, y: float, r: float) -> None:
    brush.oval(x, y, r, r, INK)
    brush.oval(x, y, r * 0.45, r * 0.45, (190, 190, 196))


_GLASS = (176, 218, 240)


def _car(brush: Brush, x: float, y: float, colour: Colour) -> None:
    brush.polygon([(x - 46, y - 34), (x - 28, y - 62), (x + 30, y - 62), (x + 50, y - 34)], colour)
    brush.polygon([(x - 36, y - 36), (x - 23, y - 56), (x - 2, y - 56), (x - 2, y - 36)], _GLASS)
    brush.polygon([(x + 5, y - 36), (x + 5, y - 56), (x + 26, y - 56), (x + 39, y - 36)], _GLASS)
    brush.box(x - 78, y - 36, 156, 28, colour)
    for side in (-44, 44):
        _wheel(brush, x + side, y - 8, 17)


def _bus(brush: Brush, x: float, y: float, colour: Colour) -> None:
    brush.box(x - 96, y - 88, 192, 80, colour)
    for i in range(6):
        brush.box(x - 86 + i * 30, y - 76, 22, 26, _GLASS)
    for side in (-58, 58):
        _wheel(brush, x + side, y - 6, 17)


def _truck(brush: Brush, x: float, y: float, colour: Colour) -> None:
    brush.box(x - 96, y - 92, 128, 82, colour)
    brush.polygon([(x + 38, y - 10), (x + 38, y - 66), (x + 70, y - 66), (x + 94, y - 36),
                   (x + 94, y - 10)], _blend(colour, INK, 0.25))  # fmt: skip
    brush.polygon([(x + 48, y - 36), (x + 48, y - 58), (x + 67, y - 58), (x + 82, y - 36)], _GLASS)
    for side in (-66, -28, 68):
        _wheel(brush, x + side, y - 6, 16)


def _bicycle(brush: Brush, x: float, y: float, colour: Colour) -> None:
    for side in (-48, 48):
        brush.oval(x + side, y - 32, 32, 32, None, outline=INK, width=4)
    frame = [(x - 48, y - 32), (x - 18, y - 78), (x + 34, y - 78), (x, y - 32), (x - 48, y - 32)]
    brush.line(frame, colour, 6)
    brush.line([(x - 18, y - 78), (x, y - 32)], colour, 6)
    brush.line([(x + 48, y - 32), (x + 32, y - 92), (x + 48, y - 96)], colour, 6)
    brush.line([(x - 34, y - 88), (x - 6, y - 88)], INK, 7)


def _train(brush: Brush, x: float, y: float, colour: Colour) -> None:
    for i, left in enumerate((x - 150, x - 44, x + 62)):
        brush.box(left, y - 74 if i < 2 else y - 84, 98, 62, colour)
        for window in range(3):
            brush.box(left + 10 + window * 28, y - 64, 20, 22, _GLASS)
        for wheel in (20, 78):
            _wheel(brush, left + wheel, y - 8, 11)
    brush.line([(x - 150, y - 22), (x + 160, y - 22)], INK, 4)


def _airplane(brush: Brush, x: float, y: float, colour: Colour) -> None:
    brush.polygon([(x - 104, y - 4), (x - 122, y - 44), (x - 100, y - 44), (x - 70, y - 6)], colour)
    brush.oval(x, y, 108, 20, colour)
    brush.polygon([(x - 6, y + 4), (x + 34, y + 4), (x - 30, y + 62), (x - 52, y + 62)],
                  _blend(colour, INK, 0.25))  # fmt: skip
    for i in range(7):
        brush.oval(x - 60 + i * 20, y - 4, 5, 5, _GLASS)


def _boat(brush: Brush, x: float, y: float, colour: Colour) -> None:
    brush.box(x - 44, y - 62, 80, 32, WHITE)
    for i in range(3):
        brush.oval(x - 28 + i * 24, y - 46, 7, 7, _GLASS)
    brush.box(x - 6, y - 92, 22, 32, colour)
    brush.polygon([(x - 92, y - 32), (x + 96, y - 32), (x + 66, y + 8), (x - 70, y + 8)], colour)


def _rocket(brush: Brush, x: float, y: float, colour: Colour) -> None:
    y -= 30
    brush.polygon([(x - 14, y + 46), (x + 14, y + 46), (x, y + 96)], (250, 170, 40))
    brush.polygon([(x - 24, y + 12), (x - 46, y + 54), (x - 20, y + 46)], _blend(colour, INK, 0.3))
    brush.polygon([(x + 24, y + 12), (x + 46, y + 54), (x + 20, y + 46)], _blend(colour, INK, 0.3))
    brush.oval(x, y, 26, 78, colour)
    brush.oval(x, y - 22, 11, 11, _GLASS)


Artist = Callable[[Brush, float, float, Colour], None]

_VEHICLE_ART: dict[str, Artist] = {
    "car": _car,
    "bus": _bus,
    "truck": _truck,
    "bicycle": _bicycle,
    "train": _train,
    "airplane": _airplane,
    "boat": _boat,
    "rocket": _rocket,
}


def _paint_place(brush: Brush, place: str) -> None:
    if place in ("the clouds", "the night sky", "the sky"):
        sky = {"the night sky": "night", "the clouds": "cloudy"}.get(place, "clear")
        _sky(brush, sky, HEIGHT)
        return
    _sky(brush, "clear", 150)
    if place in ("the open sea", "a lake"):
        if place == "a lake":
            for x in range(-10, WIDTH, 36):
                _tree(brush, x + brush.rng.uniform(0, 20), 158, 56, fir=True)
        _land(brush, "the sea", "clear")
        if place == "a lake":
            brush.box(0, 222, WIDTH, 18, GRASS)
        return
    if place == "a bridge":
        _land(brush, "the sea", "clear")
        brush.box(0, 190, WIDTH, 10, (110, 110, 118))
        for x in range(20, WIDTH, 70):
            brush.box(x, 198, 12, 42, (110, 110, 118))
        return
    land = {
        "a city street": "a city",
        "a desert road": "a desert",
        "a snowy road": "a snowy field",
    }
    _land(brush, land.get(place, "green hills"), "clear")
    if place == "the countryside":
        brush.box(0, 190, WIDTH, 6, (120, 100, 80))
        return
    brush.box(0, 176, WIDTH, 64, (96, 98, 104))
    for x in range(6, WIDTH, 48):
        brush.box(x, 216, 26, 4, (246, 240, 214))


def _paint_vehicle(brush: Brush, what: Scene) -> None:
    (thing,) = what.things
    _paint_place(brush, what.setting)
    x = WIDTH / 2 + brush.rng.uniform(-24, 24)
    y = {"airplane": 112, "rocket": 150, "boat": 190, "train": 190}.get(thing.noun, 206)
    _VEHICLE_ART[thing.noun](brush, x, y, brush.shade(thing.colour, 8))


# -- animals: drawn around (0, 0) at a scale, so that one to three of them fit ------------------


class _Sketch:
    """A brush whose origin and scale are an animal's own."""

    def __init__(self, brush: Brush, x: float, y: float, scale: float) -> None:
        self._brush, self._x, self._y, self._scale = brush, x, y, scale

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        s = self._scale
        self._brush.oval(self._x + x * s, self._y + y * s, rx * s, ry * s, colour)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self._brush.polygon(self._place(points), colour)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        self._brush.line(self._place(points), colour, width * self._scale)

    def eye(self, x: float, y: float) -> None:
        self.oval(x, y, 4.5, 4.5, WHITE)
        self.oval(x, y, 2.6, 2.6, INK)

    def _place(self, points: Sequence[Point]) -> list[Point]:
        return [(self._x + x * self._scale, self._y + y * self._scale) for x, y in points]


def _cat(draw: _Sketch, fur: Colour, dark: Colour) -> None:
    draw.line([(34, 20), (58, 4), (54, -24)], fur, 9)
    draw.oval(8, 18, 34, 30, fur)
    draw.oval(-18, -22, 26, 23, fur)
    for side in (-1, 1):
        draw.polygon([(-18 + side * 24, -24), (-18 + side * 20, -56), (-18 + side * 4, -40)], fur)
        draw.eye(-18 + side * 10, -25)
        draw.line([(-18 + side * 6, -12), (-18 + side * 32, -8)], dark, 1.5)
    draw.polygon([(-22, -17), (-14, -17), (-18, -12)], (240, 130, 150))


def _dog(draw: _Sketch, fur: Colour, dark: Colour) -> None:
    draw.line([(46, -2), (64, -30)], fur, 8)
    draw.oval(8, 6, 42, 20, fur)
    for x in (-24, -10, 28, 42):
        draw.line([(x, 14), (x, 48)], fur, 10)
    draw.oval(-38, -20, 22, 19, fur)
    draw.oval(-58, -12, 15, 10, fur)
    draw.oval(-71, -15, 5, 4, INK)
    draw.oval(-28, -16, 8, 20, dark)
    draw.eye(-43, -26)


def _rabbit(draw: _Sketch, fur: Colour, dark: Colour) -> None:
    draw.oval(8, 20, 32, 28, fur)
    draw.oval(40, 30, 10, 10, _blend(fur, WHITE, 0.5))
    draw.oval(-20, -10, 20, 19, fur)
    for x in (-28, -12):
        draw.oval(x, -48, 7, 28, fur)
        draw.oval(x, -48, 3, 20, (244, 176, 186))
    draw.eye(-27, -14)
    draw.oval(-38, -6, 4, 3, (230, 120, 140))
    draw.oval(-6, 44, 20, 7, dark)


def _bird(draw: _Sketch, fur: Colour, dark: Colour) -> None:
    draw.polygon([(28, 4), (66, -10), (62, 16)], dark)
    draw.oval(0, 4, 36, 24, fur)
    draw.oval(-32, -16, 18, 17, fur)
    draw.polygon([(-48, -20), (-66, -13), (-48, -9)], (244, 160, 40))
    draw.polygon([(-8, -2), (28, -34), (22, 8)], dark)
    draw.eye(-36, -20)
    for x in (-6, 8):
        draw.line([(x, 26), (x, 40)], (220, 140, 40), 3)


def _fish(draw: _Sketch, fur: Colour, dark: Colour) -> None:
    draw.polygon([(34, 0), (66, -26), (66, 26)], dark)
    draw.oval(0, 0, 42, 25, fur)
    draw.polygon([(-4, -22), (16, -40), (20, -18)], dark)
    draw.eye(-24, -6)
    draw.line([(-8, -14), (-4, 0), (-8, 14)], dark, 3)


def _snail(draw: _Sketch, fur: Colour, dark: Colour) -> None:
    draw.oval(-4, 36, 56, 11, (214, 184, 130))
    draw.line([(-48, 34), (-56, 4)], (214, 184, 130), 9)
    draw.line([(-56, 6), (-66, -14)], (214, 184, 130), 3)
    draw.line([(-56, 6), (-48, -14)], (214, 184, 130), 3)
    for r, colour in ((36, fur), (26, dark), (17, fur), (8, dark)):
        draw.oval(8, 4, r, r, colour)


def _butterfly(draw: _Sketch, fur: Colour, dark: Colour) -> None:
    for side in (-1, 1):
        draw.oval(side * 30, -18, 27, 25, fur)
        draw.oval(side * 24, 22, 20, 19, dark)
        draw.oval(side * 32, -18, 9, 9, WHITE)
        draw.line([(0, -34), (side * 14, -56)], INK, 2.5)
    draw.oval(0, 0, 6, 36, INK)


def _elephant(draw: _Sketch, fur: Colour, dark: Colour) -> None:
    draw.oval(14, -8, 48, 36, fur)
    for x in (-18, 4, 34, 52):
        draw.line([(x, 16), (x, 48)], fur, 15)
    draw.oval(-36, -20, 27, 26, fur)
    draw.line([(-56, -14), (-66, 14), (-60, 40)], fur, 13)
    draw.oval(-18, -22, 18, 24, dark)
    draw.eye(-44, -28)
    draw.polygon([(-50, 0), (-74, 14), (-48, 8)], WHITE)


_ANIMAL_ART: dict[str, Callable[[_Sketch, Colour, Colour], None]] = {
    "cat": _cat,
    "dog": _dog,
    "rabbit": _rabbit,
    "bird": _bird,
    "fish": _fish,
    "snail": _snail,
    "butterfly": _butterfly,
    "elephant": _elephant,
}


def _ground(brush: Brush, place: str) -> None:
    if place == "the water":
        brush.gradient((60, 160, 210), (10, 60, 130))
        for _ in range(14):
            r = brush.rng.uniform(2, 6)
            brush.oval(brush.rng.uniform(0, WIDTH), brush.rng.uniform(0, HEIGHT), r, r, None,
                       outline=(200, 230, 250), width=1.2)  # fmt: skip
        return
    if place == "a carpet":
        brush.fill((226, 214, 200))
        brush.oval(WIDTH / 2, 188, 156, 50, (150, 50, 60))
        brush.oval(WIDTH / 2, 188, 130, 38, (200, 130, 90))
        return
    _sky(brush, "clear", HEIGHT if place == "the sky" else 130)
    if place == "the sky":
        return
    colour = {"snow": SNOW, "a beach": SAND, "a savanna": (206, 178, 92)}.get(place, GRASS)
    brush.box(0, 130, WIDTH, HEIGHT - 130, colour)
    if place == "a beach":
        brush.box(0, 120, WIDTH, 22, (40, 120, 180))
    elif place == "a branch":
        brush.line([(0, 202), (WIDTH, 190)], (110, 74, 44), 12)
        for leaf in range(20, WIDTH, 46):
            brush.oval(leaf, 184 + leaf % 3 * 9, 14, 7, (84, 150, 70))
    elif place in ("grass", "flowers"):
        for _ in range(40):
            x, y = brush.rng.uniform(0, WIDTH), brush.rng.uniform(140, HEIGHT)
            brush.line([(x, y), (x + 3, y - 9)], (70, 140, 60), 1.6)
    if place == "flowers":
        for _ in range(24):
            x, y = brush.rng.uniform(0, WIDTH), brush.rng.uniform(140, HEIGHT)
            petal = COLOURS[brush.rng.choice(("pink", "yellow", "white", "red", "purple"))]
            for dx, dy in ((-5, 0), (5, 0), (0, -5), (0, 5)):
                brush.oval(x + dx, y + dy, 4, 4, petal)
            brush.oval(x, y, 3, 3, (250, 200, 60))


def _paint_animal(brush: Brush, what: Scene) -> None:
    (thing,) = what.things
    _ground(brush, what.setting)
    scale = {1: 1.25, 2: 0.88, 3: 0.68}[thing.count] * brush.rng.uniform(0.93, 1.07)
    y = 116 if what.setting in ("the sky", "the water") else 148
    for place in range(thing.count):
        x = WIDTH * (place + 0.5) / thing.count + brush.rng.uniform(-8, 8)
        fur = brush.shade(thing.colour, 8)
        sketch = _Sketch(brush, x, y + brush.rng.uniform(-8, 8), scale)
        _ANIMAL_ART[thing.noun](sketch, fur, _darker(thing, fur))


def _darker(thing: Thing, fur: Colour) -> Colour:
    return _blend(fur, WHITE, 0.22) if thing.colour == "black" else _blend(fur, INK, 0.3)


_PAINTERS: dict[str, Callable[[Brush, Scene], None]] = {
    "shape": _paint_shape,
    "count": _paint_count,
    "relation": _paint_relation,
    "landscape": _paint_landscape,
    "face": _paint_face,
    "vehicle": _paint_vehicle,
    "animal": _paint_animal,
}

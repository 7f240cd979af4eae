"""Makes an upright RGB picture fit a model, or a page."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmsearch.types import Preprocess

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


def fit(image: Image.Image, how: Preprocess) -> NDArray[np.uint8]:
    """Scales and crops an RGB picture as the model wants it, shape (height, width, 3).

    Gives the very pixels of open_clip's own transform before it normalises them.
    """
    height, width = how.size
    sampling = _RESAMPLING[how.interpolation]
    if how.resize_mode == "squash":
        resized = _resize(image, (width, height), sampling)
    elif how.resize_mode == "longest":
        resized = _centre(_resize(image, _scaled(image, how.size, longest=True), sampling), how)
    elif height == width:
        image = _without_ends(image)
        resized = _centre(_resize(image, _shortest(image, height), sampling), how)
    else:
        resized = _centre(_resize(image, _scaled(image, how.size, longest=False), sampling), how)
    return np.asarray(resized)


def _resize(image: Image.Image, size: tuple[int, int], sampling: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, sampling)


def _without_ends(image: Image.Image) -> Image.Image:
    """Cuts the far ends off a very long strip: the centre is all that will be left of it.

    A picture of 1 x 65,000 pixels would take gigabytes if it were scaled before it is cropped.
    """
    longest = 64 * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _shortest(image: Image.Image, side: int) -> tuple[int, int]:
    """The size (width, height) at which the short side is `side`; the long one is cut off."""
    if image.width <= image.height:
        return side, int(side * image.height / image.width)
    return int(side * image.width / image.height), side


def _scaled(image: Image.Image, size: tuple[int, int], *, longest: bool) -> tuple[int, int]:
    ratios = image.height / size[0], image.width / size[1]
    ratio = max(ratios) if longest else min(ratios)
    return max(1, round(image.width / ratio)), max(1, round(image.height / ratio))


def _centre(image: Image.Image, how: Preprocess) -> Image.Image:
    """Cuts the centre out, or pads around it where the picture is smaller."""
    height, width = how.size
    if image.width < width or image.height < height:
        padded = Image.new("RGB", (max(width, image.width), max(height, image.height)),
                           (how.fill_color,) * 3)  # fmt: skip
        left = (width - image.width) // 2 if image.width < width else 0
        top = (height - image.height) // 2 if image.height < height else 0
        padded.paste(image, (left, top))
        image = padded
    left = round((image.width - width) / 2.0)
    top = round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))

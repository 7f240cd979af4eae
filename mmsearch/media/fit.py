"""Makes an upright RGB picture fit a model, or a page."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmsearch.types import Preprocess


def fit(image: Image.Image, how: Preprocess) -> NDArray[np.uint8]:
    """Scales and crops an RGB picture as the model wants it, shape (height, width, 3).

    Gives the very pixels of open_clip's own transform before it normalises them.
    """
    height, width = how.size
    if how.resize_mode == "squash":
        size = width, height
    elif how.resize_mode == "longest" or height != width:
        size = _scaled(image, how)
    else:
        image = _without_ends(image)
        size = _shortest(image, height)
    if image.size != size:
        image = image.resize(size, Image.Resampling[how.interpolation.upper()])
    return np.asarray(_centre(image, how))


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


def _scaled(image: Image.Image, how: Preprocess) -> tuple[int, int]:
    ratios = image.height / how.size[0], image.width / how.size[1]
    ratio = max(ratios) if how.resize_mode == "longest" else min(ratios)
    return max(1, round(image.width / ratio)), max(1, round(image.height / ratio))


def _centre(image: Image.Image, how: Preprocess) -> Image.Image:
    """Cuts the centre out, or pads around it where the picture is smaller."""
    height, width = how.size
    if image.width < width or image.height < height:
        padded = Image.new("RGB", (max(width, image.width), max(height, image.height)),
                           (how.fill_color,) * 3)  # fmt: skip
        left, top = (width - image.width) // 2, (height - image.height) // 2
        padded.paste(image, (max(0, left), max(0, top)))
        image = padded
    left = round((image.width - width) / 2.0)
    top = round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))

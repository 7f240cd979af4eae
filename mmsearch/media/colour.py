"""From whatever a file calls its colours to 8-bit sRGB on white, as a viewer shows them."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from mmsearch.errors import DecodeError

_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
#: Profiles that change no colour of a probe by more than this are sRGB under another name.
_SAME = 3
#: What PNG calls sRGB's gamma, and how far another may be from it and say nothing (as in libpng).
_GAMMA, _GAMMA_TOLERANCE = 1 / 2.2, 0.05

# TIFF's tags
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_UNSIGNED, _SIGNED = 1, 2


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture in RGB on white.

    Args:
        profile: the ICC profile that the file carries, if any. One that cannot be used, or is for
            other colours than the picture has, says nothing.

    Raises:
        DecodeError: there are no pixels.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        colours, alpha = _from_deep_gray(image)
    else:
        colours, alpha = _parted(image)
    colours = _converted(colours, profile, image.info)
    if alpha is None:
        return colours
    # On white, as viewers show it: what lies under transparent pixels is often garbage.
    ground = Image.new("RGB", colours.size, "white")
    ground.paste(colours, mask=alpha)
    return ground


def _parted(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours without transparency, and how opaque each pixel is; None where all are."""
    alpha = None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        least, most = alpha.getextrema()
        # An alpha channel that is zero everywhere was never filled in.
        if least == 255 or (most == 0 and image.mode in _WITH_ALPHA):
            alpha = None
        is_gray = image.mode in ("1", "L", "LA")
        return (image.convert("L") if is_gray else rgba.convert("RGB")), alpha
    return (image.convert("L") if image.mode == "1" else image), None


# -- colour profiles -------------------------------------------------------------------------------


def _converted(image: Image.Image, profile: bytes | None, info: dict[Any, Any]) -> Image.Image:
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    known = profile if image.mode != "LAB" else None
    transform = _transform(known, image.mode) if known or image.mode == "LAB" else None
    if transform is not None:
        return transform.apply(image)
    gamma = info.get("gamma")
    if gamma and not profile and "srgb" not in info:
        image = _with_gamma(image, gamma)
    return image.convert("RGB")


@lru_cache(maxsize=8)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What takes a profile's colours to sRGB; None where that changes nothing, or it is none."""
    try:
        source: Any = ImageCms.createProfile("LAB")
        if profile is not None:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        found = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode not in ("RGB", "L"):
        return found
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(81, 9, 3)
    probe = cube if mode == "RGB" else levels[None]
    before = Image.fromarray(probe)
    change = np.asarray(found.apply(before), int) - np.asarray(before.convert("RGB"), int)
    return found if np.abs(change).max() > _SAME else None


def _with_gamma(image: Image.Image, gamma: float) -> Image.Image:
    """A picture that a PNG stores with another gamma than sRGB's."""
    if abs(gamma / _GAMMA - 1) <= _GAMMA_TOLERANCE or not 0.01 < gamma < 100:
        return image
    levels = np.arange(256) / 255
    table = (255 * levels ** (_GAMMA / gamma)).round().astype(int).tolist()
    return image.point(table * len(image.getbands()))


# -- gray of more than 8 bits ----------------------------------------------------------------------


def _from_deep_gray(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Gray of 12, 16 and 32 bits, and floating point, as 8 bits; and how opaque each pixel is.

    Pillow's own conversion clips at 255.
    """
    values = np.asarray(image)
    if values.size == 0:
        raise DecodeError("an image without pixels")
    tags = getattr(image, "tag_v2", {})
    clear = image.info.get("transparency")
    alpha = None
    if isinstance(clear, int):
        alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    if image.mode.startswith("I;16"):
        gray = scaled_to_8(values, 0, 4095 if tags.get(_BITS) == (12,) else 65535)
    else:
        if image.mode == "I" and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
            values = values.view(np.uint32)
        gray = scaled_to_8(values, *shown_range(values))
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        gray = 255 - gray
    return Image.fromarray(gray), alpha


def scaled_to_8(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Values from low to high as 0 to 255; what is no number is black."""
    found = np.empty(values.shape, np.uint8)
    scale = 255 / max(high - low, 1e-30)
    for row, out in zip(values, found, strict=True):  # a row at a time: they may be many
        out[:] = (np.nan_to_num(row.astype(np.float64), nan=low).clip(low, high) - low) * scale
    return found


def shown_range(values: NDArray[Any]) -> tuple[float, float]:
    """The values that are to be black and white.

    A file does not say. What looks like shares of white is taken as such, also with highlights
    above it; what fills much of the range of an integer is taken for that; else the values
    themselves are the range. Values of a few pixels, and one that lies far off all the others
    ("no data", as -9999 in maps), do not count.
    """
    sample = values.reshape(-1)[:: max(1, values.size >> 20)].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 0.0, 1.0
    for _ in range(2):
        sample = _without_far_value(_without_far_value(sample), sign=-1)
    low, high = (float(edge) for edge in np.percentile(sample, [0.1, 99.9]))
    if low >= 0:
        if values.dtype.kind == "f" and high <= 2:
            return 0.0, 1.0
        whites = (255.0, 2.0**15 - 1, 2.0**16 - 1, 2.0**31 - 1, 2.0**32 - 1)
        return next(((0.0, white) for white in whites if white / 2 < high <= white), (low, high))
    halves = (1.0,) if values.dtype.kind == "f" else (2.0**7, 2.0**15, 2.0**31)
    reach = max(-low, high)
    return next(((-half, half) for half in halves if half / 4 < reach <= half), (low, high))


def _without_far_value(sample: NDArray[np.float64], sign: int = 1) -> NDArray[np.float64]:
    """Without the least value (or, for -1, the greatest), if it lies far below all others."""
    edge = (sign * sample).min()
    rest: NDArray[np.float64] = sample[sign * sample > edge]
    if len(rest) and 0 < 4 * np.ptp(rest) < (sign * rest).min() - edge:
        return rest
    return sample

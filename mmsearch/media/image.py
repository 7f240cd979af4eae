"""From the bytes of an image file to the pixels that an encoder takes."""

from __future__ import annotations

import io
import math
import re
import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from mmsearch.errors import DecodeError, UsageError
from mmsearch.media.fingerprint import MAX_FILE_BYTES
from mmsearch.types import Preprocess

pillow_heif.register_heif_opener()
# Pillow warns of odd metadata and of large pictures, on stderr. What matters is in the ledger, and
# sizes we check ourselves, after JPEG's draft mode. (Filters set around each call would not be
# safe among threads.)
warnings.filterwarnings("ignore", module="PIL")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "HEIF", "AVIF")

#: The most pixels that are decoded: one picture of this size takes about 0.5 GB as RGB.
MAX_PIXELS = 178_956_970

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Decoded:
    """A picture, upright and RGB, and what its file says of it."""

    image: Image.Image
    width: int
    """In pixels, as a viewer shows it: after EXIF orientation, before any reduction."""
    height: int
    captured: datetime | None
    """The local time at which the picture was taken, from EXIF."""


def decode(content: bytes, *, at_least: tuple[int, int] | None = None) -> Decoded:
    """Decodes the first frame of an image file.

    Args:
        content: the whole file.
        at_least: height and width that are needed. A JPEG that is more than twice as large
            is decoded at a half, a quarter or an eighth of its size, which is several times
            as fast and never below twice what is needed.

    Raises:
        DecodeError: the content is not an image, is damaged or is too large; the message is
            the reason.
    """
    try:
        return _decode(content, at_least)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(f"too large: more than {MAX_PIXELS} pixels") from error
    except MemoryError as error:
        raise DecodeError("too large: not enough memory to decode it") from error
    except Exception as error:
        # Pillow and its codecs answer damaged files with nearly any exception there is
        # (OSError, SyntaxError, ValueError, TypeError, struct.error, ...): all mean one thing.
        raise DecodeError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged at its start"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"damaged image: {text}"[:300]


def _decode(content: bytes, at_least: tuple[int, int] | None) -> Decoded:
    if not content:
        raise DecodeError("empty file")
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        if at_least is not None and image.format in ("JPEG", "MPO"):
            _draft(image, at_least)
        if image.width * image.height > MAX_PIXELS:
            raise DecodeError(f"too large: {width} x {height} pixels")
        image.load()
        if image.format in ("JPEG", "MPO") and not _has_end(content):
            raise DecodeError("damaged image: its end is missing")
        captured, turn = _read_exif(image)
        if turn in _SIDEWAYS:
            width, height = height, width
        upright = _to_rgb(image.transpose(_TURNS[turn]) if turn in _TURNS else image)
    if upright.width < 1 or upright.height < 1:
        raise DecodeError("an image without pixels")
    return Decoded(upright, width, height, captured)


#: In a JPEG: what is no marker within the coded picture (a stuffed FF, a restart, padding).
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_END, _LONE = 0xD9, 0x01


def _has_end(content: bytes) -> bool:
    """Whether a JPEG's coded picture is followed by its end.

    A download or a copy that was cut off in a file of full size goes on with zeros, which the
    decoder takes for the picture: gray, and no word of it.
    """
    place = 2
    while found := _MARKER.search(content, place):
        marker = content[found.start() + 1]
        if marker == _END:
            return True
        place = found.end() if marker == _LONE else _behind_segment(content, found.end())
    return False


def _behind_segment(content: bytes, place: int) -> int:
    return place + int.from_bytes(content[place : place + 2], "big")


def _draft(image: Image.Image, at_least: tuple[int, int]) -> None:
    """Lets the JPEG decoder reduce, but never below twice the size needed on either side."""
    # EXIF may turn the picture, so that which side is which is not known yet.
    need = 2 * max(at_least)
    scale = min(image.width, image.height) // need
    if scale >= 2:
        # Pillow takes the largest reduction that keeps both sides at or above this size.
        image.draft(None, (image.width // scale, image.height // scale))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_gray(image)
    if image.has_transparency_data:
        # On white, as viewers show it: what lies under transparent pixels is often garbage.
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def _from_deep_gray(image: Image.Image) -> Image.Image:
    """16-bit and wider gray to 8 bits by its range: Pillow's own conversion clips at 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if values.size == 0:
        raise DecodeError("an image without pixels")
    low, high = 0.0, 65535.0
    if image.mode in ("I", "F") and (values.min() < 0 or values.max() > high):
        low, high = float(values.min()), float(values.max())
    elif image.mode == "F" and values.max() <= 1.0:
        high = 1.0
    elif values.max() <= 255 and image.mode == "F":
        high = 255.0
    scaled = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")


#: EXIF's orientations and what turns a picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


def _read_exif(image: Image.Image) -> tuple[datetime | None, int]:
    """Capture date and orientation; damaged EXIF says nothing, and costs no picture."""
    try:
        exif = image.getexif()
        turn = exif.get(ExifTags.Base.Orientation, 1)
        return _captured(exif), turn if isinstance(turn, int) else 1
    except Exception:  # Pillow's EXIF reader raises nearly anything on damaged tags
        return None, 1


def _captured(exif: Image.Exif) -> datetime | None:
    details = exif.get_ifd(ExifTags.IFD.Exif)
    for value in (
        details.get(ExifTags.Base.DateTimeOriginal),
        details.get(ExifTags.Base.DateTimeDigitized),
        exif.get(ExifTags.Base.DateTime),
    ):
        try:
            return datetime.strptime(str(value).strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S")
        except ValueError:
            continue
    return None


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


def read_image(path: Path) -> bytes:
    """The bytes of an image file that a user names.

    Raises:
        UsageError: there is none, it is too large to be one, or cannot be read.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{path}: no such image file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: too large to be an image to search with")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def thumbnail(content: bytes, side: int) -> bytes:
    """A JPEG whose longer side is at most `side` pixels.

    Raises:
        DecodeError: as `decode`.
    """
    image = decode(content, at_least=(math.ceil(side / 2), math.ceil(side / 2))).image
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return out.getvalue()

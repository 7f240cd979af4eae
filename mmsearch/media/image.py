"""From the bytes of an image file to an upright picture in sRGB.

Strangers' files are decoded in the processes of `mmsearch.media.sandbox`, never by a program that
uses this package.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from datetime import datetime

import pillow_heif
from PIL import Image, UnidentifiedImageError

from mmsearch.errors import DecodeError, in_a_line
from mmsearch.media import png
from mmsearch.media.colour import to_srgb
from mmsearch.media.exif import capture_time, orientation
from mmsearch.media.kinds import TIFF_SIGNATURES, why_not_read

pillow_heif.register_heif_opener()

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "HEIF", "AVIF")

#: The most pixels that are decoded: one picture of this size takes about 0.5 GB as RGB.
MAX_PIXELS = 178_956_970


@dataclass(frozen=True)
class DecodedImage:
    """A picture, upright and RGB, and what its file says of it."""

    image: Image.Image
    width: int
    """In pixels, as a viewer shows it: after EXIF orientation, before any reduction."""
    height: int
    captured: datetime | None
    """The local time at which the picture was taken, from EXIF."""


def decode(
    content: bytes, *, at_least: tuple[int, int] | None = None, most_pixels: int = MAX_PIXELS
) -> DecodedImage:
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
        return _decode(content, at_least, most_pixels)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(f"too large: more than {MAX_PIXELS} pixels") from error
    except MemoryError as error:
        raise DecodeError("too large: not enough memory to decode it") from error
    except Exception as error:
        # Pillow and its codecs answer damaged files with nearly any exception there is
        # (OSError, SyntaxError, ValueError, TypeError, struct.error, ...): all mean one thing.
        raise DecodeError(_reason(error, content)) from error


def _reason(error: Exception, content: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        return why_not_read(content)
    text = in_a_line(error, 300)
    if text.lower().startswith("unsupported"):
        return f"of a kind that is not read: {text}"[:300]
    return f"damaged image: {text}"[:300]


def _decode(content: bytes, at_least: tuple[int, int] | None, most_pixels: int) -> DecodedImage:
    if not content:
        raise DecodeError("empty file")
    profile = None
    if content.startswith(png.SIGNATURE):
        content, profile = png.cleaned(content)
    with _opened(content) as image:
        width, height = image.size
        if at_least is not None and image.format in ("JPEG", "MPO"):
            _draft(image, at_least)
        if image.width * image.height > most_pixels:
            raise DecodeError(f"too large: {width} x {height} pixels")
        image.load()
        if image.format in ("JPEG", "MPO") and not _has_end(content):
            raise DecodeError("damaged image: its end is missing")
        captured, turn = _read_exif(image, content)
        if turn in _SIDEWAYS:
            width, height = height, width
        profile = profile or image.info.get("icc_profile")
        upright = to_srgb(image, profile)
        if turn in _TURNS:
            upright = upright.transpose(_TURNS[turn])
    if upright.width < 1 or upright.height < 1:
        raise DecodeError("an image without pixels")
    return DecodedImage(upright, width, height, captured)


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        if not content.startswith(TIFF_SIGNATURES):
            raise
        from mmsearch.media.tiff import open_tiff  # and tifffile with it

        return open_tiff(content, MAX_PIXELS)


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
        place = found.end()
        if marker != _LONE:  # a segment, which begins with its length
            place += int.from_bytes(content[place : place + 2], "big")
    return False


def _draft(image: Image.Image, at_least: tuple[int, int]) -> None:
    """Lets the JPEG decoder reduce, but never below twice the size needed on either side."""
    # EXIF may turn the picture, so that which side is which is not known yet.
    need = 2 * max(at_least)
    scale = min(image.width, image.height) // need
    if scale >= 2:
        # Pillow takes the largest reduction that keeps both sides at or above this size.
        image.draft(None, (image.width // scale, image.height // scale))


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


def _read_exif(image: Image.Image, content: bytes) -> tuple[datetime | None, int]:
    """Capture time and orientation; damaged EXIF says nothing, and costs no picture."""
    profile = image.info.pop("Raw profile type APP1", None)  # what older ImageMagick calls it
    if profile is not None:
        image.info.setdefault("Raw profile type exif", profile)
    try:
        exif = image.getexif()
        return capture_time(exif), orientation(image, exif, content)
    except Exception:  # Pillow's EXIF reader raises nearly anything on damaged tags
        return None, 1

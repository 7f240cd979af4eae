"""TIFF files that Pillow cannot open: colours in floating point, and other uncommon samples."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from mmsearch.errors import DecodeError, in_a_line
from mmsearch.media.colour import scaled_to_8, shown_range

_TAGS = {274: 0x0112, 306: 0x0132}  # orientation and date, as EXIF has them


def open_tiff(content: bytes, most_pixels: int) -> Image.Image:
    """The first picture of a TIFF in 8 bits, gray or RGB, with alpha if it has that.

    Its `info` holds a colour profile and EXIF as other pictures' do.

    Raises:
        DecodeError: it is damaged, too large, or holds no gray and no RGB.
    """
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            page = file.pages.first
            if page.imagewidth * page.imagelength > most_pixels:
                raise DecodeError(f"too large: {page.imagewidth} x {page.imagelength} pixels")
            about = f"{page.samplesperpixel} x {page.bitspersample} bits, {page.compression.name}"
            kind = tifffile.PHOTOMETRIC(page.photometric).name
            samples, axes, extra = page.asarray(), page.axes, page.extrasamples
            profile = page.tags.valueof(34675)
            known = {exif: page.tags.valueof(tag) for tag, exif in _TAGS.items()}
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        # What a damaged file makes it raise is anything; what it lacks a library for, a ValueError.
        reason = in_a_line(error)
        raise DecodeError(
            f"TIFF that is damaged, or of a kind that is not read: {reason}"
        ) from error
    if kind not in ("MINISWHITE", "MINISBLACK", "RGB") or axes not in ("YX", "YXS", "SYX"):
        raise DecodeError(f"TIFF of a kind that is not read ({about}, {kind})")
    if axes != "YXS":
        samples = samples[..., None] if axes == "YX" else np.moveaxis(samples, 0, -1)
    shown = _in_8_bits(samples[..., : 3 if kind == "RGB" else 1])
    image = _assembled(255 - shown if kind == "MINISWHITE" else shown, samples, bool(extra))
    if isinstance(profile, bytes):
        image.info["icc_profile"] = profile
    exif = Image.Exif()
    exif.update({tag: value for tag, value in known.items() if value is not None})
    image.info["exif"] = exif.tobytes()
    return image


def _assembled(shown: NDArray[np.uint8], samples: NDArray[Any], has_alpha: bool) -> Image.Image:
    """Colours (height, width, 1 or 3), with the alpha that stands behind them in the samples."""
    colours = shown.shape[-1]
    if has_alpha and samples.shape[-1] > colours:
        most = 1.0 if samples.dtype.kind == "f" else float(np.iinfo(samples.dtype).max)
        alpha = scaled_to_8(samples[..., colours : colours + 1], 0.0, most)
        shown = np.concatenate([shown, alpha], axis=-1)
    return Image.fromarray(shown[..., 0] if shown.shape[-1] == 1 else shown)


def _in_8_bits(samples: NDArray[Any]) -> NDArray[np.uint8]:
    if samples.dtype in (np.uint8, np.int8):  # of those that are called signed, few are
        return np.ascontiguousarray(samples).view(np.uint8)
    if samples.dtype.kind == "b":
        return samples.astype(np.uint8) * np.uint8(255)
    if samples.dtype == np.uint16:
        return scaled_to_8(samples, 0, 65535)
    return scaled_to_8(samples, *shown_range(samples))

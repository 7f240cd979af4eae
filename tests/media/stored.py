"""One drawing, stored in every way: for tests, and for benchmarks/pictures.py."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw

import mmsearch.media.image  # noqa: F401 - HEIF


def drawing() -> Image.Image:
    """Not alike when black, white, turned or negative."""
    image = Image.new("RGB", (160, 120), (90, 160, 230))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 75, 160, 120), fill=(60, 130, 50))
    draw.ellipse((10, 8, 38, 35), fill=(255, 220, 60))
    draw.rectangle((75, 45, 130, 90), fill=(200, 60, 40))
    draw.polygon([(70, 45), (102, 20), (135, 45)], fill=(110, 40, 30))
    return image


def chunk(kind: bytes, data: bytes, damage: int = 0) -> bytes:
    """A chunk of a PNG; `damage` spoils its checksum."""
    checksum = zlib.crc32(kind + data) ^ damage
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(samples: np.ndarray, depth: int, kind: int, *more: bytes) -> bytes:
    """A PNG of samples (height, bytes of a row) of a depth and colour type, with more chunks."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    width = samples.shape[1] * 8 // (depth * channels)
    head = struct.pack(">IIBBBBB", width, len(samples), depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in samples))
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            *more,
            chunk(b"IDAT", data),
            chunk(b"IEND", b""),
        )
    )


def low_png(gray: np.ndarray, depth: int, *more: bytes) -> bytes:
    """A PNG of gray (height, width) in 1, 2 or 4 bits."""
    bits = np.unpackbits((gray >> (8 - depth))[..., None], axis=-1)[..., -depth:]
    return png(np.packbits(bits.reshape(len(gray), -1), axis=1), depth, 0, *more)


def tiff(samples: np.ndarray, photometric: int, sample_format: int, order: str = "<") -> bytes:
    """An uncompressed TIFF of samples (height, width) or (height, width, channels)."""
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    channels = samples.shape[2] if samples.ndim == 3 else 1
    pairs = {
        256: samples.shape[1], 257: samples.shape[0], 258: samples.dtype.itemsize * 8, 259: 1,
        262: photometric, 273: 400, 277: channels, 278: samples.shape[0], 279: len(data),
        339: sample_format,
    }  # fmt: skip
    entries, behind = b"", b""
    for tag, value in pairs.items():
        several = channels > 1 and tag in (258, 339)
        if several:  # one for each channel, which does not fit into the entry
            field = struct.pack(order + "I", 200 + len(behind))
            behind += struct.pack(f"{order}{channels}H", *[value] * channels)
        else:
            field = struct.pack(order + "I", value) if tag in (256, 257, 273, 278, 279) else (
                struct.pack(order + "HH", value, 0))  # fmt: skip
        kind = 4 if tag in (256, 257, 273, 278, 279) else 3
        entries += struct.pack(order + "HHI", tag, kind, channels if several else 1) + field
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(order + "IH", 8, len(pairs)) + entries + bytes(4)
    return (head.ljust(200, b"\0") + behind).ljust(400, b"\0") + data


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


#: Samples of a gray picture (values 0 to 255): type, TIFF's sample format, and how they are stored.
DEPTHS = {
    "8": (1, lambda gray: gray),
    "8, called signed": (2, lambda gray: gray),  # as the one such file that we have is
    "16": (1, lambda gray: gray.astype("u2") * 257),
    "16s": (2, lambda gray: (gray.astype("i4") * 257 - 32768).astype("i2")),
    "32": (1, lambda gray: gray.astype("u4") * 16843009),
    "float": (3, lambda gray: gray.astype("f4") / 255),
}
FLOATS = {
    "hdr": lambda gray: np.where(gray > 200, 7.0, gray / 255),
    "of 255": lambda gray: gray * 1.0,
    "of 65535": lambda gray: gray * 257.0,
    "signed": lambda gray: gray / 127.5 - 1,
    "no data": lambda gray: np.where(gray > 200, -9999.0, gray / 255),
    "not a number": lambda gray: np.where(gray > 200, np.nan, gray / 255),
    "infinite": lambda gray: np.where(gray > 200, np.inf, gray / 255),
}
ENDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif",
        "HEIF": "heic", "AVIF": "avif"}  # fmt: skip


def made() -> dict[str, bytes]:  # noqa: C901 - a list of ways
    """The drawing, in every way that something here can write, by names with suffixes."""
    image = drawing()
    gray, rgb = np.asarray(image.convert("L")), np.asarray(image)
    found: dict[str, bytes] = {}

    def save(name: str, picture: Image.Image, form: str, **options: object) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):  # there is no such combination
            found[f"{form}-{name}.{ENDS[form]}"] = saved(picture, form, **options)

    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    clear, empty = image.convert("RGBA"), image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    empty.putalpha(0)
    modes = {
        mode: image.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "PA")
    }
    profiles = sorted(Path("/usr/share/color/icc/colord").glob("*RGB*.icc"))
    for form in ENDS:
        for mode, picture in (modes | {"LAB": lab, "clear": clear, "empty": empty}).items():
            save(mode, picture, form)
        for turn in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = turn
            save(f"turn{turn}", image, form, exif=exif)
        for profile in profiles:
            other = ImageCms.profileToProfile(
                image, ImageCms.createProfile("sRGB"), ImageCms.getOpenProfile(str(profile)),
                outputMode="RGB",
            )  # fmt: skip
            save(f"profile-{profile.stem}", other, form, icc_profile=profile.read_bytes())
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4", "zstd"):
        save(compression, modes["1"] if compression == "group4" else image, "TIFF",
             compression=compression)  # fmt: skip
    for name, (sample_format, stored) in DEPTHS.items():
        for order, end in (("<", "le"), (">", "be")):
            for white_is_zero, shades in ((1, gray), (0, 255 - gray)):
                found[f"tiff-{name}-{white_is_zero}-{end}.tif"] = tiff(
                    stored(shades), white_is_zero, sample_format, order
                )
    for name, stored in FLOATS.items():
        found[f"tiff-float-{name}.tif"] = tiff(stored(gray).astype("f4"), 1, 3)
    found["tiff-float-rgb.tif"] = tiff((rgb / 255).astype("f4"), 2, 3)
    for depth in (1, 2, 4):
        shade = chunk(b"tRNS", struct.pack(">H", int(gray[2, 2]) >> (8 - depth)))
        found[f"png-gray{depth}.png"] = low_png(gray, depth)
        found[f"png-gray{depth}-clear.png"] = low_png(gray, depth, shade)
    for name, samples, depth, kind in (
        ("gray8", gray, 8, 0), ("gray16", gray.astype(">u2") * 257, 16, 0),
        ("rgb8", rgb.reshape(len(rgb), -1), 8, 2),
        ("rgb16", (rgb.astype(">u2") * 257).reshape(len(rgb), -1), 16, 2),
    ):  # fmt: skip
        rows = np.ascontiguousarray(samples).view(np.uint8)
        sky = np.atleast_1d(rgb[2, 2] if kind == 2 else gray[2, 2]) * np.uint16(
            257 if depth > 8 else 1
        )
        found[f"png-{name}.png"] = png(rows, depth, kind)
        found[f"png-{name}-clear.png"] = png(
            rows, depth, kind, chunk(b"tRNS", sky.astype(">u2").tobytes())
        )
        for gamma in (1.0, 0.45455, 0.55556):
            gama = chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
            found[f"png-{name}-gamma{gamma}.png"] = png(rows, depth, kind, gama)
    return found

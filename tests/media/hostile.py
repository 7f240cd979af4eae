"""Files that mean harm, made here: cut off, bits flipped, bombs, and names that move a terminal.

tests/media/test_hostile.py tries a sample, benchmarks/hostile.py thousands.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

import mmsearch.media.image  # noqa: F401 - HEIF and AVIF

FORMATS = {
    "jpeg": ("JPEG", {}),
    "progressive.jpeg": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "lossless.webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "lzw.tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "deflate.tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "jpeg.tiff": ("TIFF", {"compression": "jpeg"}),
    "heic": ("HEIF", {}),
    "avif": ("AVIF", {}),
}
SUFFIX = {name: "." + name.rsplit(".", 1)[-1] for name in FORMATS}

#: Names as a disk may hold them and no terminal should be shown.
NAMES = (
    b"new\nline.png", b"\x1b[2J\x1b]0;title\x07.png", b"back\x08\x08space.png", b"\xff\xfe.png",
    b"bell\x07.png", "\u202egnp.exe\u202c.png".encode(), "\U0001f98a\ufe0f\u200d.png".encode(),
    b"a" * 251 + b".png", b"-rf.png", b"'; DROP TABLE media; --.png", b"%s%n.png",
    b"<script>alert(1)<script>.png", b'" onload="x.png', b"\xc2\x9b31m.png", b" .png",
    b"~.png", b"$(touch ran).png", b"*.png",
)  # fmt: skip


def picture(size: tuple[int, int] = (160, 120), seed: int = 0) -> Image.Image:
    """Smooth with some noise, so that no format makes it small."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    smooth = np.stack([across, down, across + down], -1) % 256
    return Image.fromarray(((smooth + rng.integers(0, 40, smooth.shape)) % 256).astype(np.uint8))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def wholes() -> dict[str, bytes]:
    """A sound file of each format."""
    image = picture()
    return {name: saved(image, form, **options) for name, (form, options) in FORMATS.items()}


def cuts(content: bytes) -> Iterator[bytes]:
    """The file cut at every tenth."""
    for tenth in range(10):
        yield content[: len(content) * tenth // 10]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """The file with some bits flipped, or bytes replaced, doubled or left out."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        place = rng.randrange(len(damaged))
        # What stands at the front says how large all the rest is.
        if rng.random() < 0.5:
            place = rng.randrange(min(len(damaged), 200))
        how = rng.random()
        if how < 0.6:
            damaged[place] ^= 1 << rng.randrange(8)
        elif how < 0.8:
            damaged[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif how < 0.9:
            damaged[place:place] = damaged[place : place + 16]
        else:
            del damaged[place : place + 4]
    return bytes(damaged) or b"\0"


def bombs(*, quick: bool = False) -> dict[str, bytes]:
    """Small files that ask for a lot; `quick`: without those that take long to make."""
    frames = [Image.new("L", (8, 8), number % 251) for number in range(10_000)]
    found = {
        "header.png": png(0x7FFFFFFF, 0x7FFFFFFF),
        "none.png": png(0, 10),
        "flat.png": saved(Image.new("RGB", (65_535, 1), "red"), "PNG"),
        "thin.png": saved(Image.new("RGB", (1, 65_535), "red"), "PNG"),
        "frames.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "huge.gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6)
        + b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x44\x01\x00;",
        "huge.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 60_000, 60_000, 1,
                                        24, 0, 0, 0, 0, 0, 0),
        "negative.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, -5, -(1 << 31), 1,
                                            24, 0, 0, 0, 0, 0, 0),
        "huge.tiff": tiff({256: 1 << 20, 257: 1 << 20, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1,
                           278: 1 << 20, 279: 0xFFFFFFFF}),
        "loop.tiff": tiff({256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64},
                          next_at=8),
        "samples.tiff": tiff({256: 9000, 257: 9000, 258: 8, 259: 8, 262: 2, 273: 8, 277: 0xFFFF,
                              278: 9000, 279: 64}),
        "header.jpeg": jpeg_of_size(65_500, 65_500),
        "long.jpeg": saved(Image.new("RGB", (65_500, 8)), "JPEG"),
        "lies.avif": ispe(saved(picture(), "AVIF"), 65_535, 65_535),
        "lies.heic": ispe(saved(picture(), "HEIF"), 65_535, 65_535),
        "zeros.jpeg": saved(picture(), "JPEG")[:2000] + bytes(30 << 20),
    }  # fmt: skip
    if quick:
        return found
    return found | {
        "limit.png": saved(Image.new("1", (13_000, 13_000)), "PNG"),
        "huge.png": saved(Image.new("1", (40_000, 40_000)), "PNG"),
        "text.png": png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(300 << 20), 9))),
        "profile.png": png(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(bytes(300 << 20), 9))),
        "deep.png": saved(Image.new("I;16", (13_000, 13_000)), "PNG"),
        "clear.png": saved(Image.new("LA", (11_000, 11_000)), "PNG"),
        "huge.webp": saved(Image.new("RGB", (16_383, 16_383)), "WEBP", lossless=True, method=0),
        "limit.webp": saved(Image.new("RGB", (16_383, 10_900)), "WEBP", lossless=True, method=0),
        "scans.jpeg": scans(3000),
        "limit.jpeg": saved(Image.new("L", (13_000, 13_000)), "JPEG"),
        "limit.avif": saved(Image.new("RGB", (12_000, 12_000)), "AVIF", speed=10),
        "zeros.png": bytes(64 << 20),
    }  # fmt: skip


def png(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit gray that says it is so large: other chunks, and hardly any data."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *more,
             (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def tiff(tags: dict[int, int], next_at: int = 0) -> bytes:
    """A little-endian TIFF with one directory of 32-bit tags."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_at)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(64)


def jpeg_of_size(width: int, height: int) -> bytes:
    content = bytearray(saved(picture(), "JPEG"))
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def scans(count: int) -> bytes:
    """A progressive JPEG with its last scan over and over: each costs a pass over the picture."""
    content = saved(Image.new("L", (4000, 4000), 77), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + content[-2:]


def ispe(content: bytes, width: int, height: int) -> bytes:
    """A HEIF or AVIF that says another size."""
    place = content.index(b"ispe") + 8
    return content[:place] + struct.pack(">II", width, height) + content[place + 8 :]

"""What Pillow is shown of a PNG: no chunk that the picture does not need can cost the file.

Pillow refuses a whole file for a long text, a large colour profile or a wrong checksum in a
comment; viewers pass over them, as the PNG specification (ISO/IEC 15948, 13.2) lets a decoder do.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Ancillary chunks that tell what the picture looks like, and their least length.
_USED = {b"gAMA": 4, b"sRGB": 1, b"eXIf": 8}
#: Where editors write EXIF and XMP, among texts.
_KEYWORDS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")
_MAX_TEXT, _MAX_PROFILE = 1 << 20, 16 << 20


class Chunk(NamedTuple):
    """A chunk: its type, its data, and all of it as it lies in the file."""

    kind: bytes
    data: bytes
    whole: bytes

    @property
    def is_ancillary(self) -> bool:
        return bool(self.kind[0] & 0x20)

    @property
    def is_intact(self) -> bool:
        return zlib.crc32(self.whole[4:-4]).to_bytes(4, "big") == self.whole[-4:]


def cleaned(content: bytes) -> tuple[bytes, bytes | None]:
    """A PNG with no more than its picture needs, and its colour profile.

    Critical chunks stay as they are, damaged ones too. The transparent colour is put into the
    depth that Pillow gives the pixels.
    """
    kept, profile = [SIGNATURE], None
    depth = colour_type = 0
    for chunk in _chunks(content):
        if not chunk.is_ancillary:
            if chunk.kind == b"IHDR" and len(chunk.data) >= 10:
                depth, colour_type = chunk.data[8], chunk.data[9]
            kept.append(chunk.whole)
        elif not chunk.is_intact:
            continue
        elif chunk.kind == b"iCCP":
            profile = _inflated(chunk.data.partition(b"\0")[2][1:], _MAX_PROFILE)
        elif chunk.kind == b"tRNS":
            kept.append(_transparent(chunk, depth, colour_type))
        elif chunk.kind in (b"tEXt", b"zTXt", b"iTXt"):
            if _is_metadata(chunk):
                kept.append(chunk.whole)
        elif len(chunk.data) >= _USED.get(chunk.kind, len(chunk.data) + 1):
            kept.append(chunk.whole)
    return b"".join(kept), profile


def _chunks(content: bytes) -> Iterator[Chunk]:
    """The chunks up to the end of the picture; the last one may be cut off."""
    place, kind = len(SIGNATURE), b""
    while place + 8 <= len(content) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length
        if end > len(content) and kind[0] & 0x20:
            return
        yield Chunk(kind, content[place + 8 : end - 4], content[place:end])
        place = end


def _is_metadata(chunk: Chunk) -> bool:
    """Whether a text is EXIF or XMP, and not too long."""
    keyword, _, rest = chunk.data.partition(b"\0")
    if keyword not in _KEYWORDS:
        return False
    if chunk.kind == b"zTXt":
        return _inflated(rest[1:], _MAX_TEXT) is not None
    if chunk.kind == b"iTXt" and rest[:1] == b"\1":
        text = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
        return _inflated(text, _MAX_TEXT) is not None
    return len(rest) <= _MAX_TEXT


def _inflated(data: bytes, limit: int) -> bytes | None:
    """What was compressed; None where that is damaged or longer than the limit."""
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(data, limit)
    except zlib.error:
        return None
    return found if inflater.eof else None


def _transparent(chunk: Chunk, depth: int, colour_type: int) -> bytes:
    """The chunk of the transparent colour in Pillow's depth; nothing where it is too short."""
    if len(chunk.data) < {0: 2, 2: 6}.get(colour_type, 0):
        return b""
    if colour_type == 0 and depth in (2, 4):
        (value,) = struct.unpack(">H", chunk.data[:2])
        most = (1 << depth) - 1
        return _made(b"tRNS", struct.pack(">H", (value & most) * (255 // most)))
    if colour_type == 2 and depth == 16:  # of which Pillow keeps the upper half
        values = struct.unpack(">3H", chunk.data[:6])
        return _made(b"tRNS", struct.pack(">3H", *(value >> 8 for value in values)))
    return chunk.whole


def _made(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

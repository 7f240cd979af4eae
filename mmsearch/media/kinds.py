"""What a file is that is not read: a reason that does not send people looking for damage.

The few kinds that people keep among their pictures, or under a picture's name. A library of
thousands of signatures calls a picture that was zeroed at its start an embroidery design.
"""

from __future__ import annotations

import re

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
READ = "JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC and AVIF"

#: What may stand before the first element: no two parts of it match the same bytes.
_MARKUP = (
    rb"(?:\xef\xbb\xbf)?(?:\s++|<\?(?:(?!\?>).)*+\?>|<!--(?:(?!-->).)*+-->"
    rb"|<!(?i:doctype)(?:[^>\[]|\[[^\]]*+\])*+>)*+"
)
#: Pictures of other kinds.
_PICTURES = (
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (rb"8BPS", "Photoshop"),
    (rb"\x00\x00[\x01\x02]\x00[^\x00]", "icon (ICO or CUR)"),
    (rb"P[1-6]\s+[#\d]|P7\s|P[fF]\s+\d", "Netpbm"),
    (rb"\x76\x2f\x31\x01", "OpenEXR"),
    (rb"#\?R", "Radiance HDR"),
    (rb"gimp xcf", "GIMP"),
    (rb"DDS ", "DirectDraw"),
    (rb"qoif", "QOI"),
    (rb"icns", "Apple icon"),
    (rb"FUJIFILMCCD-RAW|II\*\x00.{4}CR|IIRO|IIU\x00|....ftypcrx ", "camera raw"),
    (rb"II\xbc|MM\x00\xbc", "JPEG XR"),
    (_MARKUP + rb"(?i:<svg)", "SVG"),
)
#: No pictures.
_OTHERS = (
    (_MARKUP + rb"(?i:<(html|head|body))|(?:\xef\xbb\xbf)?\s*+(?i:<!doctype html)", "a web page"),
    (rb"(\xef\xbb\xbf)?\s*+<[?!a-zA-Z]", "an XML document"),
    (rb"%PDF-", "a PDF document"),
    (rb"....ftyp(qt|isom|iso\d|mp4\d|M4V|avc1|3gp)|....moov|....mdat|\x1a\x45\xdf\xa3", "a video"),
    (rb"RIFF....AVI ", "a video"),
    (rb"RIFF....WAVE|ID3[\x02-\x04]|OggS|fLaC|\xff[\xfb\xf3\xf2]", "a sound"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc|Rar!", "an archive"),
    (rb"\xd0\xcf\x11\xe0", "an Office document"),
    (rb"\x7fELF|MZ(?=.{0,61}\x00)", "a program"),
    (rb"version https://git-lfs", "a pointer of Git LFS: the picture itself was not fetched"),
    (rb"\{", "a JSON document"),
)
#: Kinds that are read: not all of what they may hold, or they are damaged.
_READ = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG", "PNG"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"GIF8", "GIF"),
    (rb"BM.{4}\x00{4}", "BMP"),
    (b"|".join(map(re.escape, TIFF_SIGNATURES)), "TIFF"),
    (rb"....ftyp(avif|avis)", "AVIF"),
    (rb"....ftyp(hei|hev|mif1|msf1|miaf)", "HEIC"),
)


def why_not_read(content: bytes) -> str:
    """Why nothing here opens a file, by what it begins with."""
    start = content[:2048]
    if kind := _named(start, _PICTURES):
        return f"a picture of a kind that is not read: {kind} ({READ} are)"
    if kind := _named(start, _READ):
        return f"{kind} that is damaged, or of a kind that is not read"
    if kind := _named(start, _OTHERS):
        return f"not an image: {kind}"
    return "not an image, or damaged at its start"


def _named(start: bytes, kinds: tuple[tuple[bytes, str], ...]) -> str:
    found = (name for pattern, name in kinds if re.match(pattern, start, re.DOTALL))
    return next(found, "")

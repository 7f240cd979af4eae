"""What EXIF says of a picture: when it was taken, and which side is up."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

from PIL import ExifTags, Image

#: "2019:07:04 12:30:15" by the standard; cameras and programs write other marks, spaces for zeros,
#: fractions, zones, and leave out seconds or the time. A zone says nothing here: capture times are
#: local times.
_DATE = re.compile(
    r"(?P<year>\d{4})[:/.-] ?(?P<month>\d{1,2})[:/.-] ?(?P<day>\d{1,2})"
    r"(?:[T\s]\s*(?P<hour>\d{1,2}): ?(?P<minute>\d{1,2})(?:: ?(?P<second>\d{1,2}))?"
    r"(?:[.,]\d*)?\s*(?P<half>[AaPp])?)?"
)
_HEIC_TURNS = (b"irot", b"imir")


def capture_time(exif: Image.Exif) -> datetime | None:
    """The local time at which a picture was taken, or None."""
    details = exif.get_ifd(ExifTags.IFD.Exif)
    values = (
        details.get(ExifTags.Base.DateTimeOriginal),
        details.get(ExifTags.Base.DateTimeDigitized),
        exif.get(ExifTags.Base.DateTime),
    )
    return next((found for value in values if (found := parse_date(value))), None)


def parse_date(value: Any) -> datetime | None:
    """A date as cameras write it, to the second; None where it is none."""
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    match = _DATE.match(text.strip("\0 "))
    if match is None:
        return None
    year, month, day, hour, minute, second = (
        int(match[name] or 0) for name in ("year", "month", "day", "hour", "minute", "second")
    )
    if match["half"] and 1 <= hour <= 12:
        hour = hour % 12 + (12 if match["half"] in "Pp" else 0)
    if hour > 24 or minute > 59 or second > 60:
        return None
    try:
        # Hour 24 is how some phones call the first hour of that very day; second 60 is a leap.
        return datetime(year, month, day, hour % 24, minute) + timedelta(seconds=min(second, 59))
    except ValueError:
        return None


def orientation(image: Image.Image, exif: Image.Exif, content: bytes) -> int:
    """The EXIF orientation, 1 to 8, that is still to be applied to a decoded picture."""
    value = exif.get(ExifTags.Base.Orientation, 1)
    if image.format == "AVIF":  # Pillow puts the file's own turn into EXIF; XMP does not count
        own = Image.Exif()
        own.load(image.info.get("exif", b""))
        value = own.get(ExifTags.Base.Orientation, 1)
    if image.format == "HEIF" and not _turns_itself(content):
        # The standard says that EXIF does not count there; cameras and people say otherwise.
        value = image.info.get("original_orientation") or 1
    if isinstance(value, tuple) and value:
        value = value[0]
    if isinstance(value, bytes):
        value = value.strip(b"\0 ").decode("latin-1") if value[:1].isdigit() else sum(value)
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return 1


def _turns_itself(content: bytes) -> bool:
    """Whether a HEIF holds a rotation or a mirroring of its own, which was applied."""
    place = content.find(b"ipco")
    if place < 4:
        return False
    length = int.from_bytes(content[place - 4 : place], "big")
    properties = content[place : place - 4 + length]
    return any(name in properties for name in _HEIC_TURNS)

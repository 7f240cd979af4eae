"""Sidecars: captions in `name.txt` beside `name.jpg`, and what a caption is cleaned of."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable
from pathlib import Path

from mmsearch.errors import LabelsError

#: A caption is cut here: no text encoder reads as far.
MAX_CAPTION_CHARACTERS = 4096

#: No more of a sidecar is read.
MAX_SIDECAR_BYTES = 1 << 20
NOT_TEXT = "not a text in UTF-8, so it gives no captions; save it as UTF-8"
#: The longer marks first: UTF-32's begins as UTF-16's does.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


#: No text has many of them; UTF-16 without a byte order mark has, in most scripts.
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))


def decode_text(content: bytes) -> str:
    """A text file's characters: UTF-8, or whatever its byte order mark says.

    Raises:
        UnicodeDecodeError: it is neither. Guessing would give captions of other letters.
    """
    named = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    controls = len(content) - len(content.translate(None, _CONTROLS))
    if named == "utf-8" and controls > len(content) // 4:
        raise UnicodeDecodeError(named, content, 0, 1, "much of it is no text, as in UTF-16")
    return content.decode(named)


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts as captions: trimmed, without the empty ones. A repeated one is kept twice."""
    return tuple(text for text in map(_clean, texts) if text)


def _clean(text: str) -> str:
    # NULs and lone surrogates cannot be stored as text.
    plain = text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
    return plain.strip()[:MAX_CAPTION_CHARACTERS]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        LabelsError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise LabelsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LabelsError(f"{path}: not a text file in UTF-8") from error


def read_sidecar(path: bytes) -> tuple[str, ...]:
    """The captions in a `name.txt`: one a line. A file that cannot be read has none.

    Raises:
        UnicodeDecodeError: it is no text, or in an encoding that it does not name.
    """
    try:
        # O_NONBLOCK: a FIFO of that name must not hang us.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(MAX_SIDECAR_BYTES) or b""
    except OSError:
        return ()
    try:
        text = decode_text(content)
    except UnicodeDecodeError as error:
        # A character that was cut in two where reading ended is no other encoding.
        if len(content) < MAX_SIDECAR_BYTES or error.start < len(content) - 4:
            raise
        text = decode_text(content[: error.start])
    return clean_captions(text.split("\n"))

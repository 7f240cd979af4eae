"""Sidecars: captions in `name.txt` beside `name.jpg`, and what a caption is cleaned of."""

from __future__ import annotations

import os
from collections.abc import Iterable

#: A caption is cut here: no text encoder reads as far.
MAX_CAPTION_CHARACTERS = 4096

#: No more of a sidecar is read.
MAX_SIDECAR_BYTES = 1 << 20


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts as captions: trimmed, without the empty ones. A repeated one is kept twice."""
    return tuple(text for text in map(_clean, texts) if text)


def _clean(text: str) -> str:
    # NULs and lone surrogates cannot be stored as text.
    plain = text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
    return plain.strip()[:MAX_CAPTION_CHARACTERS]


def read_sidecar(path: bytes) -> tuple[str, ...]:
    """The captions in a `name.txt`: one a line. A file that cannot be read has none."""
    try:
        # O_NONBLOCK: a FIFO of that name must not hang us.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(MAX_SIDECAR_BYTES)
    except OSError:
        return ()
    return clean_captions((content or b"").decode("utf-8-sig", "replace").split("\n"))

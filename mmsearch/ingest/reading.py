"""From a file on the disk to pixels, in worker threads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from mmsearch.datasets.sidecar import read_sidecar
from mmsearch.errors import DecodeError
from mmsearch.ingest.plan import Candidate
from mmsearch.media.discover import sidecar_path
from mmsearch.media.fingerprint import Stamp, content_hash
from mmsearch.media.image import MAX_FILE_BYTES, decode, fit
from mmsearch.types import Preprocess

#: The stamp of a file that could not even be read: no file has it, so it is tried again.
NEVER = Stamp(-1, 0)


@dataclass(frozen=True)
class Picture:
    """What decoding found: the pixels (height, width, 3) and what the file says of itself."""

    pixels: NDArray[np.uint8]
    width: int
    height: int
    captured: datetime | None


@dataclass(frozen=True)
class Reading:
    """The outcome for one candidate: a picture, or only a hash that is known, or a reason."""

    candidate: Candidate
    stamp: Stamp
    digest: bytes = b""
    picture: Picture | None = None
    sidecar_captions: tuple[str, ...] = ()
    reason: str = ""
    seconds: float = 0.0


def read(candidate: Candidate, how: Preprocess, is_known: Callable[[bytes], bool]) -> Reading:
    """Reads a file once: hashes it, and decodes it only where its content is not known.

    Never raises for what is wrong with the file: that is the outcome's `reason`.
    """
    started = time.perf_counter()
    stamp, content, reason = content_of(candidate.absolute)
    if reason:
        return Reading(candidate, stamp, reason=reason)
    digest = content_hash(content)
    picture = None
    if not is_known(digest):
        try:
            found = decode(content, at_least=how.size)
            picture = Picture(fit(found.image, how), found.width, found.height, found.captured)
        except (DecodeError, MemoryError) as error:
            return Reading(candidate, stamp, reason=_reason(error))
    sidecar = candidate.file.sidecar
    captions = read_sidecar(sidecar_path(candidate.absolute)) if sidecar else ()
    return Reading(
        candidate, stamp, digest, picture, captions, seconds=time.perf_counter() - started
    )


@dataclass(frozen=True)
class Opened:
    """The pixels (height, width, 3) of a file that was indexed, or why there are none."""

    stamp: Stamp
    pixels: NDArray[np.uint8] | None = None
    reason: str = ""


def open_known(path: bytes, digest: bytes, how: Preprocess) -> Opened:
    """Reads a file that was indexed with some content; never raises for what is wrong with it."""
    stamp, content, reason = content_of(path)
    if reason:
        return Opened(stamp, reason=reason)
    if content_hash(content) != digest:
        changed = "its content is not what was indexed: touch the file, and index again"
        return Opened(stamp, reason=changed)
    try:
        return Opened(stamp, fit(decode(content, at_least=how.size).image, how))
    except (DecodeError, MemoryError) as error:
        return Opened(stamp, reason=_reason(error))


def pixels_of(path: bytes, how: Preprocess) -> NDArray[np.uint8] | None:
    """The pixels (height, width, 3) of a file as it is now; None where it cannot be used."""
    _, content, reason = content_of(path)
    try:
        return None if reason else fit(decode(content, at_least=how.size).image, how)
    except (DecodeError, MemoryError):
        return None


def _reason(error: DecodeError | MemoryError) -> str:
    is_large = isinstance(error, MemoryError)
    return "too large: not enough memory to scale it" if is_large else str(error)


def content_of(path: bytes) -> tuple[Stamp, bytes, str]:
    """A file's stamp and its bytes, or why they cannot be had."""
    try:
        # O_NONBLOCK: a FIFO that took a file's place since the walk must not hang us.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            stamp = Stamp.of(os.fstat(descriptor))
            if stamp.size > MAX_FILE_BYTES:
                return stamp, b"", f"too large: {stamp.size >> 20} MiB"
            return stamp, file.read(), ""
    except OSError as error:
        return NEVER, b"", f"cannot be read: {error.strerror or error}"

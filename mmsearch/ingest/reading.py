"""From a file on the disk to pixels, in worker threads and the decoders' processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmsearch.datasets.sidecar import read_sidecar
from mmsearch.errors import DecodeError
from mmsearch.ingest.plan import Candidate
from mmsearch.media.discover import sidecar_path
from mmsearch.media.fingerprint import Stamp
from mmsearch.media.isolated import Decoders, Picture
from mmsearch.types import Preprocess


@dataclass(frozen=True)
class Reading:
    """The outcome for one candidate: a picture, or only a hash that is known, or a reason."""

    candidate: Candidate
    stamp: Stamp
    digest: bytes = b""
    picture: Picture | None = None
    sidecar_captions: tuple[str, ...] = ()
    unread_sidecar: bytes = b""
    """The path of a sidecar that is no text."""
    reason: str = ""
    seconds: float = 0.0


def read(
    candidate: Candidate, how: Preprocess, is_known: Callable[[bytes], bool], decoders: Decoders
) -> Reading:
    """Reads a file once: hashes it, and decodes it only where its content is not known.

    Never raises for what is wrong with the file: that is the outcome's `reason`.
    """
    started = time.perf_counter()
    with decoders.open(candidate.absolute) as file:
        if file.reason:
            return Reading(candidate, file.stamp, reason=file.reason)
        picture = None
        if not is_known(file.digest):
            try:
                picture = file.picture(how)
            except DecodeError as error:
                return Reading(candidate, file.stamp, reason=str(error))
    captions, unread = sidecar_of(candidate)
    seconds = time.perf_counter() - started
    return Reading(candidate, file.stamp, file.digest, picture, captions, unread, seconds=seconds)


def sidecar_of(candidate: Candidate) -> tuple[tuple[str, ...], bytes]:
    """The captions in a file's sidecar; and the sidecar's path where it is no text."""
    if candidate.file.sidecar is None:
        return (), b""
    path = sidecar_path(candidate.absolute)
    try:
        return read_sidecar(path), b""
    except UnicodeDecodeError:
        return (), path


@dataclass(frozen=True)
class Opened:
    """The pixels (height, width, 3) of a file that was indexed, or why there are none."""

    stamp: Stamp
    pixels: NDArray[np.uint8] | None = None
    reason: str = ""


def open_known(path: bytes, digest: bytes, how: Preprocess, decoders: Decoders) -> Opened:
    """Reads a file that was indexed with some content; never raises for what is wrong with it."""
    with decoders.open(path) as file:
        if file.reason:
            return Opened(file.stamp, reason=file.reason)
        if file.digest != digest:
            changed = "its content is not what was indexed: touch the file, and index again"
            return Opened(file.stamp, reason=changed)
        try:
            return Opened(file.stamp, file.picture(how).pixels)
        except DecodeError as error:
            return Opened(file.stamp, reason=str(error))


def pixels_of(path: bytes, how: Preprocess, decoders: Decoders) -> NDArray[np.uint8] | None:
    """The pixels (height, width, 3) of a file as it is now; None where it cannot be used."""
    with decoders.open(path) as file:
        try:
            return None if file.reason else file.picture(how).pixels
        except DecodeError:
            return None

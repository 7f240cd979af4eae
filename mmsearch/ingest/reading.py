"""From a file on the disk to what is in it, in worker threads and the decoders' processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mmsearch.datasets.sidecar import clean_captions, read_sidecar
from mmsearch.errors import DecodeError
from mmsearch.ingest.plan import Candidate
from mmsearch.media.discover import sidecar_path
from mmsearch.media.fingerprint import Stamp
from mmsearch.media.media_types import Caption, Facts, Part, Segment
from mmsearch.media.sandbox import Decoders
from mmsearch.types import InputSpec, Modality, Pixels

Inputs = Mapping[Modality, InputSpec]
#: What comes of one file, at most.
_MOST_BYTES, _MOST_CAPTIONS = 1 << 28, 100_000


@dataclass(frozen=True)
class Decoded:
    """What is in a file."""

    facts: Facts
    segments: Sequence[Segment]
    captions: Sequence[Caption]

    @classmethod
    def of(cls, parts: Iterable[Part], inputs: Inputs) -> Decoded:
        """Gathers what comes of a file.

        Raises:
            DecodeError: it is too much, or nothing that was asked for.
        """
        facts, segments, captions, size = Facts(), list[Segment](), list[Caption](), 0
        for part in parts:
            if isinstance(part, Segment):
                size += part.data.nbytes
                if part.modality not in inputs:
                    raise DecodeError(f"its decoder gave '{part.modality}', which nobody asked for")
                if size > _MOST_BYTES:
                    raise DecodeError(f"too large: more than {_MOST_BYTES >> 20} MiB of it")
                segments.append(part)
            elif isinstance(part, Caption):
                size += len(part.text)
                captions += [replace(part, text=text) for text in clean_captions([part.text])]
            else:
                facts = part
            if len(captions) > _MOST_CAPTIONS or size > _MOST_BYTES:
                raise DecodeError(f"too large: more than {_MOST_CAPTIONS} captions")
        places = (None, *range(len(segments)))
        if not all(caption.segment in places for caption in captions):
            raise DecodeError("its decoder gave a caption of no part of it")
        return cls(facts, segments, captions)


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
    """The segments of a file that was indexed, or why there are none."""

    stamp: Stamp
    segments: Sequence[Segment] = field(default=())
    reason: str = ""


def open_known(path: bytes, digest: bytes, inputs: Inputs, decoders: Decoders) -> Opened:
    """Reads a file that was indexed with some content; never raises for what is wrong with it."""
    with decoders.open(path) as file:
        if file.reason:
            return Opened(file.stamp, reason=file.reason)
        if file.digest != digest:
            changed = "its content is not what was indexed: touch the file, and index again"
            return Opened(file.stamp, reason=changed)
        try:
            return Opened(file.stamp, Decoded.of(file.read(inputs), inputs).segments)
        except DecodeError as error:
            return Opened(file.stamp, reason=str(error))


def pixels_of(path: bytes, how: InputSpec, decoders: Decoders) -> Pixels | None:
    """The pixels (height, width, 3) of a picture as it is now; None where it cannot be used."""
    with decoders.open(path) as file:
        try:
            return None if file.reason else file.pixels(how)
        except DecodeError:
            return None

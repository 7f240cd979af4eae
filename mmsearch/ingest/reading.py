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
from mmsearch.media.sandbox import Decoders, OpenFile
from mmsearch.store.rows import MediaRecord
from mmsearch.types import InputSpec, Modality

Inputs = Mapping[Modality, InputSpec]
#: What comes of one file, at most.
_MOST_BYTES, _MOST_CAPTIONS = 1 << 28, 100_000


@dataclass(frozen=True)
class Decoded:
    """What was read of a file."""

    stamp: Stamp
    digest: bytes = b""
    facts: Facts = field(default_factory=Facts)
    segments: Sequence[Segment] = ()
    captions: Sequence[Caption] = ()
    """Those that lie in the file."""
    reason: str = ""
    """Why it cannot be used; "" where it can."""
    stored: MediaRecord | None = None
    """What the index has of the same content: then the file was not decoded."""
    sidecar: tuple[str, ...] = ()
    """The captions beside the file."""
    unread_sidecar: bytes = b""
    """The path of a sidecar that is no text."""


def decode(file: OpenFile, inputs: Inputs) -> Decoded:
    """What is in a file; never raises for what is wrong with it."""
    if file.reason:
        return Decoded(file.stamp, reason=file.reason)
    try:
        facts, segments, captions = gather(file.read(inputs), inputs)
    except DecodeError as error:
        return Decoded(file.stamp, reason=str(error))
    facts = replace(facts, kind=file.kind)
    return Decoded(file.stamp, file.digest, facts, segments, captions)


def gather(
    parts: Iterable[Part],
    inputs: Inputs,
    most_bytes: int = _MOST_BYTES,
    most_captions: int = _MOST_CAPTIONS,
) -> tuple[Facts, list[Segment], list[Caption]]:
    """What comes of a file, all of it.

    Raises:
        DecodeError: it is too much, or nothing that was asked for.
    """
    facts, segments, captions, size = Facts(), list[Segment](), list[Caption](), 0
    for part in parts:
        if isinstance(part, Segment):
            size += part.data.nbytes
            if part.modality not in inputs:
                raise DecodeError(f"its decoder gave '{part.modality}', which nobody asked for")
            segments.append(part)
        elif isinstance(part, Caption):
            size += len(part.text)
            captions += [replace(part, text=text) for text in clean_captions([part.text])]
        else:
            facts = part
        if size > most_bytes:
            raise DecodeError(f"too large: more than {most_bytes >> 20} MiB of it")
        if len(captions) > most_captions:
            raise DecodeError(f"too large: more than {most_captions} captions")
    places = (None, *range(len(segments)))
    if not all(caption.segment in places for caption in captions):
        raise DecodeError("its decoder gave a caption of no part of it")
    return facts, segments, captions


def sidecar_of(candidate: Candidate) -> tuple[tuple[str, ...], bytes]:
    """The captions in a file's sidecar; and the sidecar's path where it is no text."""
    if candidate.file.sidecar is None:
        return (), b""
    path = sidecar_path(candidate.absolute)
    try:
        return read_sidecar(path), b""
    except UnicodeDecodeError:
        return (), path


def decode_known(path: bytes, digest: bytes, inputs: Inputs, decoders: Decoders) -> Decoded:
    """The same of a file that was indexed with some content."""
    with decoders.open(path) as file:
        if not file.reason and file.digest != digest:
            changed = "its content is not what was indexed: touch the file, and index again"
            return Decoded(file.stamp, reason=changed)
        return decode(file, inputs)

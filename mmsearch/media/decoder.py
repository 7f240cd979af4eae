"""A process that decodes files for `mmsearch.media.sandbox`: `python -m mmsearch.media.decoder`.

It gets a file as a descriptor, never as a path, and sends what is in it one part at a time: where
it is ahead it waits until its parent has read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mmsearch.errors import DecodeError, in_a_line
from mmsearch.media.fingerprint import content_hash, content_of
from mmsearch.media.media_types import PICTURES, Facts, MediaType, MediaTypes, Part, Segment
from mmsearch.types import InputSpec, Modality

HEADER = struct.Struct(">II")


def send(
    to: socket.socket,
    message: Mapping[str, Any],
    array: bytes = b"",
    descriptor: int | None = None,
) -> None:
    """Sends a message: a header with two lengths, JSON, and an array as it is.

    Args:
        descriptor: an open file that goes with it.
    """
    words = json.dumps(message).encode()
    whole = HEADER.pack(len(words), len(array)) + words
    if descriptor is None:
        to.sendall(whole)
    else:  # it goes with the first byte; the rest of a short message follows at once
        socket.send_fds(to, [whole[:1]], [descriptor])
        to.sendall(whole[1:])
    if array:
        to.sendall(array)


def receive(of: socket.socket, size: int, deadline: float | None = None) -> bytearray:
    """The next `size` bytes.

    Args:
        deadline: of the monotonic clock; None waits for as long as it takes.

    Raises:
        ConnectionError: the other side is gone.
        TimeoutError: it is past the deadline.
    """
    buffer, done = bytearray(size), 0
    while done < size:
        if deadline is not None:
            of.settimeout(max(0.01, deadline - time.monotonic()))
        count = of.recv_into(memoryview(buffer)[done:])
        if not count:
            raise ConnectionError
        done += count
    return buffer


def _serve(to: socket.socket, seconds: float, types: MediaTypes) -> None:
    send(to, {})
    content = b""
    while True:
        message, descriptor = _next(to)
        if message is None:
            return
        # If the parent is gone and cannot stop us: the signal ends the process by itself.
        signal.alarm(int(seconds) + 10)
        if descriptor is not None:
            stamp, content, reason = content_of(descriptor)
            os.close(descriptor)
            digest = b"" if reason else content_hash(content)
            send(to, {"stamp": stamp, "digest": digest.hex(), "reason": reason})
        else:
            try:
                kind = types.types[message["kind"]]
                _send_parts(to, _parts_of(kind, content, message["inputs"]))
            except DecodeError as error:
                send(to, {"reason": str(error)})
            except MemoryError:
                send(to, {"reason": "too large: not enough memory to scale it"})
            content = b""
        signal.alarm(0)


def _parts_of(
    kind: MediaType, content: bytes, inputs: Mapping[Modality, InputSpec]
) -> Iterator[Part]:
    try:
        yield from kind.read(io.BytesIO(content), inputs)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file has a decoder raise
        reason = in_a_line(error, 300)
        raise DecodeError(f"damaged: {reason}"[:300]) from error


def _next(to: socket.socket) -> tuple[dict[str, Any] | None, int | None]:
    """The next message, None where the parent is gone, and the file that came with it."""
    first, descriptors, _, _ = socket.recv_fds(to, 1, 1)
    if not first:
        return None, None
    words, _ = HEADER.unpack(first + receive(to, HEADER.size - 1))
    return json.loads(receive(to, words)), descriptors[0] if descriptors else None


def _send_parts(to: socket.socket, parts: Iterator[Part]) -> None:
    """Sends parts as they come: each segment with the texts and facts before it."""
    waiting: list[dict[str, Any]] = []
    array = b""
    for part in parts:
        if array:  # there is more behind it
            send(to, {"reason": "", "parts": waiting, "is_last": False}, array)
            waiting, array = [], b""
        if isinstance(part, Segment):
            data = np.ascontiguousarray(part.data)
            array = data.tobytes()
            waiting.append(
                {
                    "modality": part.modality, "start_ms": part.start_ms, "end_ms": part.end_ms,
                    "shape": data.shape, "dtype": data.dtype.name,
                }
            )  # fmt: skip
        else:
            values = dict(vars(part))
            if isinstance(part, Facts) and part.captured is not None:
                values["captured"] = part.captured.isoformat()
            waiting.append(values)
    send(to, {"reason": "", "parts": waiting, "is_last": True}, array)


def _limit(memory: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where the system does not say what is taken already (macOS), its own limit has to do.
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", "rb") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))


def _main() -> None:
    number, seconds, memory = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    import warnings

    import mmsearch.media.image  # noqa: F401 - before the limit, which is for files

    sys.path += sys.argv[4].split(os.pathsep)  # of other media types: behind all else
    types = MediaTypes(*sys.argv[5 + len(PICTURES.paths) :])

    warnings.simplefilter("ignore")  # of odd metadata: nobody reads them here
    _limit(memory)
    with socket.socket(fileno=number) as to, contextlib.suppress(ConnectionError):
        _serve(to, seconds, types)


if __name__ == "__main__":
    _main()

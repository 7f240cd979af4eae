"""Reads and decodes files in processes of their own, which can be stopped.

A decoder is a hundred thousand lines of C that a stranger's file goes through. It may crash, hang,
or ask for all memory there is; in a process of its own that costs this one file, and nothing else.
No file costs more than LIMIT_SECONDS and LIMIT_BYTES.

This is the parent's half; `mmsearch.media.decoder` is the child's. They talk over a socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self, TypeVar

import numpy as np

from mmsearch.errors import DecodeError, UnreadableError
from mmsearch.media.decoder import HEADER, receive, send
from mmsearch.media.fingerprint import (
    HASH_BYTES,
    LEAST,
    MOST,
    NEVER,
    Stamp,
    unreadable,
)
from mmsearch.media.media_types import (
    PICTURES,
    Caption,
    Facts,
    MediaTypes,
    Part,
    Segment,
)
from mmsearch.media.source import LocalFiles, MediaSource
from mmsearch.types import IMAGE, InputSpec, Modality, Pixels

#: What one file may take, to be read, decoded and scaled.
LIMIT_SECONDS = 60.0
#: And how much memory, on top of the 40 MB of a process that is idle.
LIMIT_BYTES = 2 << 30
_START_SECONDS = 60.0
_MAX_REPLY = 1 << 28
_PLACE = ("latitude", "longitude")
_DTYPES = {name: name for name in ("uint8", "int16", "int32", "float32")}
Answer = TypeVar("Answer")


#: What comes of a reply that no code of ours has sent.
_NONSENSE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class OpenFile:
    """A file that a process holds in its memory."""

    _process: _Process
    _deadline: float
    stamp: Stamp
    digest: bytes
    """The hash of its content."""
    reason: str
    """Why it cannot be read; "" where it can."""
    _place: int
    kind: str
    """A word for what it is, by its name."""

    def read(self, inputs: Mapping[Modality, InputSpec]) -> Iterator[Part]:
        """What is in the file, one part at a time: it is decoded as they are asked for.

        Args:
            inputs: the modalities that are wanted, and how.

        Raises:
            DecodeError: it is not a file of its kind, is damaged, or takes too much; the message
                says which.
        """
        return self._read(inputs, self._place)

    def pixels(self, how: InputSpec) -> Pixels:
        """A picture, whatever the file is called: shape (height, width, 3).

        Args:
            how: as `mmsearch.media.picture` takes it.

        Raises:
            DecodeError: as `read`.
        """
        parts = [part for part in self._read({IMAGE: how}, 0) if isinstance(part, Segment)]
        pixels = parts[0].data if parts else np.empty(0, np.uint8)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise DecodeError("its decoder gave up")
        return np.asarray(pixels, np.uint8)

    def _read(self, inputs: Mapping[Modality, InputSpec], kind: int) -> Iterator[Part]:
        if self.reason:
            raise DecodeError(self.reason)
        message: dict[str, Any] | None = {"kind": kind, "inputs": inputs}
        is_last = False
        while not is_last:
            self._process.is_midway = True
            try:
                some, is_last = self._process.ask(message, self._deadline, _parts_in)
            except DecodeError:
                self._process.is_midway = False
                raise
            self._process.is_midway = not is_last
            message = None
            yield from some


class Decoders:
    """Processes that decode: as many as are asked at one time, started when they are needed."""

    def __init__(
        self,
        seconds: float = LIMIT_SECONDS,
        memory: int = LIMIT_BYTES,
        *,
        types: MediaTypes = PICTURES,
        source: MediaSource | None = None,
    ) -> None:
        """Takes the limits of a file, which files are media, and where they are read from.

        Args:
            source: None is this machine.
        """
        self._seconds = seconds
        self._memory = memory
        self.types = types
        self._source = source or LocalFiles()
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        weakref.finalize(self, _stop, self._idle)  # where nobody closes them

    def start(self) -> None:
        """Starts a process without waiting for it, so that the next file finds it ready.

        Raises:
            UnreadableError: it cannot be started.
        """
        with self._lock:
            if not self._idle:
                self._idle.append(_Process(self._seconds, self._memory, self.types))

    @contextmanager
    def open(self, path: bytes) -> Iterator[OpenFile]:
        """Reads a file. What is wrong with it is no exception, but its `reason`.

        Raises:
            UnreadableError: a process cannot be started, or all were closed.
        """
        process = self._take()
        try:
            process.wait_until_ready()
            yield self._read(process, path)
        finally:
            self._give(process)

    def pixels_of(
        self, paths: Iterable[bytes], how: InputSpec, workers: int
    ) -> list[Pixels | None]:
        """The pixels of pictures, (height, width, 3) each; None where one cannot be read.

        Args:
            workers: how many are read at once.
        """

        def read(path: bytes) -> Pixels | None:
            with self.open(path) as file, contextlib.suppress(DecodeError):
                return file.pixels(how)
            return None

        with self.threads(workers) as pool:
            return list(pool.map(read, paths))

    def _read(self, process: _Process, path: bytes) -> OpenFile:
        deadline = time.monotonic() + self._seconds
        place = self.types.place_of(path) or 0
        content = self._content_of(process, path, deadline)
        return OpenFile(process, deadline, *content, place, self.types.types[place].kind)

    def _content_of(
        self, process: _Process, path: bytes, deadline: float
    ) -> tuple[Stamp, bytes, str]:
        try:
            descriptor = self._source.open(os.path.abspath(path))
        except OSError as error:
            return NEVER, b"", unreadable(error)
        except ValueError as error:  # no name of a file
            return NEVER, b"", f"cannot be read: {error}"
        try:
            return process.ask({}, deadline, _content_of, descriptor)
        except DecodeError as error:
            return NEVER, b"", f"cannot be read: {error}"
        finally:
            os.close(descriptor)

    def _take(self) -> _Process:
        with self._lock:
            if self._is_closed:
                raise UnreadableError("no process to decode images in: all were closed")
            while self._idle:
                process = self._idle.pop()
                if process.is_running():  # it may have been killed while nobody looked
                    break
                process.stop()
            else:
                process = _Process(self._seconds, self._memory, self.types)
            self._busy.add(process)
            return process

    def _give(self, process: _Process) -> None:
        with self._lock:
            self._busy.discard(process)
            if process.is_alive and not process.is_midway and not self._is_closed:
                self._idle.append(process)
                return
        process.stop()

    @contextmanager
    def threads(self, count: int) -> Iterator[ThreadPoolExecutor]:
        """Threads that read files with these processes.

        On an error, Ctrl-C above all, nobody waits for what is being decoded: those processes end.
        """
        with ThreadPoolExecutor(count, thread_name_prefix="mmsearch-worker") as executor:
            try:
                yield executor
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                was_closed = self._is_closed
                self.close()
                executor.shutdown(wait=True)
                self._is_closed = was_closed
                raise

    def close(self) -> None:
        """Ends the processes, those too that are at work."""
        with self._lock:
            self._is_closed = True
            idle = list(self._idle)
            self._idle.clear()
            for process in self._busy:
                process.kill()  # whoever waits for it hears that it is gone
        _stop(idle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stop(processes: list[_Process]) -> None:
    for process in processes:
        process.stop()


class _Process:
    """One of them, and the parent's end of its socket."""

    def __init__(self, seconds: float, memory: int, types: MediaTypes) -> None:
        own, theirs = socket.socketpair()
        self._socket = own
        self._seconds = seconds
        self._is_ready = False
        self.is_alive = True
        self.is_midway = False
        """Whether there are replies that nobody has read."""
        # -P: what lies in the current folder is no module of ours.
        limits = [str(theirs.fileno()), str(seconds), str(memory)]
        command = [sys.executable, "-P", "-m", "mmsearch.media.decoder", *limits,
                   os.pathsep.join(types.folders()), *types.paths]  # fmt: skip
        paths = [*types.folders()[:1], *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        try:
            self._child = subprocess.Popen(  # noqa: S603 - ourselves
                command,
                pass_fds=(theirs.fileno(),),
                env=environment,
                cwd="/",  # the current folder may be gone
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            own.close()
            raise UnreadableError(f"no process to decode images in: {error.strerror}") from error
        finally:
            theirs.close()

    def wait_until_ready(self) -> None:
        """Returns when it has started.

        Raises:
            UnreadableError: it ended instead.
        """
        if self._is_ready:
            return
        try:
            self._receive(time.monotonic() + _START_SECONDS)
        except (OSError, *_NONSENSE) as error:
            self.stop()
            why = str(error) or self._epitaph()
            raise UnreadableError(f"no process to decode images in: {why}") from error
        self._is_ready = True

    def is_running(self) -> bool:
        return self.is_alive and self._child.poll() is None

    def ask(
        self,
        message: dict[str, Any] | None,
        deadline: float,
        understand: Callable[[dict[str, Any], bytearray], Answer],
        descriptor: int | None = None,
    ) -> Answer:
        """Sends a message and returns what `understand` makes of the reply and its array.

        Args:
            message: None is for the next reply to the last one.
            descriptor: a file that goes with the message.

        Raises:
            DecodeError: the process has that to say of the file; or it took too long, gave up or
                is gone, and then it is gone in any case.
        """
        if not self.is_alive:
            raise DecodeError("its decoder was stopped")
        try:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            if message is not None:
                send(self._socket, message, descriptor=descriptor)
            return understand(*self._receive(deadline))
        except TimeoutError:
            self.stop()
            raise DecodeError(f"takes longer than {self._seconds:.0f} s") from None
        except OSError:
            self.stop()
            raise DecodeError(self._epitaph()) from None
        except DecodeError:
            raise  # what it has to say of a file
        except _NONSENSE:
            self.stop()  # a file may have taken the process over
            raise DecodeError("its decoder gave up") from None
        except BaseException:
            self.stop()  # an interrupt in the midst of a reply: nobody reads the rest
            raise

    def _receive(self, deadline: float) -> tuple[dict[str, Any], bytearray]:
        words, array = HEADER.unpack(receive(self._socket, HEADER.size, deadline))
        if words + array > _MAX_REPLY:
            raise ValueError
        reply: dict[str, Any] = json.loads(receive(self._socket, words, deadline))
        return reply, receive(self._socket, array, deadline)

    def _epitaph(self) -> str:
        code = self._child.returncode
        if code == -signal.SIGKILL:
            return "its decoder was killed, perhaps for want of memory"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"its decoder crashed ({signal.Signals(-code).name})"
        return "its decoder gave up"

    def kill(self) -> None:
        """Ends it at once; whoever asks it has still to `stop` it."""
        self._child.kill()

    def stop(self) -> None:
        if not self.is_alive:
            return
        self.is_alive = False
        self._socket.close()
        # One that has crashed is to end by its own signal, which tells why.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(0.2 if self._child.poll() is None else 0)
        self._child.kill()
        self._child.wait()


def _content_of(reply: dict[str, Any], _: bytearray) -> tuple[Stamp, bytes, str]:
    """What a child says of a file: its stamp, the hash of its content, why it cannot be read."""
    size, mtime_ns = (_integer(value, LEAST, MOST) for value in reply["stamp"])
    digest, reason = bytes.fromhex(reply["digest"]), _words(reply["reason"])
    if len(digest) != (0 if reason else HASH_BYTES):
        raise ValueError
    return Stamp(size, mtime_ns), digest, reason


def _parts_in(reply: dict[str, Any], array: bytearray) -> tuple[list[Part], bool]:
    """The parts that a child sent, and whether they are the last.

    Raises:
        DecodeError: there are no more, and why.
    """
    if reply["reason"]:
        raise DecodeError(_words(reply["reason"]))
    return [_part_of(one, array) for one in reply["parts"]], bool(reply["is_last"])


def _part_of(values: dict[str, Any], array: bytearray) -> Part:
    if "text" in values:
        place, language = _optional(values["segment"]), values["language"]
        return Caption(_text(values["text"]), place, None if language is None else _text(language))
    if "modality" in values:
        shape = [_integer(value, 0, _MAX_REPLY) for value in values["shape"]]
        data = np.frombuffer(array, np.dtype(_DTYPES[values["dtype"]])).reshape(shape)
        span = _optional(values["start_ms"]), _optional(values["end_ms"])
        return Segment(_text(values["modality"]), data, *span)
    captured = values["captured"]
    latitude, longitude = (None if values[name] is None else float(values[name]) for name in _PLACE)
    return Facts(
        _integer(values["width"], 0, MOST),
        _integer(values["height"], 0, MOST),
        datetime.fromisoformat(captured) if captured else None,
        _optional(values["duration_ms"]),
        latitude,
        longitude,
    )


def _words(reason: Any) -> str:
    return str(reason)[:500].encode("utf-8", "replace").decode()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value.encode("utf-8", "replace").decode()


def _optional(value: Any) -> int | None:
    return None if value is None else _integer(value, LEAST, MOST)


def _integer(value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError
    return value

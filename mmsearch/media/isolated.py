"""Reads and decodes files in processes of their own, which can be stopped.

A decoder is a hundred thousand lines of C that a stranger's file goes through. It may crash, hang,
or ask for all memory there is; in a process of its own that costs this one file, and nothing else.
No file costs more than LIMIT_SECONDS and LIMIT_BYTES.

Parent and child talk over a socket: a header with two lengths, JSON, and pixels as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import DecodeError, UnreadableError
from mmsearch.media.fingerprint import (
    HASH_BYTES,
    LEAST,
    MOST,
    NEVER,
    Stamp,
    content_hash,
    content_of,
)
from mmsearch.types import Preprocess

#: What one file may take, to be read, decoded and scaled.
LIMIT_SECONDS = 60.0
#: And how much memory, on top of the 40 MB of a process that is idle.
LIMIT_BYTES = 2 << 30
_HEADER = struct.Struct(">II")
_START_SECONDS = 60.0
_MAX_REPLY = 1 << 28
#: What is sent as it is, without being made to fit a model.
_MOST_PIXELS = 64_000_000


@dataclass(frozen=True)
class Picture:
    """What decoding found: upright sRGB pixels, and what the file says of itself."""

    pixels: NDArray[np.uint8]
    """Shape (height, width, 3)."""
    width: int
    """Of the whole picture, as a viewer shows it."""
    height: int
    captured: datetime | None


Answer = TypeVar("Answer")


#: What comes of a reply that no code of ours has sent.
_NONSENSE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class _Stopped(Exception):
    """The process is gone, and why."""


class OpenFile:
    """A file that a process holds in its memory."""

    def __init__(
        self, process: _Process, deadline: float, stamp: Stamp, digest: bytes, reason: str
    ) -> None:
        self._process = process
        self._deadline = deadline
        self.stamp = stamp
        self.digest = digest
        """The hash of its content."""
        self.reason = reason
        """Why it cannot be read; "" where it can."""

    def picture(self, how: Preprocess) -> Picture:
        """Decodes it and makes it fit a model.

        Raises:
            DecodeError: it is not an image, is damaged, or takes too much; the message says which.
        """
        return self._ask({"how": dataclasses.asdict(how)})

    def upright(self, at_least: int, within: int = 0) -> Picture:
        """Decodes it without fitting it to a model.

        Args:
            at_least: the sides, in pixels, that are needed: what is larger may come reduced.
            within: the most that either side may have; 0 is any.

        Raises:
            DecodeError: as `picture`.
        """
        return self._ask({"at_least": at_least, "within": within})

    def _ask(self, message: dict[str, Any]) -> Picture:
        if self.reason:
            raise DecodeError(self.reason)
        try:
            found = self._process.ask(message, self._deadline, _picture_of)
        except _Stopped as error:
            raise DecodeError(str(error)) from error
        if isinstance(found, str):
            raise DecodeError(found)
        return found


class Decoders:
    """Processes that decode: as many as are asked at one time, started when they are needed."""

    def __init__(self, seconds: float = LIMIT_SECONDS, memory: int = LIMIT_BYTES) -> None:
        self._seconds = seconds
        self._memory = memory
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def start(self) -> None:
        """Starts a process without waiting for it, so that the next file finds it ready.

        Raises:
            UnreadableError: it cannot be started.
        """
        with self._lock:
            if not self._idle:
                self._idle.append(_Process(self._seconds, self._memory))

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

    def _read(self, process: _Process, path: bytes) -> OpenFile:
        deadline = time.monotonic() + self._seconds
        try:
            absolute = path if os.path.isabs(path) else os.path.abspath(path)
            found = process.ask({"path": os.fsdecode(absolute)}, deadline, _content_of)
        except _Stopped as error:
            return OpenFile(process, deadline, NEVER, b"", f"cannot be read: {error}")
        return OpenFile(process, deadline, *found)

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
                process = _Process(self._seconds, self._memory)
            self._busy.add(process)
            return process

    def _give(self, process: _Process) -> None:
        with self._lock:
            self._busy.discard(process)
            if process.is_alive and not self._is_closed:
                self._idle.append(process)
                return
        process.stop()

    @contextmanager
    def threads(self, count: int) -> Iterator[ThreadPoolExecutor]:
        """Threads that read files with these processes.

        On an error, Ctrl-C above all, nobody waits for what is being decoded: those processes end.
        """
        executor = ThreadPoolExecutor(count, thread_name_prefix="mmsearch-worker")
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            was_closed = self._is_closed
            self.close()
            executor.shutdown(wait=True)
            self._is_closed = was_closed
            raise
        executor.shutdown(wait=True)

    def close(self) -> None:
        """Ends the processes, those too that are at work."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for process in self._busy:
                process.kill()  # whoever waits for it hears that it is gone
        for process in idle:
            process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Process:
    """One of them, and the parent's end of its socket."""

    def __init__(self, seconds: float, memory: int) -> None:
        own, theirs = socket.socketpair()
        self._socket = own
        self._seconds = seconds
        self._is_ready = False
        self.is_alive = True
        # -P: what lies in the current folder is no module of ours.
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(seconds),
                   str(memory)]  # fmt: skip
        package = str(Path(__file__).parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
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
        message: dict[str, Any],
        deadline: float,
        understand: Callable[[dict[str, Any], bytearray], Answer],
    ) -> Answer:
        """Sends a message and returns what `understand` makes of the reply and its pixels.

        Raises:
            _Stopped: the process took too long, or is gone; it is gone in any case.
        """
        if not self.is_alive:
            raise _Stopped("its decoder was stopped")
        try:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            _send(self._socket, message)
            return understand(*self._receive(deadline))
        except TimeoutError:
            self.stop()
            raise _Stopped(f"takes longer than {self._seconds:.0f} s") from None
        except OSError:
            self.stop()
            raise _Stopped(self._epitaph()) from None
        except _NONSENSE:
            self.stop()  # a file may have taken the process over
            raise _Stopped("its decoder gave up") from None
        except BaseException:
            self.stop()  # an interrupt in the midst of a reply: nobody reads the rest
            raise

    def _receive(self, deadline: float) -> tuple[dict[str, Any], bytearray]:
        def exactly(size: int) -> bytearray:
            buffer = bytearray(size)
            view, done = memoryview(buffer), 0
            while done < size:
                self._socket.settimeout(max(0.01, deadline - time.monotonic()))
                count = self._socket.recv_into(view[done:])
                if not count:
                    raise ConnectionError
                done += count
            return buffer

        words, pixels = _HEADER.unpack(exactly(_HEADER.size))
        if words + pixels > _MAX_REPLY:
            raise ValueError
        reply: dict[str, Any] = json.loads(exactly(words))
        return reply, exactly(pixels)

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


def _picture_of(reply: dict[str, Any], pixels: bytearray) -> Picture | str:
    """The picture that a child sent, or why there is none."""
    if reply["reason"]:
        return _words(reply["reason"])
    height, width = (_integer(value, 1, _MAX_REPLY) for value in reply["shape"][:2])
    return Picture(
        np.frombuffer(pixels, np.uint8).reshape(height, width, 3),
        _integer(reply["width"], 1, MOST),
        _integer(reply["height"], 1, MOST),
        datetime.fromisoformat(reply["captured"]) if reply["captured"] else None,
    )


def _words(reason: Any) -> str:
    return str(reason)[:500].encode("utf-8", "replace").decode()


def _integer(value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError
    return value


def _send(to: socket.socket, message: dict[str, Any], pixels: bytes = b"") -> None:
    words = json.dumps(message).encode()
    to.sendall(_HEADER.pack(len(words), len(pixels)) + words)
    if pixels:
        to.sendall(pixels)


# -- the child -------------------------------------------------------------------------------------


def _serve(to: socket.socket, seconds: float) -> None:
    receive = to.makefile("rb")
    _send(to, {})
    content = b""
    while header := receive.read(_HEADER.size):
        words, _ = _HEADER.unpack(header)
        message = json.loads(receive.read(words))
        # If the parent is gone and cannot stop us: the signal ends the process by itself.
        signal.alarm(int(seconds) + 10)
        if "path" in message:
            stamp, content, reason = content_of(os.fsencode(message["path"]))
            digest = b"" if reason else content_hash(content)
            _send(to, {"stamp": stamp, "digest": digest.hex(), "reason": reason})
        else:
            try:
                reply, pixels = _decoded(content, message)
            except DecodeError as error:
                _send(to, {"reason": str(error)})
            except MemoryError:
                _send(to, {"reason": "too large: not enough memory to scale it"})
            else:
                _send(to, reply, pixels)
            reply = pixels = None  # type: ignore[assignment] # nothing is kept between files
            content = b""
        signal.alarm(0)


def _decoded(content: bytes, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """A picture as it was asked for: what is said of it, and its pixels."""
    from mmsearch.media.fit import fit
    from mmsearch.media.image import decode

    if "how" in message:
        how = _preprocess(message["how"])
        found = decode(content, at_least=how.size)
        pixels = fit(found.image, how)
    else:
        side, within = message["at_least"], message["within"]
        found = decode(content, at_least=(side, side))
        image = found.image
        while image.width * image.height > _MOST_PIXELS:
            image = image.reduce(2)
        if within:
            image.thumbnail((within, within))
        pixels = np.asarray(image)
    captured = found.captured.isoformat() if found.captured else None
    reply = {"reason": "", "width": found.width, "height": found.height, "captured": captured,
             "shape": pixels.shape}  # fmt: skip
    return reply, pixels.tobytes()


def _preprocess(values: dict[str, Any]) -> Preprocess:
    for name in ("size", "mean", "std"):
        values[name] = tuple(values[name])
    return Preprocess(**values)


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

    warnings.simplefilter("ignore")  # of odd metadata: nobody reads them here
    _limit(memory)
    with socket.socket(fileno=number) as to, contextlib.suppress(ConnectionError):
        _serve(to, seconds)


if __name__ == "__main__":
    _main()

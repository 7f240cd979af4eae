"""Every error that mmsearch raises on purpose.

    MmsearchError
    |-- UsageError            what was asked for makes no sense                     (exit 2)
    |   |-- LabelsError       a file of captions or labels cannot be read
    |   |-- MissingExtra      it needs packages that are not installed
    |   `-- SpaceError        vectors or queries of two different spaces
    |-- NotFoundError                                                               (exit 3)
    |   |-- IndexNotFound     there is no index in that folder
    |   `-- ModelNotFound     no such model, or its weights are missing
    |-- StoreError                                                                  (exit 4)
    |   |-- IndexInUse        another process is writing to the index
    |   |-- FormatError       an index made by an older or newer program
    |   `-- UnreadableError   the index cannot be read or written
    |-- DamageError           the index is there, but damaged                       (exit 5)
    |-- TrainingError         training cannot go on: it diverged, or another run is there  (exit 6)
    |-- DecodeError           one file is not a usable image: data, kept as a failure
    `-- Interrupted           stopped by the user; what was committed is kept       (exit 130)

The exit codes are the command line's; every message is one line that says what is wrong and
what to do about it.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self


class MmsearchError(Exception):
    """The root: catching it catches everything that mmsearch raises on purpose."""

    exit_code = 1


class UsageError(MmsearchError):
    """What was asked for makes no sense."""

    exit_code = 2


class LabelsError(UsageError):
    """A file of captions or labels cannot be read."""


class SpaceError(UsageError):
    """Vectors or queries of two different spaces."""


class NotFoundError(MmsearchError):
    """Something named by the caller does not exist."""

    exit_code = 3


class IndexNotFound(NotFoundError):
    """There is no index in that folder."""


class ModelNotFound(NotFoundError):
    """There is no such model, or its weights are missing."""


class StoreError(MmsearchError):
    """The index cannot be used as it is."""

    exit_code = 4


class IndexInUse(StoreError):
    """Another process is writing to the index."""


class FormatError(StoreError):
    """The index was made by a program with another format version, or is none.

    `is_ours` says that mmsearch made it.
    """

    def __init__(self, message: str, *, is_ours: bool = False) -> None:
        super().__init__(message)
        self.is_ours = is_ours


class UnreadableError(StoreError):
    """The index cannot be read or written (permissions, a full disk)."""


class DamageError(MmsearchError):
    """The index is there, but damaged.

    `reason` says what is damaged, without where that is and what to do about it.
    """

    exit_code = 5

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message

    @classmethod
    def of_catalog(cls, reason: str, path: Path | None = None) -> Self:
        """Damage to an index's catalog; `path` where it is known."""
        where = f"{path}: " if path is not None else ""
        message = f"{where}the catalog is damaged: {reason}; run 'mmsearch repair'"
        return cls(message, reason=reason)


class TrainingError(MmsearchError):
    """Training cannot go on; the last good checkpoint is kept."""

    exit_code = 6


class DecodeError(MmsearchError):
    """One file is not a usable image; its message is the reason that is kept."""


class Interrupted(MmsearchError):
    """Stopped by the user; everything committed is kept."""

    exit_code = 130


class MissingExtra(UsageError):
    """Packages of an extra are not installed."""


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Around an import that only an extra brings: says how to install it where it is missing.

    Args:
        name: the extra, as pyproject.toml has it.
        what: what it is for, as the beginning of a sentence.

    Raises:
        MissingExtra: a module was not found.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mmsearch"):  # a mistake of ours
            raise
        raise MissingExtra(
            f"{what} needs packages that are not installed (no {error.name}; the extra '{name}'): "
            f"{_how_to_install(name)}"
        ) from error


def _how_to_install(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = [line.partition(";") for line in requires("mmsearch") or ()]
    except PackageNotFoundError:
        lines = []
    packages = [package.strip() for package, _, when in lines if name in re.split("['\"]", when)]
    # A checkout whose installation is older than its extras does not know them yet.
    wanted = " ".join(map(shlex.quote, packages)) or f"-e '.[{name}]' (in the checkout)"
    return f"{shlex.quote(sys.executable)} -m pip install {wanted}"


def in_a_line(error: BaseException, length: int = 200) -> str:
    """What an error says, in one line.

    Args:
        length: how many characters of its beginning; of its end, where that is negative.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:length] if length > 0 else text[length:]

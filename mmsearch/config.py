"""Settings, read once: defaults < config file < environment < what the caller says."""

from __future__ import annotations

import math
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs

from mmsearch.errors import UsageError

#: The file that marks a folder as an index's home.
MARKER = "mmsearch-index.json"

_CGROUPS = Path("/sys/fs/cgroup")

_COUNTS = ("workers", "streams")
PRECISIONS = ("auto", "fp32", "bf16", "int8")


def available_cores() -> int:
    """The processors that this process may use: by its affinity and its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, *_quotas()))


def _quotas() -> list[int]:
    """Whole processors' worth of the quotas of this process's control groups (Linux)."""
    found = [sys.maxsize]
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        own = _CGROUPS / controllers / path.strip("/")
        # In a container the group's own path is often not to be seen; its root stands for it then.
        for folder in (own, *own.parents):
            for quota, period in (("cpu.max", ""), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
                with suppress(OSError, ValueError):
                    words = (folder / quota).read_text(encoding="utf-8").split()
                    words += (folder / period).read_text(encoding="utf-8").split() if period else []
                    if (most := int(words[0])) > 0:
                        found.append(math.ceil(most / int(words[1])))
    return found


@dataclass(frozen=True)
class Settings:
    """What a run of mmsearch is set to.

    Each field can stand in the config file under its name, or in the environment as
    `MMSEARCH_` and its name in capitals.
    """

    index: Path | None = None
    """The index to use; None: `./index` where that is mmsearch's own, else the data folder."""
    model: str = "auto"
    """The model of a new index."""
    device: str = "auto"
    """"auto", "cpu" (OpenVINO) or a torch device such as "cuda"."""
    precision: str = "auto"
    language: str = ""
    """That of texts, for models that take one (NLLB's): FLORES-200's code, as deu_Latn."""
    workers: int = field(default_factory=available_cores)
    """Threads that read and decode files."""
    streams: int = 1
    """Threads that search at once, as in a server. With 1, one query has all the cores."""
    cache: Path | None = None
    """Converted models; safe to delete. None: the user's cache folder."""
    home: Path | None = None
    """Holds the index where no other is named. None: the user's data folder."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is one of {', '.join(PRECISIONS)}, not '{self.precision}'")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is a whole number from 1, not {getattr(self, name)}")

    def index_folder(self) -> Path:
        """The folder of the index: as set, else `./index` if it is ours, else the user's own."""
        if self.index is not None:
            return self.index
        here = Path("index")
        return here if (here / MARKER).is_file() else self.home_folder() / "index"

    def cache_folder(self) -> Path:
        """Where converted models lie.

        Raises:
            UsageError: it is not set, and the user has no home folder.
        """
        return self.cache or _folder(platformdirs.user_cache_path, "MMSEARCH_CACHE")

    def home_folder(self) -> Path:
        """Where trained models lie, and the index where no other is named.

        Raises:
            UsageError: it is not set, and the user has no home folder.
        """
        return self.home or _folder(platformdirs.user_data_path, "MMSEARCH_HOME")


def _folder(of_user: Callable[[str], Path], variable: str) -> Path:
    try:
        return of_user("mmsearch")
    except (RuntimeError, KeyError) as error:  # neither HOME nor an entry in /etc/passwd
        raise UsageError(
            f"this user has no home folder: set {variable} to a folder that can be written"
        ) from error


def config_file() -> Path | None:
    """Where the config file is looked for; `MMSEARCH_CONFIG` names another. None: nowhere."""
    if named := os.environ.get("MMSEARCH_CONFIG"):
        return Path(named)
    try:
        return platformdirs.user_config_path("mmsearch") / "config.toml"
    except (RuntimeError, KeyError):  # see _folder
        return None


def load_settings(**flags: Any) -> Settings:
    """The settings of this process; flags that are None say nothing.

    Raises:
        UsageError: a value that does not fit, or a config file that cannot be read.
    """
    names = [item.name for item in fields(Settings)]
    values: dict[str, Any] = _from_file(config_file(), names)
    told = {name: os.environ.get(f"MMSEARCH_{name.upper()}") for name in names}
    values |= {name: value for name, value in told.items() if value}
    values |= {name: value for name, value in flags.items() if value is not None}
    return Settings(**{name: _typed(name, value) for name, value in values.items()})


def _from_file(path: Path | None, known: Sequence[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: the config file cannot be read: {error}") from error
    if unknown := sorted(set(values) - set(known)):
        raise UsageError(
            f"{path}: unknown setting '{unknown[0]}'; the settings are {', '.join(sorted(known))}"
        )
    return values


def _typed(name: str, value: Any) -> Any:
    if name in _COUNTS:
        try:
            return int(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{name} is a whole number from 1, not '{value}'") from error
    if not isinstance(value, str | Path):
        raise UsageError(f"{name} is a text, not {value!r}")
    if name in ("index", "cache", "home"):
        return Path(os.path.expanduser(value))
    return str(value)

"""Networks that were learned for a space, in files beside an index or beside a bundled model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmsearch.encoders.registry import BUNDLED
from mmsearch.errors import UsageError
from mmsearch.store.files import write_durably

Arrays = Mapping[str, NDArray[np.floating]]
T = TypeVar("T")
Build = Callable[[Arrays, Mapping[str, str]], T]


def write_learned(path: Path, weights: Arrays, remarks: Mapping[str, str]) -> None:
    """Keeps weights in half precision, with remarks in the header: "version" and "space" at least.

    After a crash the file has the old content or the new.
    """
    half = {name: np.ascontiguousarray(value, np.float16) for name, value in weights.items()}
    write_durably(path, save(half, metadata=dict(remarks)))


def read_learned(
    folder: Path, name: str, space: str, version: str, build: Build[T], command: str
) -> T | None:
    """What was learned for a space: in the index's folder, else what comes with a bundled model.

    Args:
        build: makes it of the weights and of the remarks; ValueError where they do not fit.
        command: what learns it anew.

    Raises:
        UsageError: the file is damaged, or of another program.
    """
    for path in (folder / name, BUNDLED / "tiny-learned" / name):
        try:
            facts = path.stat()
            found = _read(path, facts.st_mtime_ns, facts.st_size, space, version, build)
        except FileNotFoundError:
            continue
        # What safetensors raises depends on what is wrong with the file.
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path}: cannot be used ({error}); delete it, or learn it anew with '{command}'"
            ) from error
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


@functools.lru_cache(maxsize=8)
def _read(path, mtime_ns, size, space, version, build):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, ARG001
    """One read for as long as the file stays as it is."""
    with safe_open(path, "np") as file:
        remarks = file.metadata() or {}
        if "space" in remarks and remarks["space"] != space:
            return None
        if remarks.get("version") != version:
            raise ValueError("not a version that this program understands")
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if any(value.dtype.kind != "f" for value in weights.values()):
        raise ValueError("holds something else than real numbers")
    if not all(np.isfinite(value).all() for value in weights.values()):
        raise ValueError("holds values that are no finite numbers")
    return build({key: value.astype(np.float32) for key, value in weights.items()}, remarks)

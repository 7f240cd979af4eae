"""Networks that were trained for a space, in files beside an index or beside a bundled model.

A file is safetensors: `graph` and `weights` hold the network as OpenVINO keeps it, the others are
arrays in half precision. The header has "version", "space", "checksum" and what the network needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmsearch.encoders.registry import BUNDLED
from mmsearch.errors import UsageError, in_a_line
from mmsearch.store.checksum import of_parts
from mmsearch.store.files import write_durably

T = TypeVar("T")
_VERSION = "2"


@dataclass(frozen=True)
class Network:
    """A trained network as OpenVINO keeps it (`mmsearch.training.trained` makes it)."""

    graph: bytes
    weights: bytes


Build = Callable[[Network, Mapping[str, NDArray[np.float32]], Mapping[str, str]], T]


def write_trained(
    path: Path,
    network: Network,
    space: str,
    metadata: Mapping[str, str],
    arrays: Mapping[str, NDArray[np.floating]],
) -> None:
    """Keeps a network, what it needs, and arrays in half precision.

    After a crash the file has the old content or the new.
    """
    parts = {"graph": network.graph, "weights": network.weights}
    tensors = {name: np.frombuffer(content, np.uint8) for name, content in parts.items()}
    tensors |= {name: np.ascontiguousarray(value, np.float16) for name, value in arrays.items()}
    header = {**metadata, "version": _VERSION, "space": space, "checksum": _checksum(tensors)}
    write_durably(path, save(tensors, metadata=header))


def read_trained(folder: Path, name: str, space: str, build: Build[T], command: str) -> T | None:
    """What was trained for a space: in the index's folder, else what comes with a bundled model.

    Args:
        build: makes it of the network, the arrays and the header; ValueError where they do not fit.
        command: what trains it again.

    Raises:
        UsageError: the file is damaged, or of another program.
    """
    for path in (folder / name, BUNDLED / "tiny-trained" / name):
        try:
            facts = path.stat()
            found = _read(path, facts.st_mtime_ns, facts.st_size, space, build)
        except FileNotFoundError:
            continue
        # What safetensors raises depends on what is wrong with the file.
        except (  # and a RuntimeError is OpenVINO's, of a graph that it cannot run
            OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
        ) as error:  # fmt: skip
            reason = in_a_line(error)
            raise UsageError(
                f"{path}: cannot be used ({reason}); delete it, or train it again with '{command}'"
            ) from error
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


@functools.lru_cache(maxsize=8)
def _read(path, mtime_ns, size, space, build):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, ARG001
    """One read for as long as the file stays as it is."""
    with safe_open(path, "np") as file:
        metadata = file.metadata() or {}
        if "space" in metadata and metadata["space"] != space:
            return None
        if metadata.get("version") != _VERSION:
            raise ValueError("not a version that this program understands")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if metadata["checksum"] != _checksum(tensors):  # by accident: OpenVINO trusts what it reads
        raise ValueError("not what was written")
    network = Network(tensors.pop("graph").tobytes(), tensors.pop("weights").tobytes())
    arrays = {key: value.astype(np.float32) for key, value in tensors.items()}
    return build(network, arrays, metadata)


def _checksum(tensors: Mapping[str, NDArray[np.generic]]) -> str:
    return of_parts(*(tensors[name].tobytes() for name in sorted(tensors))).hex()

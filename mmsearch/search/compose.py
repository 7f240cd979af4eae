"""Early fusion of a query: "this picture, but ..." as one vector, by a network that was learned.

It runs in NumPy: a few small matrices, for which torch need not be imported. The network is
`mmsearch.networks.early_fusion`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmsearch.errors import UsageError
from mmsearch.store.files import write_durably
from mmsearch.types import Vectors

FILE_NAME = "compose.safetensors"
NOT_LEARNED = (
    "nothing was learned to compose a picture and a text with for this index's model; "
    "'mmsearch train compose' learns it"
)
_VERSION = "1"
_FAR = 30.0  # a gate is open or shut long before
_LEAST = 1e-6
_LAYERS = ("image", "text", "joint", "gate", "residual")

Arrays = Mapping[str, NDArray[np.floating]]


class Composer:
    """What `EarlyFusion` computes, without torch."""

    def __init__(self, weights: Arrays, *, is_for_photos: bool = False) -> None:
        """Takes the network's weights by their names in torch.

        Args:
            is_for_photos: whether photos have shown that it finds no less than the plain ways.

        Raises:
            ValueError: not that network's.
        """
        if any(value.dtype.kind != "f" for value in weights.values()):
            raise ValueError("holds something else than real numbers")
        self._layers = {
            name: (
                weights[f"{name}.weight"].astype(np.float32),
                weights[f"{name}.bias"].astype(np.float32),
            )
            for name in _LAYERS
        }
        hidden, dim = self._layers["image"][0].shape
        shapes = {"image": (hidden, dim), "text": (hidden, dim), "joint": (hidden, 2 * hidden),
                  "gate": (1, hidden), "residual": (dim, hidden)}  # fmt: skip
        for name, (matrix, bias) in self._layers.items():
            if matrix.shape != shapes[name] or bias.shape != shapes[name][:1]:
                raise ValueError(f"{name} has the shape {matrix.shape}, not {shapes[name]}")
            if not (np.isfinite(matrix).all() and np.isfinite(bias).all()):
                raise ValueError(f"{name} holds values that are no finite numbers")
        self.dim = dim
        self.is_for_photos = is_for_photos

    def __call__(self, image: Vectors, text: Vectors) -> Vectors:
        """Unit vectors of images and of texts, (n, dim) each, to those of what is meant.

        Where nothing is left, as with two that are opposite, the row is zero.
        """
        parts = np.concatenate([self._linear("image", image), self._linear("text", text)], axis=1)
        joint = np.maximum(self._linear("joint", np.maximum(parts, 0)), 0)
        openness = np.clip(self._linear("gate", joint), -_FAR, _FAR)
        gate = (1 / (1 + np.exp(-openness))).astype(np.float32)
        return _unit((1 - gate) * image + gate * text + self._linear("residual", joint))

    def _linear(self, name: str, rows: Vectors) -> Vectors:
        matrix, bias = self._layers[name]
        found: Vectors = rows @ matrix.T + bias
        return found


def late(image: Vectors, text: Vectors) -> Vectors:
    """The plain way: the unit vectors of the sums, (n, dim)."""
    return _unit(image + text)


def _unit(rows: NDArray[np.floating]) -> Vectors:
    found: Vectors = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _LEAST)
    return found


def write_composer(folder: Path, weights: Arrays, space: str, *, is_for_photos: bool) -> None:
    """Keeps a network beside an index, in half precision."""
    half = {name: np.ascontiguousarray(value, np.float16) for name, value in weights.items()}
    remarks = {"version": _VERSION, "space": space, "photos": "yes" if is_for_photos else "no"}
    write_durably(folder / FILE_NAME, save(half, metadata=remarks))


def read_composer(folder: Path, space: str, dim: int) -> Composer | None:
    """The network in a folder, if there is one for that space, whose vectors are `dim` wide.

    Raises:
        UsageError: the file is damaged.
    """
    path = folder / FILE_NAME
    try:
        facts = path.stat()
        return _read(path, facts.st_mtime_ns, facts.st_size, space, dim)
    except FileNotFoundError:
        return None
    # What safetensors raises depends on what is wrong with the file.
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: cannot be used ({error}); delete it, or learn it anew with "
            "'mmsearch train compose'"
        ) from error


@functools.lru_cache(maxsize=4)
def _read(path: Path, mtime_ns: int, size: int, space: str, dim: int) -> Composer | None:  # noqa: ARG001
    """One read for as long as the file stays as it is."""
    with safe_open(path, "np") as file:
        remarks = file.metadata() or {}
        if "space" in remarks and remarks["space"] != space:
            return None
        if remarks.get("version") != _VERSION:
            raise ValueError("not a version that this program understands")
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = Composer(weights, is_for_photos=remarks.get("photos") == "yes")
    if found.dim != dim:
        raise ValueError(f"it takes vectors of {found.dim} dimensions, not {dim}")
    return found

"""Early fusion of a query: "this picture, but ..." as one vector, by a network that was learned.

It runs in NumPy: a few small matrices, for which torch need not be imported. The network is
`mmsearch.networks.early_fusion`.
"""

from __future__ import annotations

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
_LAYERS = ("image", "text", "joint", "gate", "residual")

Arrays = Mapping[str, NDArray[np.floating]]


class Composer:
    """What `EarlyFusion` computes, without torch."""

    def __init__(self, weights: Arrays) -> None:
        """Takes the network's weights by their names in torch.

        Raises:
            ValueError: not that network's.
        """
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

    def __call__(self, image: Vectors, text: Vectors) -> Vectors:
        """Unit vectors of images and of texts, (n, dim) each, to those of what is meant."""
        parts = np.concatenate([self._linear("image", image), self._linear("text", text)], axis=1)
        joint = np.maximum(self._linear("joint", np.maximum(parts, 0)), 0)
        gate = 1 / (1 + np.exp(-self._linear("gate", joint)))
        found = (1 - gate) * image + gate * text + self._linear("residual", joint)
        unit: Vectors = found / np.linalg.norm(found, axis=1, keepdims=True)
        return unit

    def _linear(self, name: str, rows: Vectors) -> Vectors:
        matrix, bias = self._layers[name]
        found: Vectors = rows @ matrix.T + bias
        return found


def late(image: Vectors, text: Vectors) -> Vectors:
    """The plain way: the unit vectors of the sums, (n, dim)."""
    found = image + text
    unit: Vectors = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def write_composer(folder: Path, weights: Arrays, space: str) -> None:
    """Keeps a network beside an index or a model, in half precision."""
    half = {name: np.ascontiguousarray(value, np.float16) for name, value in weights.items()}
    remarks = {"version": _VERSION, "space": space}
    write_durably(folder / FILE_NAME, save(half, metadata=remarks))


def read_composer(folder: Path, space: str, dim: int) -> Composer | None:
    """The network in a folder, if there is one for that space, whose vectors are `dim` wide.

    Raises:
        UsageError: the file is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            remarks = file.metadata() or {}
            if remarks.get("version") != _VERSION:
                raise ValueError("not a version that this program understands")
            if remarks.get("space") != space:
                return None
            found = Composer({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        if found.dim != dim:
            raise ValueError(f"it takes vectors of {found.dim} dimensions, not {dim}")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UsageError(
            f"{path}: cannot be used ({error}); delete it, or learn it anew with "
            "'mmsearch train compose'"
        ) from error
    return found

"""Early fusion of a query: "this picture, but ..." as one vector, by a network that was learned.

It runs in NumPy: a few small matrices, for which torch need not be imported. The network is
`mmsearch.networks.early_fusion`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.search.learned import Arrays, read_learned, write_learned
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


class Composer:
    """What `EarlyFusion` computes, without torch."""

    def __init__(self, weights: Arrays, *, is_for_photos: bool = False) -> None:
        """Takes the network's weights by their names in torch.

        Args:
            is_for_photos: whether photos have shown that it finds no less than the plain ways.

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
        # By this thread alone: BLAS would wake threads that take the cores from the runtime's.
        found: Vectors = np.vecdot(rows[:, None], matrix) + bias
        return found


def late(image: Vectors, text: Vectors) -> Vectors:
    """The plain way: the unit vectors of the sums, (n, dim)."""
    return _unit(image + text)


def _unit(rows: NDArray[np.floating]) -> Vectors:
    found: Vectors = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _LEAST)
    return found


def write_composer(folder: Path, weights: Arrays, space: str, *, is_for_photos: bool) -> None:
    """Keeps a network beside an index, in half precision."""
    photos = "yes" if is_for_photos else "no"
    remarks = {"version": _VERSION, "space": space, "photos": photos}
    write_learned(folder / FILE_NAME, weights, remarks)


def read_composer(folder: Path, space: str, dim: int) -> Composer | None:
    """The network for a space, whose vectors are `dim` wide, in a folder or with a bundled model.

    Raises:
        UsageError: the file is damaged, or of a newer program.
    """
    found = read_learned(folder, FILE_NAME, space, _VERSION, _build, "mmsearch train compose")
    if found is not None and found.dim != dim:
        raise UsageError(
            f"{folder / FILE_NAME}: it takes vectors of {found.dim} dimensions, not {dim}; delete "
            "it, or learn it anew with 'mmsearch train compose'"
        )
    return found


def _build(weights: Arrays, remarks: Mapping[str, str]) -> Composer:
    return Composer(weights, is_for_photos=remarks.get("photos") == "yes")

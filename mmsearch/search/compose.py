"""Early fusion of a query: "this picture, but ..." as one vector, by a trained network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError, in_a_line
from mmsearch.search.trained import Network, read_trained, write_trained
from mmsearch.types import Vectors

if TYPE_CHECKING:
    from mmsearch.encoders.openvino import Graph

FILE_NAME = "compose.safetensors"
NOT_TRAINED = (
    "early fusion was not trained for this index's model; 'mmsearch train compose' trains it"
)
_LEAST = 1e-6


class Composer:
    """A trained `mmsearch.networks.fusion.EarlyFusion`."""

    def __init__(self, network: Network, dim: int, *, is_for_photos: bool = False) -> None:
        """Takes an exported network over vectors that are `dim` wide.

        Args:
            is_for_photos: whether photos have shown that it finds no less than the plain ways.
        """
        self._network = network
        self.dim = dim
        self.is_for_photos = is_for_photos

    def __call__(self, image: Vectors, text: Vectors) -> Vectors:
        """Unit vectors of images and of texts, (n, dim) each, to those of what is meant.

        Where nothing is left, as with two that are opposite, the row is zero.
        """
        return self._graph(image, text)[0]

    @cached_property
    def _graph(self) -> Graph:
        """Compiled when it is first used, which takes a while."""
        from mmsearch.encoders.openvino import Graph

        try:
            return Graph.of_network(self._network.graph, self._network.weights)
        except RuntimeError as error:
            reason = in_a_line(error, -200)
            raise UsageError(
                f"the network for --compose early cannot be run here ({reason}); train it again "
                "with 'mmsearch train compose'"
            ) from error


def weighted_sum(image: Vectors, text: Vectors) -> Vectors:
    """The plain way: the unit vectors of the sums, (n, dim)."""
    rows = image + text
    found: Vectors = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _LEAST)
    return found


def write_composer(
    folder: Path, network: Network, dim: int, space: str, *, is_for_photos: bool
) -> None:
    """Keeps a network beside an index, in half precision."""
    metadata = {"dim": str(dim), "photos": "yes" if is_for_photos else "no"}
    write_trained(folder / FILE_NAME, network, space, metadata, {})


def read_composer(folder: Path, space: str, dim: int) -> Composer | None:
    """The network for a space, whose vectors are `dim` wide, in a folder or with a bundled model.

    Raises:
        UsageError: the file is damaged, or of another program.
    """
    found = read_trained(folder, FILE_NAME, space, _build, "mmsearch train compose")
    if found is not None and found.dim != dim:
        raise UsageError(
            f"{folder / FILE_NAME}: it takes vectors of {found.dim} dimensions, not {dim}; delete "
            "it, or train it again with 'mmsearch train compose'"
        )
    return found


def _build(
    network: Network, _arrays: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str]
) -> Composer:
    return Composer(network, int(metadata["dim"]), is_for_photos=metadata["photos"] == "yes")

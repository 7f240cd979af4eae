"""A picture's patches and a text's tokens in a model's space, for re-ranking.

They come from another view of the picture (test-time augmentation): larger, where the image tower
takes any size, and mirrored. That view has a vector too; the mean of it and of the first finds
more than either. Like a whole model, these towers are converted once and then run without torch;
they lie in a folder `patches` beside the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mmsearch.encoders.openvino import (
    NOT_QUANTISED,
    Graph,
    OpenVinoEncoder,
    Towers,
    read_manifest,
)
from mmsearch.encoders.tokenizer import lengths_of
from mmsearch.types import Pixels, Preprocess, Vectors

#: Bumped when converted patch towers of an older program cannot be used any more.
PATCH_VERSION = 1
#: Where the patch towers of a converted model lie, in its folder.
PATCHES = "patches"


@dataclass(frozen=True)
class PatchEmbeddings:
    """What n pictures are made of."""

    vectors: Vectors
    """(n, dim), of length 1."""
    patches: NDArray[np.float32]
    """(n, p, dim), each patch of length 1."""


@dataclass(frozen=True)
class Tokens:
    """What n texts are made of."""

    rows: NDArray[np.float32]
    """(n, l, dim), each token of length 1."""
    there: NDArray[np.bool_]
    """(n, l); False where a row is padding."""


class PatchEncoder(Towers):
    """Runs the converted patch towers of a model."""

    def __init__(self, model: OpenVinoEncoder) -> None:
        """Takes the model whose patch towers were converted by `export_patch_towers`."""
        self._model = model
        self._folder = model.folder / PATCHES
        self.spec = model.spec
        manifest = read_manifest(self._folder)
        self._cuts_texts = bool(manifest.get("cuts_texts"))
        size = tuple(manifest["size"])
        self.preprocess: Preprocess = replace(model.spec.preprocess, size=size)
        """How a picture is prepared for it."""
        super().__init__(f"re-ranking with '{model.spec.model}'")

    def compile(self, tower: str) -> Graph:
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "CACHE_DIR": str(self._folder / "compiled"),
            **NOT_QUANTISED,
        }
        return Graph(self._folder / f"{tower}.xml", options, threads=1)

    def encode(self, pixels: Pixels) -> PatchEmbeddings:
        """The patches of pictures, (n, height, width, 3), as `preprocess` has them."""
        vectors, patches = self.run("patches", pixels)
        return PatchEmbeddings(vectors, patches)

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """The tokens of texts, as far as the longest of them goes."""
        ids = self._model.tokenize(texts)
        lengths = lengths_of(ids)
        there = np.arange(ids.shape[1]) < lengths[:, None]
        longest = max(1, int(lengths.max(initial=1)))
        given = ids[:, :longest] if self._cuts_texts else ids
        (rows,) = self.run("tokens", given, *self._model.embeddings(given))
        return Tokens(rows[:, :longest], there[:, :longest])

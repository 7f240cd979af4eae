"""What every encoder offers, whichever runtime is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

from mmsearch.errors import UsageError
from mmsearch.types import EncoderSpec, Modality, Pixels, Vectors


class Encoder(Protocol):
    """Embeds pictures and texts into one space. Safe to call from several threads."""

    @property
    def spec(self) -> EncoderSpec: ...

    @property
    def precision(self) -> str:
        """What the runtime computes in: fp32, bf16 or int8."""
        ...

    @property
    def batch(self) -> int:
        """How many pictures it encodes best at a time."""
        ...

    def bulk(self, callers: int) -> Self:
        """The same encoder for so many threads that encode at once, each on its share of the cores.

        It is for a corpus: a single query takes longer with it.
        """
        ...

    def warm_up(self, modality: Modality, *, wait: bool = True) -> None:
        """Gets ready to encode images or captions, so that the first batch takes no longer.

        Args:
            wait: return when it is done; else at once, while another thread is at it.
        """
        ...

    def encode_images(self, pixels: Pixels) -> Vectors:
        """Pixels of shape (n, height, width, 3) to unit vectors of shape (n, dim).

        Raises:
            UsageError: this precision, or the model, gives no numbers here.
        """
        ...

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        """Texts to unit vectors of shape (n, dim); a long text is cut as open_clip cuts it.

        Raises:
            UsageError: as `encode_images`.
        """
        ...


def usable(vectors: Vectors, model: str, precision: str) -> Vectors:
    """The vectors of a model, if they are numbers.

    Raises:
        UsageError: some are not.
    """
    if np.isfinite(vectors).all():
        return vectors
    remedy = "its weights are damaged" if precision == "fp32" else "use '--precision fp32'"
    raise UsageError(f"'{model}' in {precision} gives no usable vectors on this machine: {remedy}")

"""What every encoder offers, whichever runtime is behind it."""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np

from mmsearch.errors import UsageError
from mmsearch.types import Batch, EncoderSpec, Modality, Vectors


class Encoder(Protocol):
    """Embeds what `spec.inputs` names into one space. Safe to call from several threads."""

    @property
    def spec(self) -> EncoderSpec: ...

    @property
    def precision(self) -> str:
        """What the runtime computes in: fp32, bf16 or int8."""
        ...

    @property
    def batch(self) -> int:
        """How many things it encodes best at a time; texts it takes 64 at a time as well."""
        ...

    def with_streams(self, count: int) -> Self:
        """The same encoder for so many threads that encode at once, each on its share of the cores.

        All of them together get more done; one that is alone takes longer.
        """
        ...

    def with_language(self, code: str) -> Self:
        """The same encoder for texts in a language; itself where the model takes none.

        Args:
            code: FLORES-200's, as "deu_Latn".

        Raises:
            UsageError: the model takes a language, and does not know this one.
        """
        ...

    def warm_up(self, modality: Modality, *, wait: bool = True) -> None:
        """Gets ready to encode a modality, so that the first batch takes no longer.

        Args:
            wait: return when it is done; else at once, while another thread is at it.
        """
        ...

    def encode(self, modality: Modality, batch: Batch) -> Vectors:
        """What a batch holds to unit vectors of shape (n, dim).

        Args:
            modality: one of `spec.inputs`.
            batch: for "text" strings, of which long ones are cut as open_clip cuts them; for others
                arrays as `spec.inputs` has them, for "image" of shape (height, width, 3), uint8.

        Raises:
            UsageError: this precision, or the model, gives no numbers here.
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

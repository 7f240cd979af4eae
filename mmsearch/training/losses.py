"""The contrastive loss of a run, from open_clip's own pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss

LossKind = Literal["clip", "siglip"]

#: The largest 1/T: CLIP's own bound, without which the temperature runs away.
MAX_SCALE = 100.0
#: Where open_clip starts a SigLIP model.
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of a batch, row i of one belonging to row i of the other, (n, dim) each."""

    image: torch.Tensor
    text: torch.Tensor


@dataclass(frozen=True)
class Teacher:
    """How a teacher's similarities are followed: Hinton et al. 2015, on CLIP's logits."""

    weight: float
    scale: float = MAX_SCALE
    """1/T of the softmax over the teacher's cosines."""


class ContrastiveLoss:
    """The loss of a global batch that is spread over `world` processes.

    "clip" is the symmetric InfoNCE of Radford et al. 2021; "siglip" the pairwise sigmoid loss
    of Zhai et al. 2023. With a teacher (for "clip" only) its distillation loss is added.
    Each process gets the loss of its own rows against everybody's: the mean over processes is
    the loss of the global batch, and so is the mean of their gradients.
    """

    def __init__(
        self, kind: LossKind = "clip", teacher: Teacher | None = None, rank: int = 0, world: int = 1
    ) -> None:
        self._kind = kind
        self._teacher = teacher
        where = {"rank": rank, "world_size": world}
        spread = {"local_loss": world > 1, "gather_with_grad": world > 1, **where}
        self._loss: Callable[..., torch.Tensor] = (
            SigLipLoss(**where) if kind == "siglip" else ClipLoss(**spread)
        )
        self._distil: Callable[..., tuple[torch.Tensor, ...]] = DistillClipLoss(**spread)

    def __call__(
        self, own: Embeddings, network: Any, teacher: Embeddings | None = None
    ) -> torch.Tensor:
        """The loss of a batch; `network` brings `logit_scale` (and "siglip" `logit_bias`)."""
        scale = network.logit_scale.exp()
        if self._kind == "siglip":
            return self._loss(own.image, own.text, scale, network.logit_bias)
        if self._teacher is None or teacher is None:
            return self._loss(own.image, own.text, scale)
        taught = torch.tensor(self._teacher.scale, device=scale.device, dtype=scale.dtype)
        contrast, follow = self._distil(
            own.image, own.text, scale, teacher.image, teacher.text, taught
        )
        return contrast + self._teacher.weight * follow


def clamp_scale(network: Any) -> None:
    """Keeps log(1/T) between 0 and log(100), as CLIP does after each step."""
    with torch.no_grad():
        network.logit_scale.clamp_(0, math.log(MAX_SCALE))

"""The contrastive loss of a run, from open_clip's own pieces, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss

from mmsearch.training.recipe import LossKind, TeacherTable

#: The largest 1/T: CLIP's own bound, without which the temperature runs away.
MAX_SCALE = 100.0
#: Where open_clip starts a SigLIP model.
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of a batch, row i of one belonging to row i of the other, (n, dim) each."""

    image: torch.Tensor
    text: torch.Tensor


class ContrastiveLoss:
    """The loss of a global batch that is spread over `world` processes.

    "clip" is the symmetric InfoNCE of Radford et al. 2021; "siglip" the pairwise sigmoid loss
    of Zhai et al. 2023. With a teacher (for "clip" only) its distillation loss is added: Hinton
    et al. 2015, on CLIP's logits.
    Each process gets the loss of its own rows against everybody's: the mean over processes is
    the loss of the global batch, and so is the mean of their gradients.
    """

    def __init__(
        self,
        kind: LossKind = "clip",
        teacher: TeacherTable | None = None,
        rank: int = 0,
        world: int = 1,
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


def cached_backward(
    embed: Callable[[torch.Tensor, torch.Tensor], Embeddings],
    loss_of: Callable[[Embeddings], torch.Tensor],
    image: torch.Tensor,
    text: torch.Tensor,
    chunk: int,
) -> float:
    """The gradients of a whole batch's loss with the memory of a chunk; returns the loss.

    Gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under
    Memory Limited Setup"): all embeddings are computed without a graph, the loss gives the
    gradient of each, and every chunk is computed once more to carry its share back. Whatever
    drops out drops out alike both times. Layers that mix the rows of a batch (batch norm in
    training mode) see chunks, not the batch.
    """
    pieces = list(zip(image.split(chunk), text.split(chunk), strict=True))
    states, found = [], []
    with torch.no_grad():
        for piece in pieces:
            # The CPU's too, wherever the network is: open_clip's patch dropout draws there.
            on_card = torch.cuda.get_rng_state(image.device) if image.is_cuda else None
            states.append((torch.get_rng_state(), on_card))
            found.append(embed(*piece))
    leaves = Embeddings(
        torch.cat([e.image for e in found]).requires_grad_(),
        torch.cat([e.text for e in found]).requires_grad_(),
    )
    loss = loss_of(leaves)
    loss.backward()
    assert leaves.image.grad is not None
    assert leaves.text.grad is not None
    parts = zip(leaves.image.grad.split(chunk), leaves.text.grad.split(chunk), strict=True)
    for piece, (state, on_card), gradients in zip(pieces, states, parts, strict=True):
        torch.set_rng_state(state)
        if on_card is not None:
            torch.cuda.set_rng_state(on_card, image.device)
        again = embed(*piece)
        # A tower that is frozen has no graph to go back through.
        learning = [
            pair for pair in zip((again.image, again.text), gradients, strict=True)
            if pair[0].requires_grad
        ]  # fmt: skip
        torch.autograd.backward([out for out, _ in learning], [grad for _, grad in learning])
    return loss.item()

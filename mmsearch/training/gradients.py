"""Gradients of batches that do not fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmsearch.training.losses import Embeddings


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
            states.append(_random_state(image.device))
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
    for piece, state, gradients in zip(pieces, states, parts, strict=True):
        _set_random_state(image.device, state)
        again = embed(*piece)
        # A tower that is frozen has no graph to go back through.
        learning = [
            pair for pair in zip((again.image, again.text), gradients, strict=True)
            if pair[0].requires_grad
        ]  # fmt: skip
        torch.autograd.backward([out for out, _ in learning], [grad for _, grad in learning])
    return loss.item()


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """Of the CPU too, wherever the network is: open_clip's patch dropout draws there."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def _set_random_state(device: torch.device, state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)

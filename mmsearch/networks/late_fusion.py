"""Trained weights of scores: what late fusion puts together."""

from __future__ import annotations

import torch
from torch import nn


class LateFusion(nn.Module):
    """The weighted mean of the scores that an item has, by weights that add up to 1.

    The weights are a softmax of free parameters, so that none is negative. An item with one
    score is ranked by that alone, whatever its weight, and `bare` more.
    """

    def __init__(self, sources: int, bare: float = 0.0) -> None:
        super().__init__()
        self._bare = bare
        self.logits = nn.Parameter(torch.zeros(sources, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
        """log(1/T) of the softmax over items, for learning alone: it changes no order."""

    @property
    def weights(self) -> torch.Tensor:
        """What each source counts, (sources,)."""
        return self.logits.softmax(0)

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Fuses scores (..., sources, items), NaN where there is none, into (..., items).

        An item without any score gets minus infinity.
        """
        there = scores.isfinite()
        share = torch.where(there, self.weights[:, None].clamp(min=1e-6), 0.0)
        # Zeros first: a gradient does not pass a NaN, not even one that `where` leaves out.
        total = (share * torch.where(there, scores, 0.0)).sum(-2)
        held = there.any(-2)
        found = total / torch.where(held, share.sum(-2), 1.0)
        found = found + self._bare * (there.sum(-2) == 1)
        return torch.where(held, found, -torch.inf)

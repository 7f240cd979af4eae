"""Early fusion (one embedding of an image and a text) and late fusion (weights of scores)."""

from __future__ import annotations

import torch
from torch import nn


class EarlyFusion(nn.Module):
    """Unit embeddings of an image and a text, (n, dim) each, to one unit embedding (n, dim).

    Each is projected to one width; the two, concatenated, pass a perceptron that gives a gate g
    and a residual r: (1 - g) image + g text + r, of length 1. Gate and residual start at a half
    and at zero, so that it starts as the mean, which is what adding the two up gives. The shape
    is the Combiner's (Baldrati et al. 2022), after TIRG's gate and residual (Vo et al. 2019).
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = nn.Linear(dim, hidden)
        self.text = nn.Linear(dim, hidden)
        self.joint = nn.Linear(2 * hidden, hidden)
        self.gate = nn.Linear(hidden, 1)
        self.residual = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)
        for last in (self.gate, self.residual):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        parts = torch.cat([self.image(image), self.text(text)], dim=-1)
        joint = self.drop(self.joint(self.drop(parts.relu())).relu())
        gate = self.gate(joint).sigmoid()
        found = (1 - gate) * image + gate * text + self.residual(joint)
        return nn.functional.normalize(found, dim=-1)


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

"""Early fusion: one embedding from an image's and a text's."""

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

"""Projection heads: from a tower's embedding into a shared space."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

HeadKind = Literal["linear", "residual"]


class ProjectionHead(nn.Module):
    """Embeddings (n, width) to embeddings (n, dim), not normalised.

    "linear" is one matrix. "residual" adds a two-layer perceptron to it, whose last layer
    starts at zero, so that both kinds start as the same map: the identity where width and dim
    are equal, so that a space that is aligned already loses nothing at the start; else an
    orthogonal projection, which keeps lengths and angles as well as that many dimensions can.
    """

    def __init__(
        self, width: int, dim: int, kind: HeadKind = "linear", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(width, dim, bias=False)
        if width == dim:
            nn.init.eye_(self.projection.weight)
        else:
            nn.init.orthogonal_(self.projection.weight)
        self.residual: nn.Sequential | None = None
        if kind == "residual":
            hidden = max(width, dim)
            last = nn.Linear(hidden, dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.residual = nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), last
            )

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.projection(embedding)
        if self.residual is not None:
            found = found + self.residual(embedding)
        return found

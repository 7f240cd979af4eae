"""Two towers' embeddings brought into one space by a head for each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

HeadKind = Literal["linear", "residual"]


@dataclass(frozen=True)
class HeadsConfig:
    """The shape of a pair of heads."""

    image_width: int
    text_width: int
    dim: int
    kind: HeadKind = "linear"
    dropout: float = 0.0


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


class AlignedHeads(nn.Module):
    """Heads over the unit embeddings of two frozen towers.

    It has the methods of an open_clip model (`encode_image`, `encode_text`, `logit_scale`), so
    that one training loop serves both. `logit_scale` is log(1/T), T the softmax's temperature.
    """

    def __init__(self, config: HeadsConfig, init_scale: float = 1 / 0.07) -> None:
        super().__init__()
        self.config = config
        self.image = ProjectionHead(config.image_width, config.dim, config.kind, config.dropout)
        self.text = ProjectionHead(config.text_width, config.dim, config.kind, config.dropout)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_scale)))

    def encode_image(self, embedding: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        found: torch.Tensor = self.image(embedding)
        return nn.functional.normalize(found, dim=-1) if normalize else found

    def encode_text(self, embedding: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        found: torch.Tensor = self.text(embedding)
        return nn.functional.normalize(found, dim=-1) if normalize else found


class AlignedModel(nn.Module):
    """An open_clip model with heads on top: pixels and tokens in, one space out."""

    def __init__(self, base: nn.Module, heads: AlignedHeads) -> None:
        super().__init__()
        self.base: Any = base
        self.heads = heads

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return self.heads.encode_image(self.base.encode_image(image, normalize=True), normalize)

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return self.heads.encode_text(self.base.encode_text(text, normalize=True), normalize)

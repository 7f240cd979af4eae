"""Two towers' embeddings brought into one space by a head for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from mmsearch.networks.projection import HeadKind, ProjectionHead


@dataclass(frozen=True)
class HeadsConfig:
    """The shape of a pair of heads."""

    image_width: int
    text_width: int
    dim: int
    kind: HeadKind = "linear"
    dropout: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> HeadsConfig:
        return cls(**stored)


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

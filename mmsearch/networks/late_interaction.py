"""Late interaction: how well texts match images, by the best patch of each token."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from mmsearch.networks.cross_attention import start_alike

_SCALE = 20.0
_NEVER = -2.0  # less than any cosine


class LateInteraction(nn.Module):
    """Matching scores of all pairs of texts and images, by max-sim both ways.

    Each token has the cosine of its best patch and each patch that of its best token; the two
    weighted means are averaged, with weights learned from what tokens and patches are (ColBERT,
    Khattab and Zaharia 2020; both ways as in FILIP, Yao et al. 2022).

    Texts are tokens (t, l, dim), of which `there` (t, l) are no padding, images patches
    (i, p, dim), both as rows of length 1 in one space; the scores are (t, i).
    """

    def __init__(self, dim: int, width: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.token, self.patch = nn.Linear(dim, width), nn.Linear(dim, width)
        start_alike(self.token, self.patch)
        self.norm_token, self.norm_patch = nn.LayerNorm(width), nn.LayerNorm(width)
        self.weigh_token, self.weigh_patch = nn.Linear(width, 1), nn.Linear(width, 1)
        for weigh in (self.weigh_token, self.weigh_patch):  # all count alike at first
            nn.init.zeros_(weigh.weight)
            nn.init.zeros_(weigh.bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
        self.drop = nn.Dropout(2 * dropout)

    def forward(
        self, tokens: torch.Tensor, there: torch.Tensor, patches: torch.Tensor
    ) -> torch.Tensor:
        rows, seen = self.token(self.drop(tokens)), self.patch(self.drop(patches))
        token_share = self.weigh_token(self.norm_token(rows)).squeeze(-1)
        token_share = token_share.masked_fill(~there, -torch.inf).softmax(dim=-1)
        patch_share = self.weigh_patch(self.norm_patch(seen)).squeeze(-1).softmax(dim=-1)
        cosines = torch.einsum(
            "tlw,ipw->tilp", functional.normalize(rows, dim=-1), functional.normalize(seen, dim=-1)
        )
        by_token = (cosines.amax(dim=3) * token_share[:, None]).sum(dim=-1)
        cosines = cosines.masked_fill(~there[:, None, :, None], _NEVER)
        by_patch = (cosines.amax(dim=2) * patch_share[None]).sum(dim=-1)
        scores: torch.Tensor = (by_token + by_patch) / 2 * self.log_scale.exp()
        return scores

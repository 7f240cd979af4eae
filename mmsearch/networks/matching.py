"""How well texts match images: by tokens that attend to patches, or by each token's best patch."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

#: Rows are of length 1; layers start from entries of about 1.
_ROW_SCALE = 16.0
_COSINE_SCALE = 20.0
_NEVER = -2.0  # less than any cosine


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), batch first."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of rows (n, b, width): (n, heads, b, width / heads) each."""
        key, value = self.key_value(rows).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(
        self,
        rows: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor],
        there: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows (n, a, width) attend to keys; `there` (n, b) is False where a key is padding."""
        found = functional.scaled_dot_product_attention(
            self._split(self.query(rows)),
            *keys,
            attn_mask=None if there is None else there[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        joined: torch.Tensor = self.out(found.transpose(1, 2).flatten(2))
        return joined

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        split: torch.Tensor = rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split


class Block(nn.Module):
    """Tokens attend to tokens, then to patches; a feed-forward. Pre-norm, with residuals."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_own, self.norm_cross, self.norm_feed = (nn.LayerNorm(width) for _ in range(3))
        self.own = Attention(width, heads, dropout)
        self.cross = Attention(width, heads, dropout)
        self.feed = nn.Sequential(
            nn.Linear(width, 3 * width),
            nn.GELU(approximate="tanh"),  # as the weights that are shipped were learned
            nn.Dropout(dropout),
            nn.Linear(3 * width, width),
        )

    def forward(
        self,
        tokens: torch.Tensor,
        there: torch.Tensor,
        patches: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        own = self.norm_own(tokens)
        tokens = tokens + self.own(own, self.own.keys(own), there)
        tokens = tokens + self.cross(self.norm_cross(tokens), patches)
        found: torch.Tensor = tokens + self.feed(self.norm_feed(tokens))
        return found


class CrossAttention(nn.Module):
    """Matching scores of all pairs of texts and images, as ALBEF's matching head (Li et al. 2021).

    Texts are tokens (t, l, dim), of which `there` (t, l) are no padding, images patches
    (i, p, dim), both as rows of length 1 in one space; the scores are (t, i). Tokens and patches
    start in the same projection, so that what is alike in the space is alike to attention.
    """

    def __init__(
        self, dim: int, width: int = 128, heads: int = 4, blocks: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.token, self.patch = nn.Linear(dim, width), nn.Linear(dim, width)
        start_alike(self.token, self.patch)
        self.norm_token, self.norm_patch = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)
        self.drop = nn.Dropout(2 * dropout)

    def forward(
        self, tokens: torch.Tensor, there: torch.Tensor, patches: torch.Tensor
    ) -> torch.Tensor:
        texts, images = tokens.shape[0], patches.shape[0]
        rows = self.norm_token(self.token(self.drop(tokens) * _ROW_SCALE))
        seen = self.norm_patch(self.patch(self.drop(patches) * _ROW_SCALE))
        # Text after text, with every image.
        rows = rows[:, None].expand(-1, images, -1, -1).flatten(0, 1)
        there = there[:, None].expand(-1, images, -1).flatten(0, 1)
        for block in self.blocks:
            assert isinstance(block, Block)
            key, value = block.cross.keys(seen)  # once for an image, whatever the texts
            rows = block(rows, there, (key.repeat(texts, 1, 1, 1), value.repeat(texts, 1, 1, 1)))
        counts = there.unsqueeze(-1).to(rows.dtype)
        mean = (self.norm_out(rows) * counts).sum(dim=1) / counts.sum(dim=1)
        scores: torch.Tensor = self.out(mean).reshape(texts, images)
        return scores


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
        self.log_scale = nn.Parameter(torch.tensor(math.log(_COSINE_SCALE)))
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


def start_alike(token: nn.Linear, patch: nn.Linear) -> None:
    """Gives two projections the same orthogonal start: cosines stay about what they are."""
    nn.init.orthogonal_(token.weight)
    with torch.no_grad():
        patch.weight.copy_(token.weight)
    nn.init.zeros_(token.bias)
    nn.init.zeros_(patch.bias)

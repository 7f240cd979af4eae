"""The matching networks without torch, whose import would cost a search two seconds.

They are `mmsearch.networks.late_interaction` and `mmsearch.networks.cross_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from mmsearch.search.learned import Arrays

Kind = Literal["interaction", "attention"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Floats = NDArray[np.float32]

_EPSILON = 1e-5  # torch's LayerNorm
_ATTENTION_SCALE = 16.0


class Matcher(Protocol):
    """Scores how well a text matches images."""

    def __call__(self, tokens: Floats, patches: Floats) -> Floats:
        """The tokens of one text (l, dim) and patches of images (n, p, dim) to scores (n,)."""
        ...


class LateInteractionMatcher:
    """What `LateInteraction` computes, without torch."""

    def __init__(self, weights: Arrays) -> None:
        """Takes the network's weights by their names in torch.

        Raises:
            ValueError: not that network's.
        """
        self._layers = _Layers(weights)
        self._layers.require(
            {"token": (-1, -2), "patch": (-1, -2), "norm_token": (-1,), "norm_patch": (-1,),
             "weigh_token": (1, -1), "weigh_patch": (1, -1)}
        )  # fmt: skip
        self._scale = np.exp(weights["log_scale"].reshape(()))

    def __call__(self, tokens: Floats, patches: Floats) -> Floats:
        of = self._layers
        rows, seen = of.linear("token", tokens), of.linear("patch", patches)
        token_share = _softmax(of.linear("weigh_token", of.norm("norm_token", rows))[:, 0])
        patch_share = _softmax(of.linear("weigh_patch", of.norm("norm_patch", seen))[..., 0])
        cosines = _unit(seen) @ _unit(rows).T  # (n, p, l)
        by_token = cosines.max(axis=1) @ token_share
        by_patch = (cosines.max(axis=2) * patch_share).sum(axis=1)
        found: Floats = ((by_token + by_patch) / 2 * self._scale).astype(np.float32)
        return found


class CrossAttentionMatcher:
    """What `CrossAttention` computes, without torch."""

    def __init__(self, weights: Arrays, heads: int) -> None:
        """Takes the network's weights by their names in torch.

        Raises:
            ValueError: not that network's.
        """
        self._heads = heads
        self._layers = _Layers(weights)
        shapes: dict[str, tuple[int, ...]] = {
            "token": (-1, -2), "patch": (-1, -2), "norm_token": (-1,), "norm_patch": (-1,),
            "norm_out": (-1,), "out": (1, -1),
        }  # fmt: skip
        width = len(weights["norm_out.weight"])
        self._blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        for number in range(self._blocks):
            name = f"blocks.{number}"
            shapes |= {f"{name}.norm_{part}": (-1,) for part in ("own", "cross", "feed")}
            for part in (f"{name}.own", f"{name}.cross"):
                shapes |= {f"{part}.query": (-1, -1), f"{part}.key_value": (2 * width, -1),
                           f"{part}.out": (-1, -1)}  # fmt: skip
            shapes |= {f"{name}.feed.0": (3 * width, -1), f"{name}.feed.3": (-1, 3 * width)}
        self._layers.require(shapes)
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")

    def __call__(self, tokens: Floats, patches: Floats) -> Floats:
        of = self._layers
        # The text is the same for all images until it has looked at them: one row that broadcasts.
        rows = of.norm("norm_token", of.linear("token", tokens * _ATTENTION_SCALE))[None]
        seen = of.norm("norm_patch", of.linear("patch", patches * _ATTENTION_SCALE))
        for number in range(self._blocks):
            name = f"blocks.{number}"
            own = of.norm(f"{name}.norm_own", rows)
            rows = rows + self._attend(f"{name}.own", own, own)
            rows = rows + self._attend(f"{name}.cross", of.norm(f"{name}.norm_cross", rows), seen)
            inner = of.linear(f"{name}.feed.0", of.norm(f"{name}.norm_feed", rows))
            rows = rows + of.linear(f"{name}.feed.3", _gelu(inner))
        mean = of.norm("norm_out", rows).mean(axis=1)
        found: Floats = of.linear("out", mean)[:, 0]
        return found

    def _attend(self, name: str, rows: Floats, to: Floats) -> Floats:
        query = self._split(self._layers.linear(f"{name}.query", rows))
        key, value = np.split(self._layers.linear(f"{name}.key_value", to), 2, axis=-1)
        key, value = self._split(key), self._split(value)
        share = _softmax(query @ key.swapaxes(-1, -2) / np.float32(np.sqrt(query.shape[-1])))
        found = (share @ value).swapaxes(-2, -3)
        return self._layers.linear(f"{name}.out", found.reshape(*found.shape[:-2], -1))

    def _split(self, rows: Floats) -> Floats:
        """(n, l, width) to (n, heads, l, width / heads)."""
        return rows.reshape(*rows.shape[:-1], self._heads, -1).swapaxes(-2, -3)


class _Layers:
    """The linear layers and norms of a network in torch, by name."""

    def __init__(self, weights: Arrays) -> None:
        self._weights = {
            name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()
        }

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError where a layer has another shape; equal negative sizes are equal."""
        sizes: dict[int, int] = {}
        for name, wanted in shapes.items():
            matrix, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
            fits = matrix.ndim == len(wanted) and bias.shape == matrix.shape[:1]
            for have, want in zip(matrix.shape, wanted, strict=False):
                fits = fits and have == (sizes.setdefault(want, have) if want < 0 else want)
            if not fits:
                raise ValueError(f"{name} has the shape {matrix.shape}")

    def linear(self, name: str, rows: Floats) -> Floats:
        found: Floats = rows @ self._weights[f"{name}.weight"].T
        found += self._weights[f"{name}.bias"]
        return found

    def norm(self, name: str, rows: Floats) -> Floats:
        centred = rows - rows.mean(axis=-1, keepdims=True)
        spread = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(_EPSILON))
        found: Floats = (
            centred / spread * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
        )
        return found


def _softmax(rows: Floats) -> Floats:
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    found: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return found


def _gelu(rows: Floats) -> Floats:
    """By tanh, as torch's `gelu(approximate="tanh")`."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (rows + np.float32(0.044715) * rows**3)
    found: Floats = np.float32(0.5) * rows * (1 + np.tanh(inner))
    return found


def _unit(rows: Floats) -> Floats:
    found: Floats = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return found


def matcher_of(kind: str, weights: Arrays, heads: int) -> Matcher:
    """The network of a kind.

    Raises:
        ValueError: no such kind, or not its weights.
    """
    if kind == "interaction":
        return LateInteractionMatcher(weights)
    if kind == "attention":
        return CrossAttentionMatcher(weights, heads)
    raise ValueError(f"holds a network of the kind '{kind}', which this program does not know")

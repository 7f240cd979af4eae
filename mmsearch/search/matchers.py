"""The matching networks as OpenVINO runs them: torch's import would cost a search two seconds.

They are `mmsearch.networks.late_interaction` and `mmsearch.networks.cross_attention`. One runtime
computes all of a query: beside it, the threads of NumPy's products would fight for the cores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from mmsearch.encoders.openvino import Graph, opset, ov
from mmsearch.search.learned import Arrays

Kind = Literal["interaction", "attention"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Floats = NDArray[np.float32]
Node = Any
"""A node of a graph: what OpenVINO's operations take and give."""

_EPSILON = 1e-5  # torch's LayerNorm
_ATTENTION_SCALE = 16.0


class Matcher(Protocol):
    """Scores how well a text matches images."""

    def __call__(self, tokens: Floats, patches: Floats, /) -> Floats:
        """The tokens of one text (l, dim) and patches of images (n, p, dim) to scores (n,)."""
        ...


def matcher_of(kind: str, weights: Arrays, heads: int) -> Matcher:
    """The network of a kind.

    Args:
        weights: the network's, by their names in torch.

    Raises:
        ValueError: no such kind, or not its weights.
    """
    if kind not in KINDS:
        raise ValueError(f"holds a network of the kind '{kind}', which this program does not know")
    layers = _Layers(weights)
    width, dim = weights["token.weight"].shape
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    tokens = opset.parameter([-1, dim], np.float32, name="tokens")
    patches = opset.parameter([-1, -1, dim], np.float32, name="patches")
    try:
        if kind == "interaction":
            scores = _late_interaction(layers, weights, tokens, patches)
        else:
            scores = _cross_attention(layers, weights, heads, tokens, patches)
        graph = Graph(ov.Model([scores], [tokens, patches]))
        probe = np.full((2, dim), dim**-0.5, np.float32)
        shape = graph(probe, np.stack([probe] * 3)).shape  # sizes that are open until then
    except RuntimeError as error:
        raise ValueError(
            f"holds weights of other shapes: {' '.join(str(error).split())[-120:]}"
        ) from error
    if shape != (3,):
        raise ValueError(f"gives scores of the shape {shape}")
    return graph


def _late_interaction(of: _Layers, weights: Arrays, tokens: Node, patches: Node) -> Node:
    rows, seen = of.linear("token", tokens), of.linear("patch", patches)
    token_share = _softmax(of.linear("weigh_token", of.norm("norm_token", rows)), axis=0)  # (l, 1)
    patch_share = _softmax(of.linear("weigh_patch", of.norm("norm_patch", seen)), axis=1)
    cosines = opset.matmul(_unit(seen), _unit(rows), False, True)  # (n, p, l)
    by_token = opset.matmul(
        opset.reduce_max(cosines, _ints(1)), token_share, False, False
    )  # (n, 1)
    best = opset.reduce_max(cosines, _ints(2), keep_dims=True)  # (n, p, 1)
    by_patch = opset.reduce_sum(opset.multiply(best, patch_share), _ints(1))  # (n, 1)
    scale = np.exp(weights["log_scale"].reshape(())) / 2
    both = opset.multiply(opset.add(by_token, by_patch), np.float32(scale))
    return opset.squeeze(both, _ints(1))


def _cross_attention(of: _Layers, weights: Arrays, heads: int, tokens: Node, patches: Node) -> Node:
    width = len(weights["norm_out.weight"])

    def split(rows: Node) -> Node:
        """(n, l, width) to (n, heads, l, width / heads)."""
        parts = opset.reshape(rows, _ints(0, 0, heads, width // heads), special_zero=True)
        return opset.transpose(parts, _ints(0, 2, 1, 3))

    def attend(name: str, rows: Node, to: Node) -> Node:
        key, value = opset.split(of.linear(f"{name}.key_value", to), np.int64(-1), 2).outputs()
        query = split(of.linear(f"{name}.query", rows))
        scaled = opset.multiply(query, np.float32((width // heads) ** -0.5))
        share = _softmax(opset.matmul(scaled, split(key), False, True), axis=-1)
        found = opset.transpose(opset.matmul(share, split(value), False, False), _ints(0, 2, 1, 3))
        joined = opset.reshape(found, _ints(0, 0, width), special_zero=True)
        return of.linear(f"{name}.out", joined)

    scale = np.float32(_ATTENTION_SCALE)
    # The text is the same for all images until it has looked at them: one row that broadcasts.
    rows = of.norm("norm_token", of.linear("token", opset.multiply(tokens, scale)))
    rows = opset.unsqueeze(rows, _ints(0))
    seen = of.norm("norm_patch", of.linear("patch", opset.multiply(patches, scale)))
    for number in itertools.count():
        name = f"blocks.{number}"
        if f"{name}.norm_own.weight" not in weights:
            break
        own = of.norm(f"{name}.norm_own", rows)
        rows = opset.add(rows, attend(f"{name}.own", own, own))
        to_patches = of.norm(f"{name}.norm_cross", rows)
        rows = opset.add(rows, attend(f"{name}.cross", to_patches, seen))
        inner = of.linear(f"{name}.feed.0", of.norm(f"{name}.norm_feed", rows))
        rows = opset.add(rows, of.linear(f"{name}.feed.3", opset.gelu(inner, "tanh")))
    mean = opset.reduce_mean(of.norm("norm_out", rows), _ints(1))  # (n, width)
    return opset.squeeze(of.linear("out", mean), _ints(1))


def popularity_of(captions: Floats, temperature: float) -> Callable[[Floats], Floats]:
    """From unit vectors of images (n, dim) to the log-mean-exp of their cosines with captions."""
    images = opset.parameter([-1, captions.shape[1]], np.float32, name="images")
    cosines = opset.matmul(images, _floats(captions), False, True)
    near = opset.exp(opset.multiply(cosines, np.float32(temperature)))
    found = opset.log(opset.reduce_mean(near, _ints(1)))
    return Graph(ov.Model([opset.multiply(found, np.float32(1 / temperature))], [images]))


class _Layers:
    """The linear layers and norms of a network in torch, by name."""

    def __init__(self, weights: Arrays) -> None:
        self._weights = weights

    def linear(self, name: str, rows: Node) -> Node:
        product = opset.matmul(rows, _floats(self._weights[f"{name}.weight"]), False, True)
        return opset.add(product, _floats(self._weights[f"{name}.bias"]))

    def norm(self, name: str, rows: Node) -> Node:
        unit = opset.mvn(rows, _ints(-1), True, _EPSILON, "inside_sqrt")
        scaled = opset.multiply(unit, _floats(self._weights[f"{name}.weight"]))
        return opset.add(scaled, _floats(self._weights[f"{name}.bias"]))


def _floats(values: NDArray[np.floating]) -> Node:
    return opset.constant(np.ascontiguousarray(values, np.float32))


def _ints(*values: int) -> Node:
    return opset.constant(np.array(values, np.int64))


def _softmax(rows: Node, axis: int) -> Node:
    return opset.softmax(rows, axis)


def _unit(rows: Node) -> Node:
    return opset.normalize_l2(rows, _ints(-1), 1e-24, "max")

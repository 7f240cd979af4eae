"""Early fusion against loops, and where it starts."""

from __future__ import annotations

import math

import numpy as np
import torch

from mmsearch.networks.fusion import EarlyFusion


def by_hand(network, image, text):
    """One pair, one number at a time."""
    p = {name: value.detach().tolist() for name, value in network.named_parameters()}

    def linear(name, row):
        return [
            sum(w * x for w, x in zip(weights, row, strict=True)) + bias
            for weights, bias in zip(p[f"{name}.weight"], p[f"{name}.bias"], strict=True)
        ]

    both = [max(0.0, x) for x in linear("image", image) + linear("text", text)]
    joint = [max(0.0, x) for x in linear("joint", both)]
    gate = 1 / (1 + math.exp(-linear("gate", joint)[0]))
    residual = linear("residual", joint)
    found = [(1 - gate) * i + gate * t + r for i, t, r in zip(image, text, residual, strict=True)]
    length = math.sqrt(sum(x * x for x in found))
    return [x / length for x in found]


def some(seed=0, dim=5, hidden=3):
    torch.manual_seed(seed)
    network = EarlyFusion(dim, hidden, dropout=0.5).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    rows = torch.nn.functional.normalize(torch.randn(2, 7, dim, dtype=torch.float64), dim=-1)
    return network, rows[0], rows[1]


def test_it_computes_what_loops_compute():
    network, image, text = some()
    expected = [by_hand(network, *pair) for pair in zip(image.tolist(), text.tolist(), strict=True)]
    np.testing.assert_allclose(network(image, text).detach().numpy(), expected, atol=1e-12)


def test_it_starts_as_the_mean():
    image, text = (torch.nn.functional.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    expected = torch.nn.functional.normalize(image + text, dim=-1)
    torch.testing.assert_close(EarlyFusion(8, 4).eval()(image, text), expected)


def test_every_weight_learns_after_the_first_step():
    network, image, text = some()
    network(image, text).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())

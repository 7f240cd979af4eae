"""Projection heads against NumPy, and where they start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erf

from mmsearch.networks.aligned import AlignedHeads, AlignedModel, HeadsConfig, ProjectionHead


def by_hand(head, rows):
    """The same head in NumPy, layer by layer."""
    weights = {name: value.detach().numpy() for name, value in head.named_parameters()}
    found = rows @ weights["projection.weight"].T
    if head.residual is not None:
        hidden = rows @ weights["residual.0.weight"].T + weights["residual.0.bias"]
        hidden = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2)))  # GELU, Hendrycks and Gimpel 2016
        found = found + hidden @ weights["residual.3.weight"].T + weights["residual.3.bias"]
    return found


@pytest.mark.parametrize("kind", ["linear", "residual"])
@pytest.mark.parametrize(("width", "dim"), [(6, 6), (8, 3), (3, 8)])
def test_a_head_computes_what_numpy_computes(kind, width, dim):
    torch.manual_seed(0)
    head = ProjectionHead(width, dim, kind).double().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    rows = np.random.default_rng(0).normal(size=(5, width))
    np.testing.assert_allclose(
        head(torch.from_numpy(rows)).detach().numpy(), by_hand(head, rows), atol=1e-12
    )


@pytest.mark.parametrize("kind", ["linear", "residual"])
def test_a_head_of_equal_widths_starts_as_the_identity(kind):
    rows = torch.randn(4, 7)
    torch.testing.assert_close(ProjectionHead(7, 7, kind)(rows), rows)


def test_a_wider_head_starts_without_changing_angles():
    rows = torch.randn(6, 4)
    found = ProjectionHead(4, 9, "residual")(rows)
    torch.testing.assert_close(found @ found.T, rows @ rows.T)


def test_heads_over_a_model_are_the_model_then_the_heads():
    class Base(torch.nn.Module):
        def encode_image(self, image, normalize=False):
            assert normalize
            return torch.nn.functional.normalize(image + 1, dim=-1)

        encode_text = encode_image

    torch.manual_seed(0)
    heads = AlignedHeads(HeadsConfig(4, 4, 3, "residual")).eval()
    whole, rows = AlignedModel(Base(), heads), torch.randn(5, 4)
    unit = torch.nn.functional.normalize(rows + 1, dim=-1)
    torch.testing.assert_close(whole.encode_image(rows), heads.image(unit))
    found = whole.encode_text(rows, normalize=True)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(found, torch.nn.functional.normalize(heads.text(unit), dim=-1))

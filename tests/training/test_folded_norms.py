"""Batch norms that only add: taken out while learning, and nothing else changes."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from conftest import REPOSITORY

from mmsearch.training.network import Shift, drop_folded_norms

sys.path.insert(0, str(REPOSITORY / "scripts"))


@pytest.fixture
def network():
    from backbones import fold_norms

    torch.manual_seed(0)
    found = timm.create_model("test_efficientnet", num_classes=0).eval()
    for module in found.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_var):
                torch.nn.init.uniform_(value, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean)
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = found(image)
        fold_norms(found)
        torch.testing.assert_close(found(image), before, atol=1e-4, rtol=1e-4)
    return found


def test_what_is_left_of_a_norm_does_what_it_did(network):
    image = torch.rand(2, 3, 64, 64)
    names = set(network.state_dict())
    expected = network(image)
    expected.square().sum().backward()
    gradients = {name: value.grad.clone() for name, value in network.named_parameters()}
    network.zero_grad()
    drop_folded_norms(network, ["conv_stem", "bn1", "blocks", "conv_head", "bn2"])
    assert any(isinstance(module, Shift) for module in network.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert set(network.state_dict()) < names  # so that what it learns goes back by name
    found = network(image)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    found.square().sum().backward()
    for name, value in network.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name], atol=1e-4, rtol=1e-3)


def test_other_norms_stay(network):
    network.blocks[0][0].bn1.weight.data[0] = 2.0
    drop_folded_norms(network, ["blocks.0"])
    assert isinstance(network.blocks[0][0].bn1, torch.nn.BatchNorm2d)
    assert isinstance(network.blocks[1][0].bn1, torch.nn.BatchNorm2d)  # may learn its statistics

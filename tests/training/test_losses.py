"""The loss against open_clip's, against its formula, and its gradients against differences."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import nn
from toys import paired_vectors

from mmsearch.networks.aligned import AlignedHeads, HeadsConfig
from mmsearch.training.losses import ContrastiveLoss, Embeddings, clamp_scale
from mmsearch.training.recipe import TeacherTable


def unit(rows, dim, seed):
    vectors = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(vectors.double(), dim=-1)


def network(scale=10.0, bias=-3.0):
    return SimpleNamespace(
        logit_scale=torch.tensor(math.log(scale), dtype=torch.float64),
        logit_bias=torch.tensor(bias, dtype=torch.float64),
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(2, 7), st.floats(1, 100), st.integers(0, 99))
def test_the_losses_are_those_of_open_clip(rows, dim, scale, seed):
    image, text = unit(rows, dim, seed), unit(rows, dim, seed + 1)
    own, net = Embeddings(image, text), network(scale)
    logit = net.logit_scale.exp()
    assert ContrastiveLoss()(own, net).item() == pytest.approx(
        ClipLoss()(image, text, logit).item()
    )
    assert ContrastiveLoss("siglip")(own, net).item() == pytest.approx(
        SigLipLoss()(image, text, logit, net.logit_bias).item()
    )
    taught = Embeddings(unit(rows, 3, seed + 2), unit(rows, 3, seed + 3))
    contrast, follow = DistillClipLoss()(
        image, text, logit, taught.image, taught.text, torch.tensor(50.0)
    )
    found = ContrastiveLoss("clip", TeacherTable("", 0.5, 50.0))(own, net, taught)
    assert found.item() == pytest.approx((contrast + 0.5 * follow).item())


def test_the_contrastive_loss_is_the_mean_of_two_cross_entropies():
    """By hand: -log softmax of the true pair, over rows and over columns."""
    image, text = unit(4, 3, 0), unit(4, 3, 1)
    logits = (10 * image @ text.T).numpy()
    by_hand = 0.0
    for table in (logits, logits.T):
        for i in range(4):
            total = sum(math.exp(value) for value in table[i])
            by_hand -= math.log(math.exp(table[i, i]) / total) / 8
    assert ContrastiveLoss()(Embeddings(image, text), network(10)).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("head", ["linear", "residual"])
def test_gradients_agree_with_finite_differences(kind, head):
    """In float64, through both heads and the temperature."""
    torch.manual_seed(0)
    heads = AlignedHeads(HeadsConfig(6, 8, 5, head)).double()
    heads.logit_bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
    with torch.no_grad():  # off the zeros, at which the residual layer starts
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    image, texts = paired_vectors(7, 1, dtype=torch.float64)
    text = torch.cat(texts)
    loss = ContrastiveLoss(kind)

    def value():
        pair = (heads.encode_image(image, normalize=True), heads.encode_text(text, normalize=True))
        return loss(Embeddings(*pair), heads)

    value().backward()
    rng, step = torch.Generator().manual_seed(1), 1e-6
    for name, parameter in heads.named_parameters():
        if parameter.grad is None:
            assert name == "logit_bias"
            assert kind == "clip"
            continue
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for place in torch.randperm(len(flat), generator=rng)[:8]:
            before = flat[place].item()
            with torch.no_grad():
                flat[place] = before + step
                above = value().item()
                flat[place] = before - step
                below = value().item()
                flat[place] = before
            slope = (above - below) / (2 * step)
            assert gradient[place].item() == pytest.approx(slope, abs=1e-7, rel=1e-5), name


def test_the_temperature_stays_between_its_bounds():
    heads = AlignedHeads(HeadsConfig(2, 2, 2))
    for wanted, bound in ((1000.0, 100.0), (0.1, 1.0), (20.0, 20.0)):
        heads.logit_scale.data.fill_(math.log(wanted))
        clamp_scale(heads)
        assert heads.logit_scale.exp().item() == pytest.approx(bound)

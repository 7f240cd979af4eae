"""The matching networks against loops; what padding must not do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmsearch.networks.matching import Block, CrossAttention, LateInteraction

DIM, WIDTH, HEADS, BLOCKS = 6, 8, 2, 2
TEXTS, IMAGES, LONGEST, PATCHES = 3, 4, 5, 7


def made(kind):
    torch.manual_seed(2)
    if kind == "attention":
        network = CrossAttention(DIM, WIDTH, HEADS, BLOCKS, dropout=0.3)
    else:
        network = LateInteraction(DIM, WIDTH, dropout=0.3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return network.double().eval()


@pytest.fixture
def pairs():
    torch.manual_seed(3)
    unit = torch.nn.functional.normalize
    tokens = unit(torch.randn(TEXTS, LONGEST, DIM, dtype=torch.float64), dim=-1)
    patches = unit(torch.randn(IMAGES, PATCHES, DIM, dtype=torch.float64), dim=-1)
    there = torch.arange(LONGEST)[None] < torch.tensor([[5], [3], [1]])
    return tokens, there, patches


# -- the slow and obvious version: one pair, one number at a time ------------------------------


class ByHand:
    def __init__(self, network):
        self.p = {name: value.detach().tolist() for name, value in network.named_parameters()}

    def linear(self, name, row):
        return [
            sum(w * x for w, x in zip(weights, row, strict=True)) + bias
            for weights, bias in zip(self.p[f"{name}.weight"], self.p[f"{name}.bias"], strict=True)
        ]

    def norm(self, name, row):
        mean = sum(row) / len(row)
        spread = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + 1e-5)
        gains = zip(row, self.p[f"{name}.weight"], self.p[f"{name}.bias"], strict=True)
        return [(x - mean) / spread * weight + bias for x, weight, bias in gains]

    def attend(self, name, rows, to):
        queries = [self.linear(f"{name}.query", row) for row in rows]
        both = [self.linear(f"{name}.key_value", row) for row in to]
        found = [[0.0] * WIDTH for _ in rows]
        size = WIDTH // HEADS
        for head in range(HEADS):
            part = range(head * size, (head + 1) * size)
            for place, query in enumerate(queries):
                scores = [sum(query[i] * row[i] for i in part) / math.sqrt(size) for row in both]
                shares = softmax(scores)
                for i in part:
                    found[place][i] = sum(
                        share * row[WIDTH + i] for share, row in zip(shares, both, strict=True)
                    )
        return [self.linear(f"{name}.out", row) for row in found]


def softmax(scores):
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def add(rows, more):
    return [[x + y for x, y in zip(a, b, strict=True)] for a, b in zip(rows, more, strict=True)]


def gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention_by_hand(network, tokens, patches):
    by = ByHand(network)
    rows = [by.norm("norm_token", by.linear("token", [16 * x for x in row])) for row in tokens]
    seen = [by.norm("norm_patch", by.linear("patch", [16 * x for x in row])) for row in patches]
    for number in range(BLOCKS):
        name = f"blocks.{number}"
        own = [by.norm(f"{name}.norm_own", row) for row in rows]
        rows = add(rows, by.attend(f"{name}.own", own, own))
        asking = [by.norm(f"{name}.norm_cross", row) for row in rows]
        rows = add(rows, by.attend(f"{name}.cross", asking, seen))
        inner = [by.linear(f"{name}.feed.0", by.norm(f"{name}.norm_feed", row)) for row in rows]
        fed = [by.linear(f"{name}.feed.3", [gelu(x) for x in row]) for row in inner]
        rows = add(rows, fed)
    rows = [by.norm("norm_out", row) for row in rows]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return by.linear("out", mean)[0]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def interaction_by_hand(network, tokens, patches):
    by = ByHand(network)
    rows = [by.linear("token", row) for row in tokens]
    seen = [by.linear("patch", row) for row in patches]
    weights = softmax([by.linear("weigh_token", by.norm("norm_token", r))[0] for r in rows])
    by_token = sum(w * max(cosine(r, s) for s in seen) for w, r in zip(weights, rows, strict=True))
    weights = softmax([by.linear("weigh_patch", by.norm("norm_patch", s))[0] for s in seen])
    by_patch = sum(w * max(cosine(r, s) for r in rows) for w, s in zip(weights, seen, strict=True))
    return (by_token + by_patch) / 2 * math.exp(by.p["log_scale"])


BY_HAND = {"attention": attention_by_hand, "interaction": interaction_by_hand}
KINDS = pytest.mark.parametrize("kind", ["attention", "interaction"])


@KINDS
def test_they_compute_what_loops_compute(kind, pairs):
    tokens, there, patches = pairs
    network = made(kind)
    expected = [
        [BY_HAND[kind](network, text[kept].tolist(), image.tolist()) for image in patches]
        for text, kept in zip(tokens, there, strict=True)
    ]
    np.testing.assert_allclose(network(*pairs).detach().numpy(), expected, atol=1e-10)


@KINDS
def test_padding_does_not_leak(kind, pairs):
    tokens, there, patches = pairs
    network = made(kind)
    tokens.requires_grad_()
    scores = network(tokens, there, patches)
    scores.sum().backward()
    assert (tokens.grad[~there] == 0).all()
    assert tokens.grad[there].abs().sum() > 0
    other = tokens.detach().clone()
    other[~there] = 100.0
    torch.testing.assert_close(network(other, there, patches), scores.detach())
    longer = torch.cat([other, other], dim=1)
    mask = torch.cat([there, torch.zeros_like(there)], dim=1)
    torch.testing.assert_close(network(longer, mask, patches), scores.detach())


@KINDS
def test_a_pair_knows_nothing_of_the_others(kind, pairs):
    tokens, there, patches = pairs
    network = made(kind)
    together = network(*pairs)
    for text in range(TEXTS):
        for image in range(IMAGES):
            rows, mask, seen = tokens[text : text + 1], there[text : text + 1], patches[image:][:1]
            torch.testing.assert_close(network(rows, mask, seen)[0, 0], together[text, image])


@KINDS
def test_the_order_of_patches_tells_nothing(kind, pairs):
    tokens, there, patches = pairs
    network = made(kind)
    torch.testing.assert_close(network(tokens, there, patches.flip(1)), network(*pairs))


def test_a_block_passes_on_what_it_adds_nothing_to(pairs):
    block = Block(WIDTH, HEADS, 0.3).eval()
    for layer in (block.own.out, block.cross.out, block.feed[3]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    rows, there = torch.randn(TEXTS, LONGEST, WIDTH), pairs[1]
    keys = block.cross.keys(torch.randn(TEXTS, PATCHES, WIDTH))
    torch.testing.assert_close(block(rows, there, keys), rows)


@KINDS
def test_every_weight_learns(kind, pairs):
    network = made(kind)
    scores = network(*pairs)
    torch.nn.functional.cross_entropy(scores, torch.arange(TEXTS)).backward()
    still = {name for name, p in network.named_parameters() if p.grad.abs().sum() < 1e-14}
    # What is added to all scores, or to all that shares are made of, changes nothing.
    assert still <= {
        "attention": {"norm_out.bias", "out.bias"},
        "interaction": {f"{part}_{side}.bias" for part in ("norm", "weigh")
                        for side in ("token", "patch")},
    }[kind]  # fmt: skip


def test_interaction_starts_as_the_mean_of_cosines():
    """Before it has learned, projections keep what is alike alike, and all count the same."""
    torch.manual_seed(0)
    network = LateInteraction(DIM, DIM).eval()
    rows = torch.nn.functional.normalize(torch.randn(1, PATCHES, DIM), dim=-1)
    score = network(rows, torch.ones(1, PATCHES, dtype=torch.bool), rows)
    torch.testing.assert_close(score.item(), 20.0, atol=1e-4, rtol=0)

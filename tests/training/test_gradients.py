"""Gradient caching gives the whole batch's gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from toys import paired_vectors

from mmsearch.networks.aligned import AlignedHeads, HeadsConfig
from mmsearch.training.losses import ContrastiveLoss, Embeddings, cached_backward


@pytest.mark.parametrize("chunk", [1, 3, 5, 8])
def test_chunks_give_the_gradients_of_the_whole_batch(chunk):
    torch.manual_seed(0)
    whole = AlignedHeads(HeadsConfig(6, 8, 5, "residual")).double()
    parts = copy.deepcopy(whole)
    image, texts = paired_vectors(8, 1, dtype=torch.float64)
    text = torch.cat(texts)

    def embed(network):
        return lambda i, t: Embeddings(
            network.encode_image(i, normalize=True), network.encode_text(t, normalize=True)
        )

    loss = ContrastiveLoss()
    expected = loss(embed(whole)(image, text), whole)
    expected.backward()
    found = cached_backward(embed(parts), lambda own: loss(own, parts), image, text, chunk)
    assert found == pytest.approx(expected.item())
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_what_drops_out_drops_out_alike_in_both_passes():
    """With the same random numbers in both passes, one chunk is a plain backward pass."""
    heads = AlignedHeads(HeadsConfig(6, 8, 5, "residual", dropout=0.5)).double().train()
    plain = copy.deepcopy(heads)
    image, texts = paired_vectors(8, 1, dtype=torch.float64)
    text, loss = torch.cat(texts), ContrastiveLoss()

    def embed(network):
        return lambda i, t: Embeddings(network.encode_image(i, True), network.encode_text(t, True))

    torch.manual_seed(5)
    loss(embed(plain)(image, text), plain).backward()
    torch.manual_seed(5)
    cached_backward(embed(heads), lambda own: loss(own, heads), image, text, 8)
    for one, other in zip(plain.parameters(), heads.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)

"""Meanings for a text tower's tokens before the first step: static word vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from mmsearch.errors import UsageError

#: The spread of open_clip's own token embeddings at the start.
_SPREAD = 0.02
#: How often captions hold a token whose way others follow, how many it follows, and how closely
#: the nearest is preferred: chosen by leaving well-known words out, one by one.
_WELL_KNOWN, _NEAREST, _TEMPERATURE = 100, 10, 0.05
_PADDING = 0
_NEITHER = 1  # a count: neither unseen nor well known


def give_meanings(network: nn.Module, folder: Path) -> None:
    """Sets the token embeddings of a CLIP text tower to the meanings of their tokens.

    Args:
        folder: a model2vec model: `model.safetensors` with `embeddings` (pieces, width) and
            `tokenizer.json`.

    Raises:
        UsageError: no such model there, or a tower without CLIP's tokens.
    """
    table = _token_table(network)
    found = _starting_table(folder, table.embedding_dim)
    with torch.no_grad():
        table.weight[:, : found.shape[1]] = found


def carry_meanings(network: nn.Module, folder: Path, seen: torch.Tensor) -> None:
    """Moves the tokens that no caption held as the tokens nearest in meaning have moved.

    Learning changes what it sees: "dog" goes to where pictures of dogs are, and "canine", which
    no caption holds, would stay behind where both began.

    Args:
        network: trained from where `give_meanings` put its tokens.
        folder: the word vectors that it began with.
        seen: the tokens of all captions, (n,), as often as they came.
    """
    table = _token_table(network)
    start = _starting_table(folder, table.embedding_dim).to(table.weight.device)
    counts = torch.bincount(seen, minlength=len(start)).to(table.weight.device)
    # Every caption has them, or is filled up with them: they move for other reasons than meaning.
    counts[[_PADDING, *open_clip.SimpleTokenizer().all_special_ids]] = _NEITHER
    known = torch.nonzero(counts >= _WELL_KNOWN).flatten()
    unseen = torch.nonzero(counts == 0).flatten()
    if len(known) < _NEAREST:
        return
    width = start.shape[1]
    directions = nn.functional.normalize(start, dim=1)
    with torch.no_grad():
        moved = table.weight[known, :width] - start[known]
        for part in unseen.split(4096):
            near, which = (directions[part] @ directions[known].T).topk(_NEAREST)
            shares = (near / _TEMPERATURE).softmax(dim=1)
            table.weight[part, :width] += torch.einsum("nk,nkd->nd", shares, moved[which])


def _token_table(network: nn.Module) -> nn.Embedding:
    table: Any = getattr(network, "token_embedding", None)
    vocabulary = open_clip.SimpleTokenizer().decoder
    if not isinstance(table, nn.Embedding) or table.num_embeddings != len(vocabulary):
        raise UsageError("model.words: this text tower does not use CLIP's byte-pair tokens")
    return table


def _starting_table(folder: Path, width: int) -> torch.Tensor:
    """Where the tokens begin, (tokens, at most `width`)."""
    try:
        pieces = load_file(folder / "model.safetensors")["embeddings"].float().numpy()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        raise UsageError(f"{folder}: no static word vectors there: {error}") from error
    # The mean of the vectors of a token's word pieces; noise where it has none.
    clip = open_clip.SimpleTokenizer()
    rng = np.random.default_rng(0)
    means = rng.normal(0, pieces.std(), (len(clip.decoder), pieces.shape[1])).astype(np.float32)
    for token in clip.decoder:
        ids = tokenizer.encode(clip.decode([token]).strip(), add_special_tokens=False).ids
        if ids:
            means[token] = pieces[ids].mean(axis=0)
    found = torch.from_numpy(means)
    if found.shape[1] > width:  # the directions in which the words differ most
        _, _, axes = torch.linalg.svd(found - found.mean(0), full_matrices=False)
        found = found @ axes[:width].T
    return found / found.std() * _SPREAD

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


def give_meanings(network: nn.Module, folder: Path) -> None:
    """Sets the token embeddings of a CLIP text tower to the meanings of their tokens.

    Args:
        folder: a model2vec model: `model.safetensors` with `embeddings` (pieces, width) and
            `tokenizer.json`.

    Raises:
        UsageError: no such model there, or a tower without CLIP's tokens.
    """
    table: Any = getattr(network, "token_embedding", None)
    vocabulary = open_clip.SimpleTokenizer().decoder
    if not isinstance(table, nn.Embedding) or table.num_embeddings != len(vocabulary):
        raise UsageError("model.words: this text tower does not use CLIP's byte-pair tokens")
    try:
        pieces = load_file(folder / "model.safetensors")["embeddings"].float().numpy()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        raise UsageError(f"{folder}: no static word vectors there: {error}") from error
    found = torch.from_numpy(_token_meanings(pieces, tokenizer))
    found = _fitted(found, table.embedding_dim)
    with torch.no_grad():
        table.weight[:, : found.shape[1]] = found / found.std() * _SPREAD


def _token_meanings(pieces: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The mean of the vectors of a token's word pieces; noise where it has none."""
    clip = open_clip.SimpleTokenizer()
    rng = np.random.default_rng(0)
    found = rng.normal(0, pieces.std(), (len(clip.decoder), pieces.shape[1])).astype(np.float32)
    for token in clip.decoder:
        ids = tokenizer.encode(clip.decode([token]).strip(), add_special_tokens=False).ids
        if ids:
            found[token] = pieces[ids].mean(axis=0)
    return found


def _fitted(table: torch.Tensor, width: int) -> torch.Tensor:
    """At most `width` columns: the directions in which the words differ most."""
    if table.shape[1] <= width:
        return table
    _, _, axes = torch.linalg.svd(table - table.mean(0), full_matrices=False)
    found: torch.Tensor = table @ axes[:width].T
    return found

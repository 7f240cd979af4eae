"""How well a network in training retrieves pairs that it does not learn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mmsearch.evaluation.ranking import CUTOFFS, rank_of_best, recalls
from mmsearch.training.batches import Source, load_images

#: Pictures that a split needs: the recalls of fewer measure nothing.
LEAST = 10
_QUERIES = 512


def validate(
    network: Any, held_out: Source, device: torch.device | str, workers: int = 0, block: int = 128
) -> dict[str, float]:
    """Recall@1/5/10 both ways, in percent, by names such as "t2i_R@1".

    Args:
        workers: processes that load pictures; 0 is this one.
        block: how many pictures go through the network at once.

    Raises:
        ArithmeticError: the network gives vectors that are no numbers.
    """
    network.eval()
    with torch.inference_mode():
        images = torch.cat([
            network.encode_image(batch.to(device), normalize=True).float().cpu()
            for batch in load_images(held_out.images, block, workers)
        ])  # fmt: skip
        texts = torch.cat([
            network.encode_text(part.to(device), normalize=True).float().cpu()
            for part in torch.cat(list(held_out.texts)).split(4 * block)
        ])  # fmt: skip
    if not (images.isfinite().all() and texts.isfinite().all()):
        raise ArithmeticError("vectors that are not finite")
    owner = np.repeat(np.arange(len(held_out.texts)), [len(own) for own in held_out.texts])
    return recall_of(images.numpy(), texts.numpy(), owner)


def recall_of(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Recall@1/5/10 both ways of unit vectors; `owner[j]` is the image of text j."""
    return both_recalls(ranks_of(images, texts, owner))


def both_recalls(ranks: dict[str, np.ndarray]) -> dict[str, float]:
    """Recall@1/5/10, in percent, of the ranks of both ways."""
    return {
        f"{way}_{name}": value
        for way, found in ranks.items()
        for name, value in recalls(found).items()
    }


def ranks_of(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> dict[str, np.ndarray]:
    """The rank of each query's best true item, both ways."""
    row = np.arange(len(images))
    return {"t2i": _ranks(texts, owner, images, row), "i2t": _ranks(images, row, texts, owner)}


def _ranks(
    queries: np.ndarray, of: np.ndarray, items: np.ndarray, belong: np.ndarray
) -> np.ndarray:
    """Block by block: all scores at once would fill the memory of large sets."""
    found = []
    for start in range(0, len(queries), _QUERIES):
        block = slice(start, start + _QUERIES)
        true = of[block, None] == belong[None, :]
        found.append(rank_of_best(queries[block] @ items.T, true))
    return np.concatenate(found)


def recall_line(recall: dict[str, float]) -> str:
    """Six recalls for people."""
    return ", ".join(
        f"{way} " + "/".join(f"{recall[f'{way}_R@{k}']:.1f}" for k in CUTOFFS)
        for way in ("t2i", "i2t")
    )

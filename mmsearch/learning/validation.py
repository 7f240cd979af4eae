"""How well a network in training retrieves pairs that it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmsearch.evaluation.ranking import CUTOFFS, rank_of_best, recall_at
from mmsearch.learning.batches import ImageInputs
from mmsearch.learning.losses import Embeddings

#: Pictures that a split needs: the recalls of fewer measure nothing.
LEAST = 10


@dataclass(frozen=True)
class Validation:
    """The pairs that decide which weights are kept; never learned from."""

    images: ImageInputs
    texts: Sequence[torch.Tensor]

    @property
    def owner(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.texts)), [len(texts) for texts in self.texts])


def embed_all(
    network: Any,
    images: ImageInputs,
    texts: Sequence[torch.Tensor],
    device: torch.device,
    block: int = 128,
) -> Embeddings:
    """Unit vectors of all pictures (n, dim) and of all captions (c, dim), on the CPU."""
    network.eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), block):
            rows = range(start, min(start + block, len(images)))
            batch = torch.stack([images.load(row, 0) for row in rows]).to(device)
            found.append(network.encode_image(batch, normalize=True).float().cpu())
        text = [
            network.encode_text(part.to(device), normalize=True).float().cpu()
            for part in torch.cat(list(texts)).split(4 * block)
        ]
    return Embeddings(torch.cat(found), torch.cat(text))


def validate(network: Any, validation: Validation, device: torch.device) -> dict[str, float]:
    """Recall@1/5/10 both ways, in percent, by names such as "t2i_R@1".

    Raises:
        ArithmeticError: the network gives vectors that are no numbers.
    """
    found = embed_all(network, validation.images, validation.texts, device)
    if not (found.image.isfinite().all() and found.text.isfinite().all()):
        raise ArithmeticError("vectors that are not finite")
    return recall_of(found.image.numpy(), found.text.numpy(), validation.owner)


def recall_of(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Recall@1/5/10 both ways of unit vectors; `owner[j]` is the image of text j."""
    return recalls(ranks_of(images, texts, owner))


def recalls(ranks: dict[str, np.ndarray]) -> dict[str, float]:
    """Recall@1/5/10, in percent, of the ranks of both ways."""
    return {
        f"{direction}_R@{k}": recall_at(found, k)
        for direction, found in ranks.items()
        for k in CUTOFFS
    }


def ranks_of(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> dict[str, np.ndarray]:
    """The rank of each query's best true item, both ways."""
    scores = texts @ images.T
    true = owner[:, None] == np.arange(len(images))[None, :]
    return {"t2i": rank_of_best(scores, true), "i2t": rank_of_best(scores.T, true.T)}


def recall_line(recall: dict[str, float]) -> str:
    """Six recalls for people."""
    return ", ".join(
        f"{way} " + "/".join(f"{recall[f'{way}_R@{k}']:.1f}" for k in CUTOFFS)
        for way in ("t2i", "i2t")
    )

"""Learns what the scores of an image and of its captions count, from captions that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from mmsearch.errors import TrainingError, UsageError
from mmsearch.evaluation.comparison import HeldOut, rank_in
from mmsearch.evaluation.ranking import LEAST, Difference, recall_gain, recalls
from mmsearch.networks.fusion import LateFusion
from mmsearch.search.candidates import CandidateScores
from mmsearch.search.fusion import BARE, SOURCES, Weights, calibrated, fuse

_BARE = 0.5  # the share of items that lose their captions when a query is seen again
_STEPS = 200
_NEVER = -1000.0


@dataclass(frozen=True)
class TrainedFusion:
    """What was trained, and what it does on images that were not trained on."""

    weights: Weights
    before: dict[str, float]
    """Recall@1/5/10 in percent with equal weights."""
    after: dict[str, float]
    overall: Difference
    """The difference of the mean of the three, with its 95% interval, in points."""
    trained_on: int
    measured_on: int
    """Queries of each part."""


def train_weights(
    candidates: Sequence[CandidateScores], asked: Sequence[HeldOut], seed: int = 0
) -> TrainedFusion:
    """Weights by the cross-entropy of the true image among those that were found.

    Half of the images teach, the other half measures. Each query is trained on twice: as it
    is, and with the captions of half of the images taken away, so that images without captions
    are weighed as well.

    Args:
        candidates: what the index holds for each of `asked`.

    Raises:
        UsageError: too few queries, or images with captions in the index.
        TrainingError: the weights that came out are no numbers.
    """
    rng = np.random.default_rng(seed)
    media = np.unique([one.media for one in asked])
    teaching = set(media[rng.permutation(len(media)) < len(media) // 2].tolist())
    rows = range(len(asked))
    learn = [row for row in rows if asked[row].media in teaching]
    measure = [row for row in rows if asked[row].media not in teaching]
    tables, true = [], []
    for row in learn:
        one = candidates[row]
        place = np.flatnonzero(one.media == asked[row].media)
        if len(place) and np.isfinite(one.caption[place[0]]):
            whole = calibrated(one)
            bare = np.where(rng.random(whole.shape[1]) < _BARE, np.nan, whole)
            bare[0] = whole[0]
            tables += [whole, bare]
            true += [int(place[0])] * 2
    if len(tables) < 2 * LEAST or len(measure) < LEAST:
        raise UsageError(
            f"{len(tables) // 2} held-out captions whose image is found and has other captions "
            f"teach nothing: at least {LEAST} are needed, and as many to measure on"
        )
    weights = _fit(tables, true)
    old, new = (
        np.array(
            [
                rank_in(candidates[row], fuse(candidates[row], how, weights), asked[row].media)
                for row in measure
            ]
        )
        for how in ("sum", "trained")
    )
    clusters = np.array([asked[row].media for row in measure])
    overall = recall_gain((new, old, clusters))
    return TrainedFusion(weights, recalls(old), recalls(new), overall, len(learn), len(measure))


def _fit(tables: Sequence[np.ndarray], true: Sequence[int]) -> Weights:
    """The weights with the lowest cross-entropy over tables (sources, items)."""
    rows = [torch.from_numpy(table.T).double() for table in tables]
    padded = pad_sequence(rows, batch_first=True, padding_value=torch.nan)
    scores = padded.transpose(1, 2).contiguous()
    target = torch.tensor(true)
    network = LateFusion(len(SOURCES), BARE)
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        # Finite, or the gradient of the scale would be 0 times infinity.
        logits = torch.nan_to_num(network(scores), neginf=_NEVER) * network.log_scale.exp()
        found = torch.nn.functional.cross_entropy(logits, target)
        found.backward()
        return found

    optimizer.step(loss)
    values = network.weights.detach().numpy()
    if not np.isfinite(values).all():
        raise TrainingError("the trained weights are no numbers")
    return Weights(*map(float, values / values.sum()))

"""Learns what "this picture, but ..." means, from drawn scenes and from captioned photos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mmsearch.datasets import scene_art, scene_changes, scenes
from mmsearch.datasets.scene_changes import CHANGES, Triplet
from mmsearch.datasets.scenes import Scene
from mmsearch.encoders.base import Encoder
from mmsearch.errors import TrainingError
from mmsearch.evaluation.ranking import (
    CUTOFFS,
    Difference,
    paired_difference,
    rank_of_best,
    recall_at,
)
from mmsearch.learning.features import Features
from mmsearch.media.image import fit
from mmsearch.networks.early_fusion import EarlyFusion
from mmsearch.search.compose import Composer, late
from mmsearch.types import Ids, Progress, Vectors

#: Drawn triplets to learn from, and of scenes that are held out.
LEARNED, MEASURED = 8000, 1200
PHOTOS = "photo"

_HELD_OUT_SEED = 10_000_000
_HIDDEN, _DROPOUT, _RATE, _DECAY, _WARMUP = 512, 0.5, 1e-3, 0.05, 50
_STEPS, _BATCH, _SCALE = 2500, 256, 20.0
_NEAR = 5  # a photo is the reference of those that are so near to it
_BLOCK = 256

OnProgress = Callable[[Progress], None]
Compose = Callable[[Vectors, Vectors], Vectors]


@dataclass(frozen=True)
class Triplets:
    """References, changes and targets as unit vectors, (n, dim) each, row by row."""

    references: Vectors
    changes: Vectors
    targets: Vectors
    reference_ids: Ids
    target_ids: Ids
    """What references and targets show, (n,): equal where pictures answer to the same words."""
    kinds: tuple[str, ...]
    """The kind of each change."""


@dataclass(frozen=True)
class Composed:
    """What one kind of change is found by: Recall@1/5/10 in percent."""

    kind: str
    queries: int
    late: dict[str, float]
    early: dict[str, float]
    gain: Difference
    """Of the mean of the three, with its 95% interval, in points."""


@dataclass(frozen=True)
class ComposeLearned:
    """What was learned, and what it does on pictures that nothing was learned from."""

    weights: dict[str, NDArray[np.float16]]
    measured: tuple[tuple[Composed, ...], ...]
    """On drawn scenes, and on photos where there are some: by kind of change, over all last."""

    @property
    def is_gain(self) -> bool:
        """Whether it finds more than the plain way, wherever it was measured."""
        return all(part[-1].gain.is_gain for part in self.measured)


def learn_compose(
    encoder: Encoder,
    photos: Features | None,
    seed: int = 0,
    on_progress: OnProgress = lambda progress: None,
) -> ComposeLearned:
    """A network for an encoder's space, learned in minutes; the same seed gives the same.

    Args:
        encoder: stays as it is.
        photos: captioned photos of the same space to learn from too.

    Raises:
        TrainingError: what came out are no numbers.
    """
    drawn = drawn_triplets(encoder, LEARNED, on_progress, held_out=False)
    unseen = drawn_triplets(encoder, MEASURED, on_progress, held_out=True)
    learn, measure = [drawn], [unseen]
    if photos is not None:
        learn.append(photo_triplets(photos.of("train")))
        measure.append(photo_triplets(photos.of("test")))
    network = fit_network(learn, seed, on_progress)
    weights = {n: v.detach().half().numpy() for n, v in network.state_dict().items()}
    if not all(np.isfinite(value).all() for value in weights.values()):
        raise TrainingError("the network that was learned holds values that are no numbers")
    composer = Composer(weights)  # what is measured is what is kept
    return ComposeLearned(weights, tuple(compare(part, composer) for part in measure))


def drawn_triplets(
    encoder: Encoder, count: int, on_progress: OnProgress, *, held_out: bool
) -> Triplets:
    """Triplets of drawn scenes, the same each time.

    Args:
        held_out: of targets that are held out; else neither target nor reference is.
    """
    chosen = list(changes(count, held_out=held_out))
    ids: dict[Scene, int] = {}

    def id_of(scene: Scene) -> int:
        return ids.setdefault(scenes.meaning(scene), len(ids))

    pictures = [one.reference for one in chosen] + [one.target for one in chosen]
    job = "drawing what is held out" if held_out else "drawing"
    vectors = _draw(encoder, pictures, lambda n: on_progress(Progress(job, n, len(pictures))))
    words = [
        encoder.encode_texts([one.words for one in chosen[start : start + _BLOCK]])
        for start in range(0, count, _BLOCK)
    ]
    return Triplets(
        vectors[:count],
        np.concatenate(words),
        vectors[count:],
        np.array([id_of(one.reference) for one in chosen]),
        np.array([id_of(one.target) for one in chosen]),
        tuple(one.kind for one in chosen),
    )


def changes(count: int, *, held_out: bool) -> Iterator[Triplet]:
    """So many changes, the same each time: to held-out scenes, or with none of them."""
    seed = _HELD_OUT_SEED if held_out else 0
    while count:
        found = scene_changes.triplet(seed)
        seed += 1
        target = scene_changes.is_held_out(found.target)
        if target if held_out else not (target or scene_changes.is_held_out(found.reference)):
            yield found
            count -= 1


def _draw(encoder: Encoder, pictures: Sequence[Scene], told: Callable[[int], None]) -> Vectors:
    how, found = encoder.spec.preprocess, []
    for start in range(0, len(pictures), _BLOCK):
        block = pictures[start : start + _BLOCK]
        pixels = np.stack([fit(scene_art.render(scene), how) for scene in block])
        found.append(encoder.encode_images(pixels))
        told(start + len(block))
    return np.concatenate(found)


def photo_triplets(photos: Features) -> Triplets:
    """Each caption as a change that leads to its photo, from another that shows nearly the same.

    That is one of the five whose captions are the nearest in meaning.
    """
    count = len(photos.images)
    means = np.zeros((count, photos.texts.shape[1]), np.float32)
    np.add.at(means, photos.owner, photos.texts)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    nearest = np.empty((count, min(_NEAR, count - 1)), np.int64)
    for start in range(0, count, _BLOCK):
        cosines = means[start : start + _BLOCK] @ means.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -np.inf
        nearest[start : start + _BLOCK] = np.argsort(-cosines, axis=1)[:, : nearest.shape[1]]
    # The first caption of a photo starts from the nearest, the second from the next.
    first = np.searchsorted(photos.owner, photos.owner)
    place = (np.arange(len(photos.owner)) - first) % nearest.shape[1]
    reference = nearest[photos.owner, place]
    return Triplets(
        photos.images[reference],
        photos.texts,
        photos.images[photos.owner],
        reference,
        photos.owner,
        (PHOTOS,) * len(photos.owner),
    )


def fit_network(
    parts: Sequence[Triplets], seed: int, on_progress: OnProgress = lambda progress: None
) -> EarlyFusion:
    """The network that finds the targets among the targets and references of a batch.

    The parts take turns, so that each counts alike. What answers to the same words as the target
    is not held against it.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    dim = parts[0].references.shape[1]
    network = EarlyFusion(dim, _HIDDEN, _DROPOUT)
    log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
    optimizer = torch.optim.AdamW([*network.parameters(), log_scale], lr=_RATE, weight_decay=_DECAY)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / _STEPS)) / 2,
    )
    batches = [_batches(part, rng) for part in parts]
    for step in range(_STEPS):
        part, rows = next(batches[step % len(parts)])
        reference, change, target = (
            torch.from_numpy(vectors[rows])
            for vectors in (part.references, part.changes, part.targets)
        )
        shown = np.concatenate([part.target_ids[rows], part.reference_ids[rows]])
        alike = torch.from_numpy(shown[None, :] == part.target_ids[rows][:, None])
        alike.fill_diagonal_(False)
        cosines = network(reference, change) @ torch.cat([target, reference]).T
        logits = (cosines * log_scale.exp()).masked_fill(alike, -torch.inf)
        loss = nn.functional.cross_entropy(logits, torch.arange(len(rows)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        on_progress(Progress("learning", step + 1, _STEPS))
    return network.eval()


def _batches(
    part: Triplets, rng: np.random.Generator
) -> Iterator[tuple[Triplets, NDArray[np.int64]]]:
    size = min(_BATCH, len(part.kinds))
    while True:
        order = rng.permutation(len(part.kinds))
        for start in range(0, len(order) - size + 1, size):
            yield part, order[start : start + size]


def ranks_of(
    part: Triplets, compose: Compose, *, without_reference: bool = False
) -> NDArray[np.int64]:
    """The rank of each target among all that the triplets show, (n,).

    Args:
        without_reference: leave a query's own reference out of what is found.
    """
    shown = np.concatenate([part.target_ids, part.reference_ids])
    ids, first = np.unique(shown, return_index=True)
    gallery = np.concatenate([part.targets, part.references])[first]
    found = []
    for start in range(0, len(part.kinds), _BLOCK):
        block = slice(start, start + _BLOCK)
        cosines = compose(part.references[block], part.changes[block]) @ gallery.T
        if without_reference:
            cosines[part.reference_ids[block][:, None] == ids[None, :]] = -np.inf
        found.append(rank_of_best(cosines, part.target_ids[block][:, None] == ids[None, :]))
    return np.concatenate(found)


def compare(part: Triplets, compose: Compose) -> tuple[Composed, ...]:
    """Each kind of change alone, where there are several, and all together, which comes last."""
    old, new = ranks_of(part, late), ranks_of(part, compose)
    kinds = np.array(part.kinds)
    every = np.ones(len(kinds), bool)
    groups: dict[str, NDArray[np.bool_]] = {
        kind: kinds == kind for kind in CHANGES if (kinds == kind).any()
    }
    groups["all photos" if PHOTOS in part.kinds else "all drawn scenes"] = every
    found = []
    for name, rows in groups.items():
        by_query = [
            (100.0 * (new[rows] <= k) - 100.0 * (old[rows] <= k), part.target_ids[rows])
            for k in CUTOFFS
        ]
        before, after = (
            {f"R@{k}": recall_at(ranks[rows], k) for k in CUTOFFS} for ranks in (old, new)
        )
        gain = paired_difference(*by_query)
        found.append(Composed(name, int(rows.sum()), before, after, gain))
    return tuple(found)

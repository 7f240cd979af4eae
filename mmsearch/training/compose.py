"""Learns what "this picture, but ..." means, from drawn scenes and from captioned photos."""

from __future__ import annotations

import itertools
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
from mmsearch.errors import UsageError
from mmsearch.evaluation.ranking import Difference, rank_of_best, recall_gain, recalls
from mmsearch.media.fit import fit
from mmsearch.networks.fusion import EarlyFusion
from mmsearch.search.compose import Composer, weighted_sum
from mmsearch.search.trained import Network
from mmsearch.training.sets import Features
from mmsearch.training.trained import cosine_steps, export_network
from mmsearch.types import Ids, OnProgress, Progress, Vectors, no_progress

PHOTOS = "photo"

_HELD_OUT_SEED = 10_000_000
_HIDDEN, _DROPOUT, _RATE, _DECAY, _WARMUP = 512, 0.5, 1e-3, 0.05, 50
_BATCH, _SCALE = 256, 20.0
#: The length of the noise on a photo's caption, which is 1 long: a model has mostly learned from
#: captions like those, and the network would trust them more than it should trust others.
_NOISE = 1.0
_NEAR = 5  # a photo is the reference of those that are so near to it
_BLOCK = 256
_PICTURES = 64

Compose = Callable[[Vectors, Vectors], Vectors]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, and how much of it is measured."""

    #: Drawn triplets to train on, and of scenes that are held out.
    trained_on: int = 8000
    measured_on: int = 1200
    #: Batches.
    steps: int = 2500
    #: So many points less than the plain ways find in photos are as good.
    margin: float = 1.0


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
    targets: int
    """How many different ones: what the intervals are over."""
    text: dict[str, float]
    """By the change alone."""
    sum: dict[str, float]
    early: dict[str, float]
    over: str
    """What early is compared with: "text" or "sum", whichever finds more."""
    gain: Difference
    """Of the mean of the three over that, with its 95% interval, in points."""


@dataclass(frozen=True)
class TrainedComposer:
    """What was trained, and what it does for changes to what it was not trained on."""

    network: Network
    drawn: tuple[Composed, ...]
    """On drawn scenes: by kind of change, and over all."""
    photos: Composed | None
    """On photos, where there are some."""
    margin: float  # `Recipe.margin`

    @property
    def is_gain(self) -> bool:
        """Whether it finds more drawn scenes than the plain ways."""
        return self.drawn[-1].gain.is_gain

    @property
    def is_for_photos(self) -> bool:
        """Whether photos have shown that it finds no less: a point is within what is allowed."""
        return self.photos is not None and self.photos.gain.low > -self.margin


def train_composer(
    encoder: Encoder,
    photos: Features | None,
    seed: int = 0,
    on_progress: OnProgress = no_progress,
    recipe: Recipe | None = None,
) -> TrainedComposer:
    """A network for an encoder's space, trained in minutes; the same seed gives the same.

    Args:
        encoder: stays as it is.
        photos: captioned photos of the same space to train on too.
        recipe: fewer triplets and steps take less time and teach less; None is the usual one.

    Raises:
        UsageError: photos that all have the same captions.
        TrainingError: what came out are no numbers, or OpenVINO computes something else.
    """
    recipe = recipe or Recipe()
    learn = [drawn_triplets(encoder, recipe.trained_on, on_progress, held_out=False)]
    unseen = drawn_triplets(encoder, recipe.measured_on, on_progress, held_out=True)
    test = None
    if photos is not None:  # before anything is learned: these may be of no use
        learn.append(photo_triplets(photos.of("train")))
        test = photo_triplets(photos.of("test"))
    network = export_composer(fit_network(learn, seed, on_progress, recipe.steps))
    composer = Composer(network, encoder.spec.dim)  # what is measured is what is kept
    return TrainedComposer(
        network,
        compare(unseen, composer),
        compare(test, composer)[-1] if test is not None else None,
        recipe.margin,
    )


def export_composer(network: EarlyFusion) -> Network:
    """The network as searches run it."""
    dim = network.image.in_features
    examples = torch.nn.functional.normalize(torch.randn(2, 3, dim), dim=-1)
    return export_network(network, tuple(examples), ([-1, dim], [-1, dim]))


def drawn_triplets(
    encoder: Encoder, count: int, on_progress: OnProgress, *, held_out: bool
) -> Triplets:
    """Triplets of drawn scenes, the same each time.

    Args:
        held_out: of targets that are held out; else neither target nor reference is.
    """
    chosen = list(changes(count, held_out=held_out))
    pictures = [one.reference for one in chosen] + [one.target for one in chosen]
    numbers: dict[Scene, int] = {}
    ids = np.array([numbers.setdefault(scenes.meaning(one), len(numbers)) for one in pictures])
    job = "drawing what is held out" if held_out else "drawing"
    found = []
    for start in range(0, len(pictures), _PICTURES):
        block = pictures[start : start + _PICTURES]
        pixels = np.stack([fit(scene_art.render(one), encoder.spec.preprocess) for one in block])
        found.append(encoder.encode("image", pixels))
        on_progress(Progress(job, start + len(block), len(pictures)))
    vectors = np.concatenate(found)
    words = [
        encoder.encode("text", [one.words for one in chosen[start : start + _BLOCK]])
        for start in range(0, count, _BLOCK)
    ]
    return Triplets(
        vectors[:count],
        np.concatenate(words),
        vectors[count:],
        ids[:count],
        ids[count:],
        tuple(one.kind for one in chosen),
    )


def changes(count: int, *, held_out: bool) -> Iterator[Triplet]:
    """So many changes, the same each time: to held-out scenes, or with none of them."""
    made = map(scene_changes.triplet, itertools.count(_HELD_OUT_SEED if held_out else 0))

    def fits(one: Triplet) -> bool:
        target = scene_changes.is_held_out(one.target)
        return target if held_out else not (target or scene_changes.is_held_out(one.reference))

    return itertools.islice(filter(fits, made), count)


def photo_triplets(photos: Features) -> Triplets:
    """Each caption as a change that leads to its photo, from another that shows nearly the same.

    That is one of the five whose captions are the nearest in meaning, of those that have no
    caption in common with it: those answer to the same words.

    Raises:
        UsageError: all of the photos have the same captions.
    """
    ids = _ids_by_caption(photos)
    means = np.zeros((len(ids), photos.texts.shape[1]), np.float32)
    np.add.at(means, photos.owner, photos.texts)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    nearest = np.empty((len(ids), min(_NEAR, len(ids) - 1)), np.int64)
    others = np.empty(nearest.shape, bool)
    for start in range(0, len(ids), _BLOCK):
        block = slice(start, start + _BLOCK)
        cosines = means[block] @ means.T
        cosines[ids[block][:, None] == ids[None, :]] = -np.inf
        nearest[block] = np.argsort(-cosines, axis=1)[:, : nearest.shape[1]]
        others[block] = np.isfinite(np.take_along_axis(cosines, nearest[block], axis=1))
    # The first caption of a photo starts from the nearest, the second from the next.
    first = np.searchsorted(photos.owner, photos.owner)
    choice = np.maximum(others.sum(axis=1), 1)[photos.owner]
    place = (np.arange(len(photos.owner)) - first) % choice
    reference = nearest[photos.owner, place]
    kept = others[photos.owner, place]
    if not kept.any():
        raise UsageError("the photos all have the same captions: they tell no changes")
    owner = photos.owner[kept]
    return Triplets(
        photos.images[reference[kept]],
        photos.texts[kept],
        photos.images[owner],
        ids[reference[kept]],
        ids[owner],
        (PHOTOS,) * len(owner),
    )


def _ids_by_caption(photos: Features) -> Ids:
    """A number for each photo, (n,): one for all that are joined by equal captions."""
    ids = np.arange(len(photos.images))
    _, text = np.unique(photos.texts, axis=0, return_inverse=True)
    order = np.argsort(text.reshape(-1), kind="stable")
    bounds = np.flatnonzero(np.diff(text.reshape(-1)[order])) + 1
    for rows in np.split(order, bounds):
        joined = np.unique(ids[photos.owner[rows]])
        if len(joined) > 1:
            ids[np.isin(ids, joined)] = joined[0]
    return ids


def fit_network(
    parts: Sequence[Triplets],
    seed: int,
    on_progress: OnProgress = no_progress,
    steps: int = Recipe.steps,
) -> EarlyFusion:
    """The network that finds the targets among the targets and references of a batch.

    Each part has its share of the steps, drawn scenes at least a half. What answers to the same
    words as the target is not held against it.

    Args:
        parts: drawn scenes first.
        steps: how many batches it learns from.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    dim = parts[0].references.shape[1]
    network = EarlyFusion(dim, _HIDDEN, _DROPOUT)
    log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
    optimizer = torch.optim.AdamW([*network.parameters(), log_scale], lr=_RATE, weight_decay=_DECAY)
    batches = [_batches(part, rng) for part in parts]
    sizes = np.array([len(part.kinds) for part in parts])
    share = sizes / sizes.sum()
    share[0] = max(0.5, share[0])
    share[1:] *= (1 - share[0]) / max(share[1:].sum(), 1e-12)
    for _ in cosine_steps(optimizer, steps, _WARMUP, on_progress):
        part, rows = next(batches[rng.choice(len(parts), p=share)])
        reference, change, target = (
            torch.from_numpy(vectors[rows])
            for vectors in (part.references, part.changes, part.targets)
        )
        if part.kinds[0] == PHOTOS:
            noisy = change + torch.randn_like(change) * (_NOISE / math.sqrt(dim))
            change = nn.functional.normalize(noisy, dim=-1)
        shown = np.concatenate([part.target_ids[rows], part.reference_ids[rows]])
        alike = torch.from_numpy(shown[None, :] == part.target_ids[rows][:, None])
        alike.fill_diagonal_(False)
        cosines = network(reference, change) @ torch.cat([target, reference]).T
        logits = (cosines * log_scale.exp()).masked_fill(alike, -torch.inf)
        loss = nn.functional.cross_entropy(logits, torch.arange(len(rows)))
        loss.backward()
        optimizer.step()
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

    Of what is shown in several pictures one is there; of what a query starts from and of what it
    is to find, those pictures.

    Args:
        without_reference: leave what a query starts from out.
    """
    shown = np.concatenate([part.target_ids, part.reference_ids])
    ids, first = np.unique(shown, return_index=True)
    gallery = np.concatenate([part.targets, part.references])[first]
    found = []
    for start in range(0, len(part.kinds), _BLOCK):
        block = slice(start, start + _BLOCK)
        queries = compose(part.references[block], part.changes[block])
        cosines = queries @ gallery.T
        reference = part.reference_ids[block][:, None] == ids[None, :]
        target = part.target_ids[block][:, None] == ids[None, :]
        cosines[target] = (queries * part.targets[block]).sum(axis=1)
        cosines[reference] = (queries * part.references[block]).sum(axis=1)
        if without_reference:
            cosines[reference] = -np.inf
        found.append(rank_of_best(cosines, target))
    return np.concatenate(found)


def compare(part: Triplets, compose: Compose) -> tuple[Composed, ...]:
    """Each kind of change alone, where there are several, and all together, which comes last.

    What a query starts from is among what is found.
    """
    ranks = {
        "text": ranks_of(part, lambda image, text: text),
        "sum": ranks_of(part, weighted_sum),
        "early": ranks_of(part, compose),
    }
    kinds = np.array(part.kinds)
    groups: dict[str, NDArray[np.bool_]] = {k: kinds == k for k in CHANGES if (kinds == k).any()}
    everything = "all photos" if PHOTOS in part.kinds else "all drawn scenes"
    groups[everything] = np.ones(len(kinds), bool)
    found = []
    for name, rows in groups.items():
        by_way = {way: recalls(found_at[rows]) for way, found_at in ranks.items()}
        over = max(("text", "sum"), key=lambda way: sum(by_way[way].values()))
        clusters = part.target_ids[rows]
        gain = recall_gain((ranks["early"][rows], ranks[over][rows], clusters))
        targets = len(np.unique(clusters))
        found.append(Composed(name, int(rows.sum()), targets, **by_way, over=over, gain=gain))
    return tuple(found)

"""Trains what texts and images match by, on captioned photos; the model itself stays as it is.

It is trained on the patches of augmented photos, and tokens of their captions. A batch
holds photos that look alike, so that its captions have hard negatives: the nearest neighbours by
the dual encoder's own vectors. All pairs of a batch are scored, and each caption has to find its
photo, each photo its caption.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.transforms import v2

from mmsearch.config import available_cores
from mmsearch.encoders.base import Encoder
from mmsearch.encoders.patch_encoder import PatchEncoder
from mmsearch.errors import LabelsError
from mmsearch.evaluation.ranking import Difference, rank_of_best, recall_gain, recalls
from mmsearch.networks.matching import CrossAttention, LateInteraction
from mmsearch.search.rerank import Kind, Mix, Parts, Reranker, nearness, tokens_of
from mmsearch.search.trained import Network
from mmsearch.store.patches import pack_patches, unpack_patches
from mmsearch.training.batches import seed_of
from mmsearch.training.runs import remembered
from mmsearch.training.sets import embed_texts
from mmsearch.training.trained import cosine_steps, export_network
from mmsearch.training.views import decoders, open_picture, stamps
from mmsearch.types import OnProgress, Progress, Vectors, no_progress

#: Captions that hubness is measured with.
CAPTIONS = 2000
HEADS = 4
_TEMPERATURE = 20.0  # exp(temperature * cosine) says how near a caption is

_HUBNESS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MATCH = (0.0, 1 / 160, 1 / 120, 1 / 80, 1 / 60, 1 / 40, 1 / 30, 1 / 20)
_PICTURES, _TEXTS = 32, 256
_WARMUP, _DECAY, _WORD_DROP = 100, 0.1, 0.1
_AVERAGE = 0.99
#: Bumped when views are made in another way, or kept in another.
_VIEWS_VERSION = 1
#: The shares of captions that are as good as strange, and that are not quite familiar.
_FAMILIAR = (0.01, 0.1)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""

    epochs: int
    batch: int
    alike: int
    """How many photos of a batch look alike; 1 takes them at random."""
    rate: float = 1e-3
    views: int = 4
    """Augmented views of every photo that is trained on."""


RECIPES: dict[Kind, Recipe] = {
    "interaction": Recipe(epochs=6, batch=128, alike=1),
    # A pair costs far more, so that batches are smaller, and made harder for that.
    "attention": Recipe(epochs=6, batch=32, alike=4),
}


@dataclass(frozen=True)
class Photos:
    """Captioned photos to train on."""

    patches: list[list[bytes]]
    """For each view, the packed patches of every photo."""
    vectors: Vectors
    """The mean of a photo's views, (n, dim)."""
    tokens: list[NDArray[np.float16]]
    """Each caption's tokens, (l, dim)."""
    captions: Vectors
    """Each caption's vector, (c, dim)."""
    owner: NDArray[np.int64]
    """The photo of each caption, (c,), ascending."""


def embed_photos(
    encoder: Encoder,
    patch_encoder: PatchEncoder,
    files: Sequence[Path],
    captions: Sequence[Sequence[str]],
    cache: Path,
    seed: int,
    on_progress: OnProgress = no_progress,
    views: int = Recipe.views,
) -> Photos:
    """Embeds photos and their captions; patches come from `cache` where they were kept.

    Args:
        views: how many augmented views of each photo (`Recipe.views`).

    Raises:
        LabelsError: none of the photos can be used.
    """
    seen = [
        _embed_view(patch_encoder, files, cache, seed, number, views, on_progress)
        for number in range(views)
    ]
    good = [place for place in range(len(files)) if all(view[place] for view in seen)]
    if not good:
        raise LabelsError(f"none of the {len(files)} photos to train on can be used")
    patches = [[view[place] for place in good] for view in seen]
    texts = [text for place in good for text in captions[place]]
    owner = np.repeat(np.arange(len(good)), [len(captions[place]) for place in good])
    dim = encoder.spec.dim
    # The vectors of packed patches stand before these.
    vectors = [[np.frombuffer(one, "<f2", dim) for one in view] for view in patches]
    mean = np.mean(np.array(vectors, np.float32), axis=0)
    tokens: list[NDArray[np.float16]] = []
    for start in range(0, len(texts), _TEXTS):
        found = tokens_of(patch_encoder.tokens(texts[start : start + _TEXTS]))
        tokens += [rows.astype(np.float16) for rows in found]
        on_progress(Progress("reading captions", start + len(found), len(texts)))
    captioned = embed_texts(encoder, texts, cache, "embedding captions", on_progress)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return Photos(patches, unit.astype(np.float32), tokens, captioned, owner)


def _embed_view(
    patch_encoder: PatchEncoder,
    files: Sequence[Path],
    cache: Path,
    seed: int,
    number: int,
    count: int,
    on_progress: OnProgress,
) -> list[bytes]:
    """Packed patches of one of `count` augmented views of each photo; empty if it is of no use."""
    height, width = patch_encoder.preprocess.size
    augment = v2.Compose(
        [
            v2.RandomResizedCrop((height, width), scale=(0.4, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.3, 0.3, 0.3)], p=0.8),
            v2.RandomGrayscale(0.05),
        ]
    )

    def opened(file: Path) -> torch.Tensor | None:
        try:
            image = open_picture(file, max(height, width))
        except LabelsError:
            return None
        pixels: torch.Tensor = v2.functional.pil_to_tensor(image)
        return pixels

    def embed(part: Sequence[Path], start: int) -> dict[str, torch.Tensor]:
        found: list[bytes] = []
        with decoders().threads(available_cores()) as pool:
            for first in range(0, len(part), _PICTURES):
                images = list(pool.map(opened, part[first : first + _PICTURES]))
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed_of(seed, number, start + first))
                    views = [augment(image) for image in images if image is not None]
                packed: list[bytes] = []
                if views:
                    pixels = torch.stack(views).permute(0, 2, 3, 1).contiguous().numpy()
                    patches = patch_encoder.encode(pixels)
                    packed = pack_patches(patches.vectors, patches.patches)
                found += [packed.pop(0) if image is not None else b"" for image in images]
                done = start + first + len(images)
                on_progress(
                    Progress(f"embedding patches, view {number + 1} of {count}", done, len(files))
                )
        size = max(map(len, found), default=0)
        rows = [np.frombuffer(one.ljust(size, b"\0"), np.uint8) for one in found]
        good = torch.tensor([bool(one) for one in found])
        return {"patches": torch.from_numpy(np.stack(rows)), "good": good.to(torch.uint8)}

    def about(part: Sequence[Path], start: int) -> Any:
        how = [_VIEWS_VERSION, patch_encoder.spec.space, patch_encoder.preprocess.size]
        return [*how, seed, number, start, stamps(part)]

    return [
        row.tobytes() if good else b""
        for made in remembered(cache, "patches", files, about, embed)
        for row, good in zip(made["patches"].numpy(), made["good"].tolist(), strict=True)
    ]


def fit_network(
    photos: Photos,
    kind: Kind,
    seed: int,
    recipe: Recipe | None = None,
    on_progress: OnProgress = no_progress,
) -> nn.Module:
    """A network that tells which captions and photos match; the same seed gives the same.

    What is returned is the running average of its weights (Polyak and Juditsky 1992).
    """
    recipe = recipe or RECIPES[kind]
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    dim = photos.vectors.shape[1]
    network = CrossAttention(dim, heads=HEADS) if kind == "attention" else LateInteraction(dim)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.rate, weight_decay=_DECAY, betas=(0.9, 0.98)
    )
    per_epoch = max(1, len(photos.vectors) // recipe.batch)
    batches = batches_of(photos, recipe, rng)
    for step in cosine_steps(optimizer, recipe.epochs * per_epoch, _WARMUP, on_progress):
        scores = _scores(network, photos, next(batches), rng)
        target = torch.arange(len(scores))
        loss = nn.functional.cross_entropy(scores, target)
        loss = (loss + nn.functional.cross_entropy(scores.T, target)) / 2
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        update = get_ema_multi_avg_fn(_AVERAGE if step > _WARMUP else 0.9)
        update(list(average.parameters()), list(network.parameters()), 0)
    return average.eval()


class _Scoring(nn.Module):
    """What `mmsearch.search.rerank.Scoring` says: matching scores, and hubness."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        tokens: torch.Tensor,
        patches: torch.Tensor,
        vectors: torch.Tensor,
        captions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        there = torch.ones(1, tokens.shape[0], dtype=torch.bool)
        match = self.network(tokens[None], there, patches)[0]
        near = (_TEMPERATURE * (vectors @ captions.T)).exp().mean(dim=1)
        return match, near.log() / _TEMPERATURE


def export_scoring(network: nn.Module, dim: int) -> Network:
    """A network that tells what matches, and hubness beside it, as searches run them."""
    sizes = (4, dim), (3, 5, dim), (3, dim), (6, dim)
    shapes = [-1, dim], [-1, -1, dim], [-1, dim], [-1, dim]
    examples = [nn.functional.normalize(torch.randn(size), dim=-1) for size in sizes]
    return export_network(_Scoring(network), examples, shapes)


def _scores(
    network: nn.Module, photos: Photos, rows: NDArray[np.int64], rng: np.random.Generator
) -> torch.Tensor:
    """Scores of all pairs of some photos and one caption of each, (n, n)."""
    dim = photos.vectors.shape[1]
    view = photos.patches[rng.integers(len(photos.patches))]
    _, patches = unpack_patches([view[row] for row in rows.tolist()], dim)
    first = np.searchsorted(photos.owner, rows)
    last = np.searchsorted(photos.owner, rows, side="right")
    chosen = [photos.tokens[place] for place in rng.integers(first, last).tolist()]
    tokens = pad_sequence([torch.from_numpy(one).float() for one in chosen], batch_first=True)
    there = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    for place, one in enumerate(chosen):
        # Words are left out now and then; the first and the last token are no words.
        kept = rng.random(len(one)) >= _WORD_DROP
        kept[0] = kept[-1] = True
        there[place, : len(one)] = torch.from_numpy(kept)
    with torch.autocast("cpu", torch.bfloat16):
        found: torch.Tensor = network(tokens, there, torch.from_numpy(patches))
    return found.float()


def batches_of(
    photos: Photos, recipe: Recipe, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Rows of photos, for ever: groups that look alike, every photo once an epoch."""
    count = len(photos.vectors)
    batch = min(recipe.batch, count)
    near = neighbours(photos.vectors, 15) if recipe.alike > 1 else None
    while True:
        order = rng.permutation(count)
        if near is not None:
            order = _grouped(order, near, recipe.alike, rng)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]


def neighbours(vectors: Vectors, count: int) -> NDArray[np.int64]:
    """The nearest others of each row, (n, count)."""
    found = []
    for start in range(0, len(vectors), 1024):
        cosines = vectors[start : start + 1024] @ vectors.T
        cosines[np.arange(len(cosines)), np.arange(start, start + len(cosines))] = -np.inf
        found.append(np.argpartition(-cosines, min(count, cosines.shape[1] - 1), axis=1)[:, :count])
    return np.concatenate(found)


def _grouped(
    order: NDArray[np.int64], near: NDArray[np.int64], size: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """An order in which rows stand beside some of their neighbours that are still free."""
    free = np.ones(len(order), bool)
    groups = []
    for row in order.tolist():
        if not free[row]:
            continue
        around = near[row][free[near[row]]]
        around = around[around != row]
        group = [row, *rng.permutation(around)[: size - 1].tolist()]
        free[group] = False
        groups.append(group)
    places = [row for group in rng.permutation(len(groups)) for row in groups[group]]
    return np.array(places, np.int64)


def familiar_from(queries: Vectors, captions: Vectors) -> tuple[float, float]:
    """How near to the captions a query has to be for hubness to count at all, and in full.

    Args:
        queries: those of photos that were not trained on, (n, dim).
    """
    low, high = np.quantile(nearness(queries, captions), _FAMILIAR)
    return float(low), float(high)


# -- how the parts are put together -----------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """What the first search found for one caption, and what re-ranking makes of it."""

    media: int
    """The photo that is sought."""
    found: NDArray[np.int64]
    """The media that were found, (n,)."""
    cosines: NDArray[np.floating]
    """Those that they were found by, (n,)."""
    parts: Parts


@dataclass(frozen=True)
class TrainedReranker:
    """What was trained, and what it does for photos that were not trained on."""

    kind: Kind
    network: Network
    reranker: Reranker
    queries: int
    recalls: dict[str, dict[str, float]]
    """Recall@1/5/10 in percent: "first" as found, then by each part on top of the others."""
    gain: Difference
    """Of the mean of the three over the first search, in points, with its 95% interval."""


STEPS = ("first", "test-time augmentation", "hubness", "match")


def choose_mix(candidates: Sequence[Candidates]) -> Mix:
    """The mix with the highest mean of Recall@1/5/10."""
    tried = [Mix(hubness, match) for hubness in _HUBNESS for match in _MATCH]
    means = [np.mean(list(recalls(ranks_of(candidates, mix)).values())) for mix in tried]
    return tried[int(np.argmax(means))]


def ranks_of(candidates: Sequence[Candidates], mix: Mix | None) -> NDArray[np.int64]:
    """The rank of each photo that is sought, by a mix or as found; far where it was not found."""
    ranks = np.full(len(candidates), 10**6)
    for place, one in enumerate(candidates):
        true = one.found == one.media
        if true.any():
            scores = one.cosines if mix is None else mix.of(one.parts)
            ranks[place] = rank_of_best(scores[None].astype(np.float64), true[None])[0]
    return ranks


def measure(
    candidates: Sequence[Candidates], mix: Mix
) -> tuple[dict[str, dict[str, float]], Difference]:
    """The recalls by each part on top of the others, and the gain of all of them."""
    mixes = (None, Mix(0.0, 0.0), Mix(mix.hubness, 0.0), mix)
    ranks = {step: ranks_of(candidates, one) for step, one in zip(STEPS, mixes, strict=True)}
    media = np.array([one.media for one in candidates])
    gain = recall_gain((ranks["match"], ranks["first"], media))
    return {step: recalls(one) for step, one in ranks.items()}, gain

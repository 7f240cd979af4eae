"""Batches drawn from several labelled sets, each a function of the seed and the step alone.

Nothing of a batch depends on what was drawn before it, so a run that goes on at step n sees
what a run without a break would have seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from mmsearch.errors import MmsearchError, UsageError
from mmsearch.jobs.runner import parts


class ImageInputs(Protocol):
    """What the image tower takes, picture by picture, augmented as the seed says."""

    def __len__(self) -> int: ...

    def load(self, place: int, seed: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Taught:
    """A teacher's unit vectors: images (n, d), and for each image its captions' (captions, d)."""

    images: torch.Tensor
    texts: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Source:
    """Pictures with their captions, ready for the towers."""

    name: str
    images: ImageInputs
    texts: Sequence[torch.Tensor]
    """For each picture, its captions as the text tower takes them, (captions, ...)."""
    weight: float = 1.0
    """Its share of every batch, against the others'."""
    teacher: Taught | None = None

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.texts)


class Row(NamedTuple):
    """One pair of a batch."""

    source: int
    place: int
    seed: int
    """Decides which caption, which view and which words are left out."""


class Example(NamedTuple):
    """One pair as tensors, or a batch of them; a teacher's are empty where there is none."""

    image: torch.Tensor
    text: torch.Tensor
    teacher_image: torch.Tensor
    teacher_text: torch.Tensor


class Plan:
    """Which pairs make which batch. Every source is gone through without repeats, pass by pass."""

    def __init__(self, sources: Sequence[Source], batch: int, seed: int) -> None:
        self._sizes = [len(source.images) for source in sources]
        self._seed = seed
        weights = [source.weight for source in sources]
        self.rows = [int(batch * weight / sum(weights)) for weight in weights]
        self.rows[0] += batch - sum(self.rows)  # what is left
        for source, rows in zip(sources, self.rows, strict=True):
            if not rows:
                raise UsageError(
                    f"{source.name}: its weight gives it no row of a batch of {batch}: a larger "
                    "batch, or a larger weight"
                )
            if len(source.images) < rows:
                raise UsageError(
                    f"{source.name} has {len(source.images)} pictures, fewer than the {rows} that "
                    "a batch takes from it: a smaller batch, or a smaller weight"
                )
        # A pass is over whole batches, so that no picture stands twice in one: its second
        # caption would be a false negative.
        self._batches = [size // rows for size, rows in zip(self._sizes, self.rows, strict=True)]
        self.steps_per_epoch = self._batches[0]  # a pass over the first source
        self._order = functools.lru_cache(maxsize=2 * len(sources))(self._shuffled)

    def batch(self, step: int) -> list[Row]:
        """The pairs of one global batch."""
        found: list[Row] = []
        for source, rows in enumerate(self.rows):
            turn, start = divmod(step, self._batches[source])
            places = self._order(source, turn)[start * rows : (start + 1) * rows]
            seeds = np.random.default_rng([self._seed, 1, source, step]).integers(2**62, size=rows)
            found += [Row(source, int(p), int(s)) for p, s in zip(places, seeds, strict=True)]
        return found

    def _shuffled(self, source: int, turn: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 0, source, turn]).permutation(self._sizes[source])


def seed_of(*key: int) -> int:
    """A seed that torch takes, another for every key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Examples:
    """The pairs of all sources, by row."""

    def __init__(self, sources: Sequence[Source], word_drop: float = 0.0) -> None:
        self._sources = sources
        self._word_drop = word_drop

    def __getitem__(self, row: Row) -> Example:
        source = self._sources[row.source]
        rng = np.random.default_rng([row.seed])
        texts = source.texts[row.place]
        which = int(rng.integers(len(texts)))
        text = texts[which]
        if self._word_drop:
            text = drop_words(text, self._word_drop, rng)
        image = source.images.load(row.place, int(rng.integers(2**62)))
        taught = source.teacher
        if taught is None:
            return Example(image, text, torch.empty(0), torch.empty(0))
        return Example(image, text, taught.images[row.place], taught.texts[row.place][which])


def drop_words(
    tokens: torch.Tensor, share: float, rng: np.random.Generator | None = None
) -> torch.Tensor:
    """Token ids (length,) without a random share of those between the first and the last.

    No word is relied on then; a text of one word keeps it. Behind the last token stand zeros.
    """
    rng = rng or np.random.default_rng()
    end = int(torch.nonzero(tokens)[-1])
    keep = rng.random(len(tokens)) >= share
    keep[0] = keep[end] = True
    if not keep[1:end].any() and end > 1:
        keep[int(rng.integers(1, end))] = True
    kept = tokens[: end + 1][torch.from_numpy(keep[: end + 1])]
    found = torch.zeros_like(tokens)
    found[: len(kept)] = kept
    return found


def load_batches(
    examples: Examples,
    plan: Plan,
    steps: range,
    *,
    workers: int = 0,
    pin: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Example]:
    """The batches of some steps, loaded ahead by `workers` processes where there are any."""
    rows = (plan.batch(step)[rank::world] for step in steps)
    return _loaded(examples.__getitem__, rows, workers, pin=pin)


def load_images(images: ImageInputs, block: int, workers: int = 0) -> Iterator[torch.Tensor]:
    """All images in order, a block at a time, as they are without augmentation."""
    blocks = parts(range(len(images)), block)
    return _loaded(functools.partial(images.load, seed=0), blocks, workers)


def _loaded(
    load: Callable[[Any], Any], batches: Iterable[list[Any]], workers: int, *, pin: bool = False
) -> Iterator[Any]:
    for batch in DataLoader(
        _Batches(load), batch_size=None, sampler=batches, num_workers=workers, pin_memory=pin
    ):
        if isinstance(batch, MmsearchError):
            raise batch
        yield batch


class _Batches(Dataset[Any]):
    """Whole batches. An error of our own is one too: a worker would wrap it in a traceback."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def __getitem__(self, keys: list[Any]) -> Any:
        try:
            return default_collate([self._load(key) for key in keys])
        except MmsearchError as error:
            return error

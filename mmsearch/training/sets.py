"""Labelled sets: their files found and looked through, and a frozen model's vectors of them."""

from __future__ import annotations

import itertools
import logging
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmsearch.config import available_cores
from mmsearch.datasets.archives import unpacked
from mmsearch.datasets.formats import find_images, read_labelled
from mmsearch.datasets.labelled import LabelledImage
from mmsearch.encoders.base import Encoder
from mmsearch.errors import LabelsError, UsageError
from mmsearch.evaluation.ranking import LEAST
from mmsearch.jobs.runner import parts
from mmsearch.media.fingerprint import content_hash
from mmsearch.training.recipe import DataTable, HeldOutTable
from mmsearch.training.runs import PORTION, State, remembered
from mmsearch.training.views import decoders, stamps
from mmsearch.types import IMAGE, TEXT, InputSpec, Notify, OnProgress, Pixels, Progress, Vectors

log = logging.getLogger(__name__)

_HELD_OUT = 0.1
_PICTURES, _TEXTS = 64, 256  # that are embedded at once
_KNOWN = {"val": "val", "dev": "val", "valid": "val", "validation": "val", "test": "test"}
_RANK = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class LabelledFiles:
    """A labelled set whose files were found."""

    name: str
    files: list[Path]
    images: list[LabelledImage]
    tokens: list[torch.Tensor]

    def only(self, rows: Sequence[int]) -> LabelledFiles:
        """Some of its pictures."""
        return replace(
            self,
            files=[self.files[row] for row in rows],
            images=[self.images[row] for row in rows],
            tokens=[self.tokens[row] for row in rows],
        )


def read_set(
    table: DataTable | HeldOutTable,
    tokenize: Callable[[list[str]], torch.Tensor],
    data: Path,
    cache: Path,
    on_progress: OnProgress,
    notify: Notify,
) -> LabelledFiles:
    """The captioned pictures of a table's splits that can be used.

    Raises:
        LabelsError: a picture that is not there, or none that is usable.
        UsageError: no captioned picture in these splits.
    """
    labels = unpacked(data / table.labels, cache)
    labelled = read_labelled(labels, notify)
    wanted = table.splits if isinstance(table, DataTable) else (table.split,)
    splits = [name.lower() for name in wanted]
    chosen = [
        image for image in labelled.images
        if image.captions
        and (image.split in splits if splits else known_split(image.split) == "train")
    ]  # fmt: skip
    if not chosen:
        raise UsageError(f"{labels}: no captioned picture in the split '{', '.join(wanted)}'")
    images = data / table.images if table.images else find_images(labels, chosen)
    files = [images / image.file for image in chosen]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise LabelsError(f"{missing}: named in {labels}, but not there")
    name = (table.name if isinstance(table, DataTable) else "") or labelled.name
    chosen = merge_copies(images, chosen, lambda text: notify(f"{name}: {text}"))
    files = [images / image.file for image in chosen]
    bad = unusable(files, cache, f"looking through {name}", on_progress)
    if len(bad) == len(files):
        raise LabelsError(f"{images}: none of the {len(files)} pictures of {labels} is usable")
    if bad:
        first = ", ".join(chosen[row].file for row in sorted(bad)[:5])
        notify(f"{name}: damaged pictures are left out ({len(bad)}): "
               f"{first}")  # fmt: skip
    tokens = [tokenize(list(image.captions)) for image in chosen]
    found = LabelledFiles(name, files, chosen, tokens)
    return found.only([row for row in range(len(files)) if row not in bad])


def unusable(files: Sequence[Path], cache: Path, job: str, on_progress: OnProgress) -> set[int]:
    """The places of the pictures that are damaged; `cache` remembers what was looked at.

    Raises:
        LabelsError: a picture that cannot be read.
    """
    good: list[bool] = []

    def look(part: Sequence[Path], _start: int) -> State:
        found = _pixels_of(part, {"at_least": 2, "within": 1})
        return {"good": torch.tensor([one is not None for one in found], dtype=torch.uint8)}

    for looked in remembered(cache, "looked", files, lambda part, _: stamps(part), look):
        good += looked["good"].tolist()
        on_progress(Progress(job, len(good), len(files)))
    return {place for place, is_good in enumerate(good) if not is_good}


def _pixels_of(files: Sequence[Path], how: InputSpec) -> list[Pixels | None]:
    """The pixels of labelled pictures; None where one is damaged or missing.

    Raises:
        LabelsError: one is there and cannot be read.
    """
    found = decoders().pixels_of(map(os.fsencode, files), how, available_cores())
    for file, pixels in zip(files, found, strict=True):
        if pixels is None:
            try:
                os.close(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
            except FileNotFoundError:
                continue
            except OSError as error:  # permissions, a network disk: the file may be fine
                raise LabelsError(
                    f"{file}: cannot be read: {error.strerror}; correct that, or leave it out of "
                    "the labels"
                ) from error
    return found


def known_split(split: str) -> str:
    """What a split's name stands for: "train", "val" or "test"."""
    return _KNOWN.get(split.lower(), "train")


def merge_copies(
    folder: Path, images: Sequence[LabelledImage], notify: Notify
) -> list[LabelledImage]:
    """Makes copies of a picture one picture with all of their captions.

    Or it would be a false answer to its copy's captions, or be in two splits: it is in the one
    that is held out furthest.
    """
    together: dict[int, list[LabelledImage]] = {}
    first = first_copies([folder / image.file for image in images])
    for image, place in zip(images, first, strict=True):
        together.setdefault(place, []).append(image)
    if len(together) < len(images):
        some = next(copies for copies in together.values() if len(copies) > 1)
        notify(f"{len(images) - len(together)} pictures are listed twice or copies of others: "
               "their captions are taken for those of one picture (the first: "
               f"{some[1].file})")  # fmt: skip
    found = []
    for copies in together.values():
        captions = dict.fromkeys(text for image in copies for text in image.captions)
        held = max((image.split for image in copies), key=lambda split: _RANK[known_split(split)])
        found.append(replace(copies[0], captions=tuple(captions), split=held))
    return found


def keep_apart(
    sets: Sequence[LabelledFiles], held_out: LabelledFiles | None, notify: Notify
) -> list[LabelledFiles]:
    """Keeps what is measured on out of what is trained on.

    A file that is in both is a mistake in the recipe; another file with the same picture is
    left out of the learning, and told.

    Raises:
        UsageError: a file is in both.
    """
    if held_out is None:
        return list(sets)
    measured = {file.resolve() for file in held_out.files}
    found = []
    for one in sets:
        both = [file for file in one.files if file.resolve() in measured]
        if both:
            raise UsageError(
                f"{one.name}: {len(both)} of its pictures are in a split that is measured on "
                f"({both[0]} is the first); name other splits, or list each picture in one"
            )
        first = first_copies([*held_out.files, *one.files])[len(held_out.files) :]
        rows = [row for row, place in enumerate(first) if place >= len(held_out.files)]
        if len(rows) < len(one.files):
            gone = next(one.files[row] for row in range(len(first)) if row not in set(rows))
            notify(
                f"{one.name}: {len(one.files) - len(rows)} of its pictures are left out: a "
                f"split that is measured on holds copies of them ({gone} is the first)"
            )
        found.append(one.only(rows) if len(rows) < len(one.files) else one)
    return found


def first_copies(files: Sequence[Path]) -> list[int]:
    """For each file the place of the first with the same content: its own where there is none."""
    found = list(range(len(files)))
    first: dict[bytes, int] = {}
    sizes = Counter(os.path.getsize(file) for file in files if os.path.isfile(file))
    for place, file in enumerate(files):
        with suppress(OSError):
            if sizes[file.stat().st_size] > 1:  # else nothing is the same: need not be read
                found[place] = first.setdefault(content_hash(file.read_bytes()), place)
    return found


# -- a frozen model's vectors ------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """Vectors of images (n, a) and of texts (c, b), each of length 1; widths may differ."""

    images: Vectors
    texts: Vectors
    owner: np.ndarray
    """For each text, the row of its image, (c,), ascending."""
    splits: tuple[str, ...]
    """The split of each image: "train", "val" or "test"."""

    def of(self, split: str) -> Features:
        """The images of one split with their texts."""
        rows = np.array([place for place, name in enumerate(self.splits) if name == split], int)
        place_of = np.full(len(self.images), -1)
        place_of[rows] = np.arange(len(rows))
        kept = place_of[self.owner] >= 0
        return Features(
            self.images[rows], self.texts[kept], place_of[self.owner[kept]], (split,) * len(rows)
        )

    def texts_by_image(self) -> list[torch.Tensor]:
        """For each image its texts, (texts, b)."""
        counts = np.bincount(self.owner, minlength=len(self.images))
        return list(torch.from_numpy(self.texts).split(counts.tolist()))


def embed_set(
    encoder: Encoder,
    folder: Path,
    images: Sequence[LabelledImage],
    cache: Path,
    seed: int,
    on_progress: OnProgress = lambda progress: None,
    notify: Notify = log.info,
) -> Features:
    """The frozen model's vectors of a labelled set, from `cache` where they were kept.

    Copies of a picture are one picture with all of their captions; pictures that cannot be
    used are left out; `notify` is told of both.
    """
    images = merge_copies(folder, [image for image in images if image.captions], notify)
    files = [folder / image.file for image in images]
    vectors, good = embed_pictures(encoder, files, cache, "embedding pictures", on_progress)
    usable = [image for image, fine in zip(images, good, strict=True) if fine]
    bad = [image.file for image, fine in zip(images, good, strict=True) if not fine]
    if bad:
        notify(f"{len(bad)} pictures could not be used: {', '.join(bad[:5])}")
    if not usable:
        raise LabelsError(f"{folder}: none of the set's {len(images)} captioned pictures is usable")
    texts = [text for image in usable for text in image.captions]
    owner = np.repeat(np.arange(len(usable)), [len(image.captions) for image in usable])
    found = embed_texts(encoder, texts, cache, "embedding captions", on_progress)
    return Features(vectors, found, owner, splits_of([i.split for i in usable], seed))


def embed_pictures(
    encoder: Encoder,
    files: Sequence[Path],
    cache: Path,
    job: str,
    on_progress: OnProgress,
    portion: int = PORTION,
) -> tuple[Vectors, NDArray[np.bool_]]:
    """The vectors of the pictures that can be used, (m, dim), and which of them can, (n,).

    Both come from `cache` where the same files were embedded before, which is kept portion by
    portion. Pictures that are damaged or missing are not used.

    Raises:
        LabelsError: a picture that is there and cannot be read.
    """

    def embed(part: Sequence[Path], start: int) -> State:
        good: list[bool] = []
        vectors = [np.empty((0, encoder.spec.dim), np.float32)]
        for some in parts(part, _PICTURES):
            pixels = _pixels_of(some, encoder.spec.inputs[IMAGE])
            good += [one is not None for one in pixels]
            if any(good[-len(some) :]):
                usable = np.stack([one for one in pixels if one is not None])
                vectors.append(encoder.encode(IMAGE, usable))
            on_progress(Progress(job, start + len(good), len(files)))
        found = torch.from_numpy(np.concatenate(vectors))
        return {"images": found, "good": torch.tensor(good, dtype=torch.uint8)}

    def about(part: Sequence[Path], _start: int) -> Any:
        return [encoder.spec.space, encoder.precision, stamps(part)]

    found = list(remembered(cache, "pictures", files, about, embed, portion))
    vectors = [np.empty((0, encoder.spec.dim), np.float32)]
    vectors += [part["images"].numpy() for part in found]
    good = [np.empty(0, bool), *(part["good"].numpy().astype(bool) for part in found)]
    return np.concatenate(vectors), np.concatenate(good)


def embed_texts(
    encoder: Encoder, texts: Sequence[str], cache: Path, job: str, on_progress: OnProgress
) -> Vectors:
    """The vectors of texts, (n, dim), from `cache` where they were embedded before."""
    each = list(dict.fromkeys(texts))  # captions that are made from names come again and again

    def embed(part: Sequence[str], first: int) -> State:
        found = []
        for some in parts(part, _TEXTS):
            found.append(encoder.encode(TEXT, some))
            on_progress(Progress(job, first + sum(map(len, found)), len(each)))
        return {"texts": torch.from_numpy(np.concatenate(found))}

    def about(part: Sequence[str], _start: int) -> Any:
        return [encoder.spec.space, encoder.precision, part]

    found = [np.empty((0, encoder.spec.dim), np.float32)]
    found += [part["texts"].numpy() for part in remembered(cache, "captions", each, about, embed)]
    rows = {text: row for row, text in enumerate(each)}
    vectors: Vectors = np.concatenate(found)[[rows[text] for text in texts]]
    return vectors


def read_features(text: Path, image: Path, seed: int) -> Features:
    """Two files of vectors that come from elsewhere: row i of one belongs to row i of the other.

    Image rows that are equal are one image with several texts, so that no image is both
    trained on and measured on.

    Raises:
        UsageError: not two arrays (n, a) and (n, b) of finite numbers.
    """
    texts, images = read_array(text), read_array(image)
    if len(texts) != len(images):
        raise UsageError(
            f"{text} has {len(texts)} rows and {image} {len(images)}: row i of one must belong to "
            "row i of the other"
        )
    _, first, which = np.unique(images, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    owner = which.reshape(-1)[order]
    splits = splits_of([""] * len(first), seed)
    return Features(unit(images[first]), unit(texts[order]), owner, splits)


def read_array(path: Path) -> np.ndarray:
    """An array of finite float32, (rows, width), of which no row is zero.

    Raises:
        UsageError: the file holds something else.
    """
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: not an array that NumPy can load: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
        raise UsageError(f"{path}: not an array of numbers with two dimensions (rows, width)")
    found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise UsageError(f"{path}: holds values that are no finite numbers")
    zeros = np.flatnonzero(~found.any(axis=1))
    if len(zeros):
        raise UsageError(
            f"{path}: {len(zeros)} rows hold only zeros, which point nowhere (the first is row "
            f"{zeros[0]}); leave them out of both files"
        )
    return found


def unit(vectors: np.ndarray) -> Vectors:
    """Each row made 1 long, float32."""
    # Squares of very small and of very large numbers do not fit into float32.
    rows = vectors.astype(np.float64)
    found: Vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return found


def splits_of(names: Sequence[str], seed: int) -> tuple[str, ...]:
    """The set's own splits; a tenth of its other pictures for each of val and test that it lacks.

    What the set holds out is never trained on: its figures would be worth nothing any more.
    """
    found = [known_split(name) for name in names]
    learnable = [place for place, split in enumerate(found) if split == "train"]
    order = iter(np.random.default_rng(seed).permutation(learnable))
    size = int(_HELD_OUT * len(learnable))
    for split in ("val", "test"):
        own = found.count(split)
        for place in itertools.islice(order, 0 if own else size):
            found[place] = split
        if found.count(split) < LEAST:
            held = f"the set's own split has {own}" if own else "a tenth is held out for it"
            raise UsageError(
                f"{len(found)} captioned pictures are too few for '{split}' ({held}): fewer than "
                f"{LEAST} pictures measure nothing (a set without splits needs {10 * LEAST})"
            )
    if found.count("train") < LEAST:
        raise UsageError(
            f"of {len(found)} captioned pictures {found.count('train')} are left to train on, "
            f"the others are held out; at least {LEAST} are needed"
        )
    return tuple(found)

"""A frozen model's vectors of a labelled set."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from mmsearch.config import available_cores
from mmsearch.encoders.base import Encoder
from mmsearch.errors import DecodeError, LabelsError, TrainingError
from mmsearch.jobs.runner import Runner
from mmsearch.media.fit import fit
from mmsearch.training.checkpoint import State, load_weights, save_weights
from mmsearch.training.views import decode_picture, decoders, stamps
from mmsearch.types import OnProgress, Progress, Vectors

_TEXTS = 256
_PORTION = 2048  # what is kept at once: a run that is stopped loses no more


def embed_pictures(
    encoder: Encoder, files: Sequence[Path], cache: Path, job: str, on_progress: OnProgress
) -> tuple[Vectors, NDArray[np.bool_]]:
    """The vectors of the pictures that can be used, (m, dim), and which of them can, (n,).

    Both come from `cache` where the same files were embedded before, which is kept portion by
    portion. Pictures that are damaged or missing are not used.

    Raises:
        LabelsError: a picture that is there and cannot be read.
    """

    def embed(part: Sequence[Path], start: int) -> State:
        pictures = _Pictures(
            encoder, part, lambda done: on_progress(Progress(job, start + done, len(files)))
        )
        Runner(decoders(), available_cores()).run(pictures, len(part))
        vectors, good = np.concatenate(pictures.vectors), np.array(pictures.good, "u1")
        return {"images": torch.from_numpy(vectors), "good": torch.from_numpy(good)}

    found = []
    for portion in portions(len(files)):
        part = files[portion]
        about = [encoder.spec.space, encoder.precision, stamps(part)]
        made = functools.partial(embed, part, portion.start)
        found.append(remembered(cache, "features", about, made))
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
        for start in range(0, len(part), _TEXTS):
            found.append(encoder.encode("text", part[start : start + _TEXTS]))
            done = first + min(start + _TEXTS, len(part))
            on_progress(Progress(job, done, len(each)))
        return {"texts": torch.from_numpy(np.concatenate(found))}

    found = [np.empty((0, encoder.spec.dim), np.float32)]
    for portion in portions(len(each)):
        part = each[portion]
        about = [encoder.spec.space, encoder.precision, part]
        made = functools.partial(embed, part, portion.start)
        found.append(remembered(cache, "captions", about, made)["texts"].numpy())
    rows = {text: row for row, text in enumerate(each)}
    vectors: Vectors = np.concatenate(found)[[rows[text] for text in texts]]
    return vectors


def unusable(files: Sequence[Path], cache: Path, job: str, on_progress: OnProgress) -> set[int]:
    """The places of the pictures that are damaged; `cache` remembers what was looked at.

    Raises:
        LabelsError: a picture that cannot be read.
    """
    found: set[int] = set()
    with decoders().threads(available_cores()) as pool:

        def look(part: Sequence[Path]) -> State:
            good = list(pool.map(lambda file: _decoded(file, 1) is not None, part))
            return {"good": torch.from_numpy(np.array(good, "u1"))}

        for portion in portions(len(files)):
            part = files[portion]
            made = functools.partial(look, part)
            good = remembered(cache, "looked", stamps(part), made)["good"].numpy()
            found |= {portion.start + int(place) for place in np.flatnonzero(good == 0)}
            on_progress(Progress(job, portion.start + len(part), len(files)))
    return found


# -- what is kept ----------------------------------------------------------------------------


def portions(count: int) -> list[slice]:
    """What is made and kept at once, of so many."""
    return [slice(start, start + _PORTION) for start in range(0, count, _PORTION)]


def remembered(cache: Path, kind: str, about: Any, make: Callable[[], State]) -> State:
    """What was made of the same things before, else what `make` makes now, which is kept."""
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    kept = cache / f"{kind}-{key}.safetensors"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):  # another process may be at the same
        try:
            return load_weights(kept)
        except (FileNotFoundError, TrainingError):  # nothing yet, or damaged: made again
            made = make()
            save_weights(kept, made)
            return made


# -- the pictures ----------------------------------------------------------------------------


def _decoded(file: Path, side: int) -> Image.Image | None:
    try:
        return decode_picture(file, side)
    except (DecodeError, FileNotFoundError):
        return None
    except OSError as error:  # permissions, a network disk: the file may be fine
        raise LabelsError(
            f"{file}: cannot be read: {error.strerror}; correct that, or leave it out of the labels"
        ) from error


@dataclass
class _Pictures:
    """Embeds picture files. A `mmsearch.jobs.runner.Job` whose outcome is kept here."""

    encoder: Encoder
    files: Sequence[Path]
    told: Callable[[int], None]
    size: int = 64
    vectors: list[Vectors] = field(default_factory=list)
    good: list[bool] = field(default_factory=list)

    def missing(self) -> Iterator[Path]:
        return iter(self.files)

    def read(self, item: Path) -> NDArray[np.uint8] | None:
        how = self.encoder.spec.preprocess
        image = _decoded(item, max(how.size))
        return fit(image, how) if image is not None else None

    def compute(self, reads: Sequence[NDArray[np.uint8] | None]) -> tuple[list[bool], Vectors]:
        usable = [pixels for pixels in reads if pixels is not None]
        nothing = np.empty((0, self.encoder.spec.dim), np.float32)
        found = self.encoder.encode("image", np.stack(usable)) if usable else nothing
        return [pixels is not None for pixels in reads], found

    def commit(self, outcomes: Sequence[tuple[list[bool], Vectors]]) -> None:
        for good, vectors in outcomes:
            self.good += good
            self.vectors.append(vectors)
        self.told(len(self.good))

"""A frozen model's vectors of a labelled set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from mmsearch.encoders.base import Encoder
from mmsearch.errors import LabelsError
from mmsearch.learning.checkpoint import State, load_weights, save_weights
from mmsearch.learning.views import open_picture, stamps
from mmsearch.media.image import fit
from mmsearch.store.files import write_durably
from mmsearch.types import Progress, Vectors

_PICTURES = 64
_TEXTS = 256

OnProgress = Callable[[Progress], None]


def embed_pictures(
    encoder: Encoder, files: Sequence[Path], cache: Path, job: str, on_progress: OnProgress
) -> tuple[Vectors, NDArray[np.bool_]]:
    """The vectors of the pictures that can be used, (m, dim), and which of them can, (n,).

    Both come from `cache` where the same files were embedded before.
    """

    def embed() -> State:
        vectors, good = _embed(encoder, files, job, on_progress)
        return {"images": torch.from_numpy(vectors), "good": torch.from_numpy(good.astype("u1"))}

    found = _remembered(cache, "features", encoder, stamps(files), embed)
    return found["images"].numpy(), found["good"].numpy().astype(bool)


def embed_texts(
    encoder: Encoder, texts: Sequence[str], cache: Path, job: str, on_progress: OnProgress
) -> Vectors:
    """The vectors of texts, (n, dim), from `cache` where they were embedded before."""

    def embed() -> State:
        each = list(dict.fromkeys(texts))  # captions that are made from names come again and again
        found = [np.empty((0, encoder.spec.dim), np.float32)]
        for start in range(0, len(each), _TEXTS):
            found.append(encoder.encode_texts(each[start : start + _TEXTS]))
            on_progress(Progress(job, min(start + _TEXTS, len(each)), len(each)))
        rows = {text: row for row, text in enumerate(each)}
        return {"texts": torch.from_numpy(np.concatenate(found)[[rows[text] for text in texts]])}

    vectors: Vectors = _remembered(cache, "captions", encoder, texts, embed)["texts"].numpy()
    return vectors


def _remembered(
    cache: Path, kind: str, encoder: Encoder, what: Any, embed: Callable[[], State]
) -> State:
    about = json.dumps([encoder.spec.space, encoder.precision, what])
    kept = cache / f"{kind}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):  # another process may be at the same
        if not kept.is_file():
            save_weights(kept, embed())
    return load_weights(kept)


def _embed(
    encoder: Encoder, files: Sequence[Path], job: str, on_progress: OnProgress
) -> tuple[Vectors, NDArray[np.bool_]]:
    how = encoder.spec.preprocess

    def opened(file: Path) -> NDArray[np.uint8] | None:
        try:
            return fit(open_picture(file, max(how.size)), how)
        except LabelsError:
            return None

    vectors = [np.empty((0, encoder.spec.dim), np.float32)]
    good: list[bool] = []
    with ThreadPoolExecutor() as pool:

        def portion(start: int) -> list[Future[NDArray[np.uint8] | None]]:
            return [pool.submit(opened, file) for file in files[start : start + _PICTURES]]

        coming = portion(0)
        for start in range(0, len(files), _PICTURES):
            # The next portion is decoded while this one is embedded.
            found, coming = [one.result() for one in coming], portion(start + _PICTURES)
            good += [pixels is not None for pixels in found]
            usable = [pixels for pixels in found if pixels is not None]
            if usable:
                vectors.append(encoder.encode_images(np.stack(usable)))
            on_progress(Progress(job, start + len(found), len(files)))
    return np.concatenate(vectors), np.array(good, bool)


def unusable(files: Sequence[Path], cache: Path, job: str, on_progress: OnProgress) -> set[int]:
    """The places of the pictures that cannot be decoded; `cache` remembers what was looked at."""
    key = hashlib.sha256(json.dumps(stamps(files)).encode()).hexdigest()[:16]
    kept = cache / f"damaged-{key}.json"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        if not kept.is_file():
            write_durably(kept, json.dumps(_damaged(files, job, on_progress)).encode())
    return set(json.loads(kept.read_text()))


def _damaged(files: Sequence[Path], job: str, on_progress: OnProgress) -> list[int]:
    def damaged(file: Path) -> bool:
        try:
            open_picture(file, 1)
        except LabelsError:
            return True
        return False

    found = []
    with ThreadPoolExecutor() as pool:
        for place, bad in enumerate(pool.map(damaged, files)):
            if bad:
                found.append(place)
            if place % _PICTURES == 0:
                on_progress(Progress(job, place, len(files)))
    return found

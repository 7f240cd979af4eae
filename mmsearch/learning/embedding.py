"""A frozen model's vectors of a labelled set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmsearch.encoders.base import Encoder
from mmsearch.errors import LabelsError
from mmsearch.learning.views import open_picture
from mmsearch.media.image import fit
from mmsearch.store.files import write_durably
from mmsearch.types import Progress, Vectors

_PICTURES = 64
_TEXTS = 256

OnProgress = Callable[[Progress], None]
Opened = Future[NDArray[np.uint8] | LabelsError]


def embed_pictures(
    encoder: Encoder, files: Sequence[Path], job: str, on_progress: OnProgress
) -> tuple[Vectors, dict[int, LabelsError]]:
    """The vectors of the pictures that can be used, (m, dim), and by place why others cannot."""
    how = encoder.spec.preprocess

    def opened(file: Path) -> NDArray[np.uint8] | LabelsError:
        try:
            return fit(open_picture(file, max(how.size)), how)
        except LabelsError as error:
            return error

    vectors = [np.empty((0, encoder.spec.dim), np.float32)]
    bad: dict[int, LabelsError] = {}
    with ThreadPoolExecutor() as pool:

        def portion(start: int) -> list[Opened]:
            return [pool.submit(opened, file) for file in files[start : start + _PICTURES]]

        coming = portion(0)
        for start in range(0, len(files), _PICTURES):
            # The next portion is decoded while this one is embedded.
            found, coming = [one.result() for one in coming], portion(start + _PICTURES)
            good = [pixels for pixels in found if not isinstance(pixels, LabelsError)]
            bad |= {i: one for i, one in enumerate(found, start) if isinstance(one, LabelsError)}
            if good:
                vectors.append(encoder.encode_images(np.stack(good)))
            on_progress(Progress(job, start + len(found), len(files)))
    return np.concatenate(vectors), bad


def unusable(files: Sequence[Path], cache: Path, job: str, on_progress: OnProgress) -> set[int]:
    """The places of the pictures that cannot be decoded; `cache` remembers what was looked at."""
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]
    kept = cache / f"damaged-{key}.json"
    if kept.is_file():
        return set(json.loads(kept.read_text()))

    def damaged(file: Path) -> bool:
        try:
            open_picture(file, 1)
        except LabelsError:
            return True
        return False

    found = set()
    with ThreadPoolExecutor() as pool:
        for place, bad in enumerate(pool.map(damaged, files)):
            if bad:
                found.add(place)
            if place % _PICTURES == 0:
                on_progress(Progress(job, place, len(files)))
    cache.mkdir(parents=True, exist_ok=True)
    write_durably(kept, json.dumps(sorted(found)).encode())
    return found


def embed_texts(
    encoder: Encoder, texts: Sequence[str], job: str, on_progress: OnProgress
) -> Vectors:
    """The vectors of texts, (n, dim)."""
    found = [np.empty((0, encoder.spec.dim), np.float32)]
    for start in range(0, len(texts), _TEXTS):
        found.append(encoder.encode_texts(texts[start : start + _TEXTS]))
        on_progress(Progress(job, min(start + _TEXTS, len(texts)), len(texts)))
    return np.concatenate(found)

"""Some of the pictures that a run is going to embed, for what has to be tried before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmsearch.datasets import scene_art, scenes
from mmsearch.encoders.precision import SAMPLE
from mmsearch.errors import DecodeError
from mmsearch.media.fit import fit
from mmsearch.media.sandbox import Decoders
from mmsearch.types import InputSpec, Pixels, Preprocess

_SEED = 1_000_000


def sample_of(
    paths: Sequence[bytes], how: InputSpec, workers: int, decoders: Decoders, count: int = SAMPLE
) -> Pixels:
    """So many pictures, (count, height, width, 3), spread over all of some files.

    Those that cannot be read are left out; drawn scenes fill up what is missing.
    """
    places = np.linspace(0, max(0, len(paths) - 1), min(count, len(paths)), dtype=int)

    def opened(place: int) -> Pixels | None:
        with decoders.open(paths[place]) as file:
            try:
                return file.pixels(how)
            except DecodeError:
                return None

    with decoders.threads(workers) as pool:
        good = [pixels for pixels in pool.map(opened, places.tolist()) if pixels is not None]
    drawn = range(_SEED, _SEED + count - len(good))
    preprocess = Preprocess.from_json(how)
    good += [fit(scene_art.render(scenes.scene(seed)), preprocess) for seed in drawn]
    return np.stack(good)

"""Some of the pictures that a run is going to embed, for what has to be tried before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmsearch.datasets import scene_art, scenes
from mmsearch.encoders.precision import SAMPLE
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
    found = decoders.pixels_of((paths[place] for place in places.tolist()), how, workers)
    good = [pixels for pixels in found if pixels is not None]
    drawn = range(_SEED, _SEED + count - len(good))
    preprocess = Preprocess.from_json(how)
    good += [fit(scene_art.render(scenes.scene(seed)), preprocess) for seed in drawn]
    return np.stack(good)

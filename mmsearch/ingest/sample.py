"""Some of the pictures that a run is going to embed, for what has to be tried before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mmsearch.datasets import scene_art, scenes
from mmsearch.encoders.precision import SAMPLE
from mmsearch.ingest.plan import Candidate, Plan
from mmsearch.ingest.reading import read
from mmsearch.media.image import fit
from mmsearch.types import Pixels, Preprocess

_SEED = 1_000_000


def sample_of(plan: Plan, how: Preprocess, workers: int, count: int = SAMPLE) -> Pixels:
    """So many pictures of a plan, (count, height, width, 3), spread over all that it is to read.

    Where that is nothing, as when another model is to come, they are those that it knows.

    Those that cannot be read are left out; drawn scenes fill up what is missing.
    """
    files = plan.read or plan.same
    places = np.linspace(0, max(0, len(files) - 1), min(count, len(files)), dtype=int)

    def pixels_of(candidate: Candidate) -> Pixels | None:
        picture = read(candidate, how, lambda digest: False).picture
        return picture.pixels if picture is not None else None

    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(pixels_of, [files[place] for place in places]))
    good = [pixels for pixels in found if pixels is not None]
    drawn = range(_SEED, _SEED + count - len(good))
    good += [fit(scene_art.render(scenes.scene(seed)), how) for seed in drawn]
    return np.stack(good)

"""What early fusion gains over adding up: `python benchmarks/compose.py --data DIR`.

Queries: a picture and a change, by the network of `mmsearch train compose`, against the picture
alone, the text alone and sums of several weights, on drawn scenes that nothing was learned from and
on Flickr8k's test split, where a caption of one photo is the change and a photo of nearly the same
is the picture. Items: a photo and a caption in one vector, by the same network, against their mean.
With --page FILE it also writes a page of drawn queries that early fusion mends.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmsearch import Engine
from mmsearch.config import load_settings
from mmsearch.datasets import scene_art, scenes
from mmsearch.datasets.formats import read_labelled
from mmsearch.datasets.scene_changes import CHANGES
from mmsearch.encoders.encoder_provider import EncoderProvider
from mmsearch.encoders.loading import pick_device
from mmsearch.evaluation.ranking import CUTOFFS, gain_line, rank_of_best, recall_at
from mmsearch.search.compose import Composer, weighted_sum, write_composer
from mmsearch.search.page import Section, Tile, render_page
from mmsearch.training import compose
from mmsearch.training.sets import embed_set

WEIGHTS = (0.5, 1.0, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--page", type=Path, help="where a page of queries goes")
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    flickr = Path(args.data) / "flickr8k"
    settings = load_settings()
    models = EncoderProvider(settings, print, None)
    encoder = models.for_new_index(args.model, pick_device(settings.device))
    images = read_labelled(flickr).images
    photos = embed_set(encoder, flickr / "images", images, settings.cache / "views", 0)
    with tqdm(disable=None, leave=False) as bar:
        learned = compose.train_composer(encoder, photos, 0, lambda _: bar.update())
        drawn_only = compose.train_composer(encoder, None, 0, lambda _: bar.update())
    unseen = compose.drawn_triplets(
        encoder, compose.Recipe.measured_on, lambda _: None, held_out=True
    )
    composer = Composer(learned.network, encoder.spec.dim)
    ways = {
        "the picture alone": lambda image, text: image,
        "the text alone": lambda image, text: text,
        **{
            f"sum, text x {w:g}": lambda image, text, w=w: weighted_sum(image, w * text)
            for w in WEIGHTS
        },
        "early, drawn only": Composer(drawn_only.network, encoder.spec.dim),
        "early": composer,
    }
    print(
        f"drawn scenes, {len(unseen.kinds)} changes to scenes that nothing was learned from "
        f"({', '.join(f'{row.targets} {row.kind}' for row in learned.drawn)} targets), "
        f"{len(np.unique([unseen.target_ids, unseen.reference_ids]))} pictures, R@1/10"
    )
    kinds = np.array(unseen.kinds)
    print_row("", ["all", *CHANGES])
    for name, way in ways.items():
        ranks = compose.ranks_of(unseen, way)
        print_row(name, [pair(ranks), *(pair(ranks[kinds == kind]) for kind in CHANGES)])
    test = compose.photo_triplets(photos.of("test"))
    print(f"\nphotos, {len(test.kinds)} captions of {len(photos.of('test').images)}, R@1/5/10")
    print_row("", ["as it is", "its picture left out"])
    for name, way in ways.items():
        print_row(
            name,
            [
                triple(compose.ranks_of(test, way)),
                triple(compose.ranks_of(test, way, without_reference=True)),
            ],
        )
    gain = gain_line(learned.photos.gain)
    print(f"early over {learned.photos.over}: {gain} of the mean of the three")
    items(photos)
    if args.page is not None:
        args.page.write_text(page(args.model, learned.network), encoding="utf-8")


def items(photos):
    """A photo with one of its captions as one vector, asked for by another caption."""
    train, test = photos.of("train"), photos.of("test")
    image, first, second = pairs(train)
    learned = compose.fit_network(
        [compose.Triplets(train.images[image], train.texts[first], train.texts[second],
                          image, image, ("item",) * len(image))], 0)  # fmt: skip
    network = Composer(compose.export_composer(learned), train.images.shape[1])
    start = np.searchsorted(test.owner, np.arange(len(test.images)))
    asked = np.isin(np.arange(len(test.owner)), start)
    queries, rest, owner = test.texts[asked], test.texts[~asked], test.owner[~asked]
    print(f"\nitems, {len(queries)} captions ask for photos with the others, best pair, R@1/5/10")
    for name, way in {"the caption alone": lambda image, text: text, "their mean": weighted_sum,
                      "early": network}.items():  # fmt: skip
        cosines = queries @ way(test.images[owner], rest).T
        best = np.full((len(queries), len(test.images)), -np.inf)
        np.maximum.at(best.T, owner, cosines.T)
        print_row(name, [triple(rank_of_best(best, np.eye(len(queries), dtype=bool)))])


def pairs(part):
    """Every caption of an image beside the next one of the same image."""
    following = np.arange(1, len(part.owner) + 1) % len(part.owner)
    start = np.searchsorted(part.owner, part.owner)
    following = np.where(part.owner[following] == part.owner, following, start)
    told = following != np.arange(len(part.owner))
    return part.owner[told], np.flatnonzero(told), following[told]


def pair(ranks):
    return f"{recall_at(ranks, 1):.1f} / {recall_at(ranks, 10):.1f}"


def triple(ranks):
    return " / ".join(f"{recall_at(ranks, k):.1f}" for k in CUTOFFS)


def print_row(name, cells):
    print(f"{name:22}" + "".join(f"{cell:>22}" if len(cells) < 4 else f"{cell:>14}"
                                 for cell in cells))  # fmt: skip


def page(model, network):
    """Changes of each kind whose picture a sum does not put first and early fusion does."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        Engine.open(Path(scratch) / "index", model=model) as engine,
    ):
        chosen = list(compose.changes(200, held_out=True))
        files = {}
        for scene in [scene for one in chosen for scene in (one.reference, one.target)]:
            file = Path(scratch) / f"{len(files):03}.png"
            if files.setdefault(scenes.meaning(scene), file) == file:
                scene_art.render(scene).save(file)
        engine.index(files.values())
        status = engine.status()
        write_composer(engine.folder, network, status.dim, status.space, is_for_photos=True)
        sections = {}
        for one in chosen:
            reference, target = (files[scenes.meaning(s)] for s in (one.reference, one.target))
            hits = {
                how: engine.search(one.words, image=reference, k=3, compose=how)
                for how in ("sum", "early")
            }
            first = {how: found[0].path == target for how, found in hits.items()}
            if one.kind not in sections and first["early"] and not first["sum"]:
                sections[one.kind] = [
                    Section(one.words, [_tile(hit, target) for hit in found], f"--compose {how}",
                            [Tile(reference, "this picture", reference.name)])
                    for how, found in hits.items()
                ]  # fmt: skip
        rows = [row for kind in CHANGES for row in sections.get(kind, [])]
        return render_page("Queries that early fusion mends", rows)


def _tile(hit, target):
    return Tile(hit.path, f"{hit.rank}. {hit.score:.3f}", hit.path.name, hit.path == target)


if __name__ == "__main__":
    main()

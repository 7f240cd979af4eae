"""What re-ranking the first images gives: `python benchmarks/rerank.py --data DIR`.

Flickr8k's test split, text to image: `mmsearch train rerank` on its train split, both kinds of
network, each part on top of the others; recall against how many images are looked at, with the
milliseconds that a query takes; names of things instead of captions; and with captions in the
index. With --page FILE it also writes a page of drawn queries that re-ranking corrects.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import tiny_data
from named import r_precision

from mmsearch import Engine, Query, Term
from mmsearch.datasets import scene_art, scenes
from mmsearch.datasets.formats import read_labelled
from mmsearch.datasets.labelled import LabelledSet
from mmsearch.engine import training_jobs
from mmsearch.evaluation.comparison import to_text
from mmsearch.evaluation.ranking import (
    CUTOFFS,
    gain_line,
    paired_difference,
    recall_at,
    recall_gain,
)
from mmsearch.search.page import Section, Tile, render_page
from mmsearch.search.rerank import KINDS, Mix, read_reranker
from mmsearch.search.searcher import Trained
from mmsearch.training import rerank as learning

DEPTHS = {"interaction": (5, 10, 20, 50, 100, 200), "attention": (5, 10, 20, 50)}  # it is slow
TIMED = 150  # queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path, help="keep what was learned, a folder for each kind")
    parser.add_argument("--page", type=Path, help="where a page of queries goes")
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    flickr = Path(args.data) / "flickr8k"
    labelled = read_labelled(flickr)
    _, chosen = labelled.choose("test", None)
    test = LabelledSet(labelled.name, tuple(chosen))
    with tempfile.TemporaryDirectory() as scratch:
        for kind in args.kinds:
            out = (args.out or Path(scratch)) / kind
            with Engine.open(out, model=args.model) as engine:
                seed_index(engine, Path(scratch) / "seed")
                show_kind(engine, kind, flickr, test, Path(scratch) / f"index-{kind}")
                if kind == args.kinds[0]:
                    names(engine, Path(args.data) / "objects")
                    captions(engine, flickr)
                    if args.page is not None:
                        args.page.write_text(page(engine, Path(scratch)), encoding="utf-8")


def seed_index(engine, folder):
    """An index of one picture: what is learned is kept beside an index."""
    folder.mkdir(exist_ok=True)
    scene_art.render(scenes.gallery(1, seed=1)[0]).save(folder / "one.png")
    engine.index([folder])


def show_kind(engine, kind, flickr, test, index):
    """One kind of network: what each part gives, the curve, what a query costs."""
    started = time.perf_counter()
    with tqdm(disable=None, leave=False) as bar:
        learned, _ = engine.train_rerank(
            flickr, kind=kind, keep=True, on_progress=lambda _: bar.update()
        )
    size = (engine.folder / "rerank.safetensors").stat().st_size
    mix, (low, high) = learned.reranker.mix, learned.reranker.familiar
    print(f"\n{kind}: learned in {(time.perf_counter() - started) / 60:.0f} minutes, "
          f"{len(learned.network.weights) / 1e6:.2f} MB of {size / 1e6:.2f} MB are weights, match "
          f"x {mix.match:.4f}, hubness x {mix.hubness:g} for queries {high:.2f} near the "
          f"captions, falling to nothing at {low:.2f}")  # fmt: skip
    reranker = read_reranker(engine.folder, engine.status().space)
    with tqdm(disable=None, leave=False) as bar:
        found = training_jobs.candidates_of(
            engine.opened,
            flickr / "images",
            test,
            reranker,
            lambda _: bar.update(),
            depth=DEPTHS[kind][-1],
        )
    media = np.array([one.media for one in found])
    fifty = [first(one, 50) for one in found]
    first_found = learning.ranks_of(fifty, None)
    print(f"{len(found)} captions, {len(test.images)} images, the first 50 looked at; R@1/5/10, "
          "and the gain in R@1 over the first search")  # fmt: skip
    for name, way in {
        "the first search": None,
        "test-time augmentation": Mix(0, 0),
        "hubness, without the others": "hubness",
        "match, without the others": "match",
        "test-time augmentation, hubness": Mix(mix.hubness, 0),
        "test-time augmentation, match": Mix(0, mix.match),
        "all three": mix,
        "match alone": "alone",
    }.items():
        ranks = ranks_by(fifty, way, mix)
        gain = recall_gain((ranks, first_found, media), cutoffs=[1])
        print(f"{name:32} {triple(ranks)}  {gain_line(gain)}")
    curve(engine, found, reranker, DEPTHS[kind], flickr, test, index)


def first(one, depth):
    """The first candidates of those that were found."""
    parts = one.parts
    return replace(
        one, found=one.found[:depth], cosines=one.cosines[:depth],
        parts=replace(parts, cosine=parts.cosine[:depth], hubness=parts.hubness[:depth],
                      match=parts.match[:depth]),
    )  # fmt: skip


def ranks_by(found, way, mix):
    if way is None or isinstance(way, Mix):
        return learning.ranks_of(found, way)
    changed = []
    for one in found:
        parts = one.parts
        if way == "alone":
            parts = replace(parts, cosine=0 * parts.cosine)
        else:
            parts = replace(parts, cosine=one.cosines.astype(np.float32))
        changed.append(replace(one, parts=parts))
    mixes = {"alone": Mix(0, 1), "match": Mix(0, mix.match), "hubness": Mix(mix.hubness, 0)}
    return learning.ranks_of(changed, mixes[way])


def curve(engine, found, reranker, depths, flickr, test, index):
    """Recall against how many images are looked at, and the time of a query."""
    with Engine.open(index, model=engine.status().model) as other:
        files = [flickr / "images" / image.file for image in test.images]
        plain = other.index(files)
        with_patches = other.index(patches=True)
        with other.store.reader() as reader:
            kept = reader.patches(other.store.contents().image_ids[:1].tolist())
        (one,) = (len(content) for content in kept.values())
        print(f"patches: {one:,} bytes an image; indexing {plain.added / plain.seconds:.0f} "
              f"images/s, and {with_patches.patches / with_patches.stages['patches']:.0f} with "
              "patches on top")  # fmt: skip
        learned = Trained(reranker=lambda: reranker)
        texts = [text for image in test.images for text in image.captions[:1]][:TIMED]
        print("N, R@1/5/10, milliseconds at the median: a query of one text")
        with other.searcher(learned) as searcher:
            for depth in (0, *depths):
                some = [first(one, depth) for one in found]
                ranks = (
                    beyond(found, some, reranker.mix) if depth else learning.ranks_of(found, None)
                )
                print(f"{depth:4} {triple(ranks)}  {median(searcher, texts, depth):6.1f}")
        other.index(patches=False)
        with other.searcher(learned) as searcher:
            slow = median(searcher, texts[:20], 50)
        print(f"  50 without patches in the index: {slow:.0f} ms")


def beyond(found, some, mix):
    """The ranks where only the first were ranked again, and the others stay below them."""
    ranks, plain = learning.ranks_of(some, mix), learning.ranks_of(found, None)
    return np.where(ranks < 10**6, ranks, plain)


def median(searcher, texts, depth):
    """Milliseconds at the median."""
    spent = []
    for text in texts:
        query = Query((Term(text=text),), k=min(10, depth or 10), rerank=depth, fusion="image")
        started = time.perf_counter()
        searcher.search(query)
        spent.append(1e3 * (time.perf_counter() - started))
    return float(np.median(spent[5:]))


def names(engine, objects):
    """Names of things for queries, which nothing here has learned from."""
    listed, held_out = tiny_data.split_objects(objects.parent)
    images = [i for i in listed
              if i.file in held_out and i.source in ("caltech101", tiny_data.SPORTS)]  # fmt: skip
    chosen = {name: [i for i in images if i.name == name] for name in {i.name for i in images}}
    print(f"\nnames: {len(chosen)} over {len(images)} pictures that were not learned from "
          "(Caltech-101, 100 sports), R-precision")  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as scratch,
        Engine.open(Path(scratch) / "index", model=engine.status().model) as other,
    ):
        other.index([objects / image.file for image in images], patches=True)
        held = other.store.contents()
        place_of = {os.fsdecode(path): n for n, path in enumerate(held.image_paths)}
        row_of = {number: row for row, number in enumerate(held.image_ids.tolist())}
        reranker = read_reranker(engine.folder, engine.status().space)
        ways = {"first": [], "all three": [], "without hubness": [], "without match": []}
        mix = reranker.mix
        mixes = {"all three": mix, "without hubness": Mix(0, mix.match),
                 "without match": Mix(mix.hubness, 0)}  # fmt: skip
        with other.searcher(Trained(reranker=lambda: reranker)) as searcher:
            for name, own in chosen.items():
                true = np.zeros((1, len(held.image_ids)), bool)
                true[0, [place_of[os.path.abspath(objects / i.file)] for i in own]] = True
                query = Query((Term(text=name),))
                vector = searcher.embed(query.terms)
                scores = (held.image_vectors @ vector)[None].astype(np.float64)
                answer = searcher.rank(vector[None], "image", 50)[0]
                seen, parts = searcher.patch_scorer(query).parts(vector, query.terms, answer.items)
                rows = [row_of[answer.ids[place]] for place in seen]
                ways["first"].append(r_precision(scores, true)[0])
                for way, one in mixes.items():
                    again = scores.copy()
                    again[0, rows] = 10 + one.of(parts)
                    ways[way].append(r_precision(again, true)[0])
        before = np.array(ways["first"])
        for way, values in ways.items():
            gain = paired_difference((100 * (np.array(values) - before), np.arange(len(values))))
            print(f"{way:20} {100 * np.mean(values):.1f}  {gain_line(gain)}")


def captions(engine, flickr):
    """With captions in the index: one of five asks, the others are there."""
    print("\nwith captions in the index")
    print(to_text(engine.compare_fusions(["sum", "image"], flickr, rerank=50)))


def page(engine, scratch):
    """Drawn scenes, asked for by a caption: what the first search and a second look put first."""
    folder = scratch / "drawn"
    folder.mkdir()
    made = scenes.gallery(300, seed=70_000)
    texts = {}
    for number, scene in enumerate(made):
        path = folder / f"{number:03}.png"
        scene_art.render(scene).save(path)
        texts[path] = scenes.captions(scene)[0]
    sections = []
    with Engine.open(scratch / "drawn-index", model=engine.status().model) as other:
        other.index([folder], patches=True)
        reranker = read_reranker(engine.folder, engine.status().space)
        with other.searcher(Trained(reranker=lambda: reranker)) as searcher:
            for path, text in texts.items():
                query = Query((Term(text=text),), k=4, fusion="image")
                plain, again = (searcher.search(replace(query, rerank=n)) for n in (0, 50))
                same = [p for p, t in texts.items() if t == text]
                if plain[0].path not in same and again[0].path == path:
                    sections += [
                        Section(text, [_tile(hit, same) for hit in hits], note)
                        for note, hits in (("the first search", plain), ("--rerank 50", again))
                    ]
                if len(sections) == 4:
                    break
    return render_page("Queries that re-ranking corrects", sections)


def _tile(hit, same):
    return Tile(hit.path, f"{hit.rank}. {hit.score:.3f}", hit.path.name, hit.path in same)


def triple(ranks):
    return " / ".join(f"{recall_at(ranks, k):.1f}" for k in CUTOFFS)


if __name__ == "__main__":
    main()

"""What fusing an image's score with its captions' gains: `python benchmarks/fusion.py --data DIR`.

On Flickr8k's test split one caption of each photo asks and the other four are in the index, of all
photos, of a half and of a tenth of them. Weights are learned on the split val. Then what fusion
costs a warm query. With --page FILE it also draws a gallery, asks for its pictures by captions that
are not in the index, and writes a page of queries that the pictures alone miss.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmsearch import Engine, Query, Term
from mmsearch.datasets import scene_art, scenes
from mmsearch.evaluation import comparison
from mmsearch.search.page import Section, Tile, render_page

FUSIONS = ["image", "caption", "words", "rrf", "sum", "trained"]
QUERIES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--page", type=Path, help="where a page of queries goes")
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    flickr = Path(args.data) / "flickr8k"
    with tempfile.TemporaryDirectory() as scratch:
        with Engine.open(Path(scratch) / "index", model=args.model) as engine:
            engine.index(_drawn(Path(scratch) / "seed", 2))
            learned, _ = engine.train_fusion(flickr, split="val", keep=True)
            weights = {name: round(value, 2) for name, value in vars(learned.weights).items()}
            gain = learned.overall
            print(
                f"weights learned on a half of val: {weights}; on the other half the mean of the "
                f"three recalls changes by {gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"
            )
            for share in (1.0, 0.5, 0.1):
                report = engine.compare_fusions(FUSIONS, flickr, split="test", captioned=share)
                print(f"\n{share:.0%} of the photos have captions")
                print(comparison.to_text(report).rpartition("\n")[0])
            report = engine.compare_fusions(["sum", "trained"], flickr, split="test")
            print("\nlearned weights against equal ones")
            print(comparison.to_text(report).rpartition("\n")[0])
        with Engine.open(Path(scratch) / "all", model=args.model) as engine:
            cost(engine, flickr)
        if args.page is not None:
            with Engine.open(Path(scratch) / "drawn", model=args.model) as engine:
                engine.index(_drawn(Path(scratch) / "drawn-gallery", 200))
                args.page.write_text(page(engine), encoding="utf-8")


def _drawn(folder, count):
    folder.mkdir()
    for number, scene in enumerate(tqdm(scenes.gallery(count, seed=77), disable=None, leave=False)):
        scene_art.render(scene).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text("\n".join(scenes.captions(scene)))
    return [folder]


def cost(engine, flickr):
    """Milliseconds of a warm query over all photos and captions, encoding included."""
    report = engine.index([flickr / "images"], captions=flickr)
    texts = engine.store.contents().caption_texts[:: report.captions // QUERIES][:QUERIES]
    print(f"\na warm query over {report.added} photos with {report.captions} captions, ms:")
    for how in ("image", "sum"):
        took = []
        for text in texts:
            started = time.perf_counter()
            engine.search(Query((Term(text=text),), fusion=how))
            took.append(1000 * (time.perf_counter() - started))
        print(f"  {how}: median {np.median(took):.1f}, 99% below {np.percentile(took, 99):.1f}")


def page(engine):
    """Queries whose picture the pictures alone do not put first, and the fused search does."""
    asked = comparison.hold_out(engine.store, 1)
    sections = []
    for one in asked:
        hits = {
            how: engine.search(Query((Term(text=one.text),), k=5, fusion=how))
            for how in ("image", "sum")
        }
        first = {how: found[0].media_id == one.media for how, found in hits.items()}
        if first["sum"] and not first["image"]:
            sections += [
                Section(one.text, [_tile(hit, one.media) for hit in found], f"--fusion {how}")
                for how, found in hits.items()
            ]
    return render_page("Queries that captions mend", sections[:6])


def _tile(hit, media):
    return Tile(hit.path, f"{hit.rank}. {hit.score:.3f}", hit.path.name, hit.media_id == media)


if __name__ == "__main__":
    main()

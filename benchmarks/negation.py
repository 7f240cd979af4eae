"""How much a `--not` term should count: `python benchmarks/negation.py --data DIR`.

Looks for "x, not y" among Flickr8k's photos with each weight, and with "x without y" in words, and
judges the first 20 hits by the photos' own captions: does one mention x, does none mention y? (The
bundled model has seen the training photos, but never such a query.) NOT_WEIGHT in
mmsearch/cli/search.py was chosen by this table.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

from mmsearch import Engine, Query, Term
from mmsearch.datasets.formats import read_labelled

PAIRS = {
    "dog|puppy": ("a dog", ("grass", "water", "ball", "brown", "snow")),
    "man|men|guy": ("a man", ("bike", "mountain", "rock")),
    "people|men|women|group|crowd": ("people", ("snow", "street")),
    "child|kid|boy|girl|toddler": ("a child", ("water",)),
    "woman|lady": ("a woman", ("hat",)),
    "boy": ("a boy", ("pool",)),
    "girl": ("a girl", ("pink",)),
}
WEIGHTS = (0.0, -0.25, -0.5, -0.75, -1.0, -1.5)
K = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    labelled = read_labelled(args.data / "flickr8k")
    said = {image.file: " ".join(image.captions).lower() for image in labelled.images}
    with (
        tempfile.TemporaryDirectory() as scratch,
        Engine.open(f"{scratch}/index", model=args.model) as engine,
    ):
        engine.index([args.data / "flickr8k" / "images"])
        print(f"{'weight':>10}  {'mentions x':>10}  {'and never y':>11}")
        for weight in WEIGHTS:
            print_row(engine, said, f"{weight:.2f}", lambda text, other, weight=weight: (
                Term(text=text), Term(text=other, weight=weight)
            ))  # fmt: skip
        for word in ("without", "and no"):
            print_row(engine, said, word, lambda text, other, word=word: (
                Term(text=f"{text} {word} {other}"),
            ))  # fmt: skip


def print_row(engine, said, name, terms_of):
    """Prints the shares of what was found that shows x, and that shows x and not y."""
    wanted, clean, count = 0, 0, 0
    for words, (text, others) in PAIRS.items():
        for other in others:
            for hit in engine.search(Query(terms_of(text, other), k=K)):
                caption = said[hit.path.name]
                has = bool(re.search(rf"\b({words})s?\b", caption))
                count += 1
                wanted += has
                clean += has and not re.search(rf"\b{other}", caption)
    print(f"{name:>10}  {100 * wanted / count:9.1f}%  {100 * clean / count:10.1f}%")


if __name__ == "__main__":
    main()

"""How long a warm query takes on a quiet machine, and beside a busy process for each core.

    python benchmarks/latency.py --data DIR [--photos 400] [--queries 150] [--rerank 50]

Captions of Flickr8k's test photos ask an index of those photos (docs/datasets.md), with `tiny`.
Milliseconds: what half, 95 of 100 and all of the queries take at most, and the share of them
that takes more than five times the median of the quiet machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmsearch import Engine, Query, Term
from mmsearch.config import available_cores
from mmsearch.datasets.formats import read_labelled


def milliseconds(engine: Engine, texts: list[str], depth: int) -> np.ndarray:
    found = []
    for text in texts:
        query = Query((Term(text=text),), fusion="image", rerank=depth)
        started = time.perf_counter()
        engine.search(query)
        found.append(1000 * (time.perf_counter() - started))
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--queries", type=int, default=150)
    parser.add_argument("--rerank", type=int, default=50)
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    labelled = read_labelled(Path(args.data) / "flickr8k")
    _, chosen = labelled.choose("test", args.photos)
    texts = [image.captions[0] for image in chosen][: args.queries]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        folder.mkdir()
        for image in chosen:
            photo = args.data / "flickr8k" / "images" / image.file
            (folder / image.file).symlink_to(photo.absolute())
        with Engine.open(Path(scratch) / "index", model="tiny", notify=print) as engine:
            engine.index([folder], patches=args.rerank > 0)
            milliseconds(engine, texts[:20], args.rerank)
            quiet = milliseconds(engine, texts, args.rerank)
            busy = [
                subprocess.Popen([sys.executable, "-c", "while True: pass"])
                for _ in range(available_cores())
            ]
            try:
                loaded = milliseconds(engine, texts, args.rerank)
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
    print(f"{available_cores()} cores, {len(chosen)} photos, {len(texts)} queries, "
          f"rerank {args.rerank}")  # fmt: skip
    for name, values in (("quiet", quiet), ("busy", loaded)):
        slow = np.mean(values > 5 * np.median(quiet))
        middle, most = np.percentile(values, [50, 95])
        print(f"{name:<6} {middle:7.1f} {most:7.1f} {values.max():7.1f}   {slow:.0%}")


if __name__ == "__main__":
    main()

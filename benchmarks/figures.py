"""The README's figures: `python benchmarks/figures.py --data DIR`.

Runs the program as a user does, in new processes, with the bundled model (or `--model`), on the
Flickr8k photos and captions of DIR, and prints a table. Everything goes to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUERY = "a dog running on the beach"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    flickr = args.data / "flickr8k"
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MMSEARCH_CACHE"] = f"{scratch}/cache"
        index, photos = f"{scratch}/index", f"{scratch}/photos"
        few = ("index", args.data / "photos", "--index", photos, "--model", args.model, "--json")
        first = json.loads(run(*few).stdout)
        row("first index of 100 photos, model prepared", f"{first['seconds']:.1f} s")
        subprocess.run(["rm", "-rf", photos], check=True)
        report = json.loads(run(*few).stdout)
        row("photos of 500x375", f"{report['images_per_second']:.0f} images/s")
        report = json.loads(
            run("index", flickr / "images", "--captions", flickr / "dataset_flickr8k.json",
                "--index", index, "--model", args.model, "--json").stdout
        )  # fmt: skip
        row(
            f"{report['added']} photos of 224x224 with {report['captions']} captions",
            f"{report['seconds']:.0f} s",
        )
        row("rescan of the unchanged folder, whole process", timed(1, "index", "--index", index))
        row(
            "cold text search over it, whole process",
            timed(args.repeats, "search", QUERY, "--index", index),
        )
        bench = json.loads(run("bench", flickr, "--model", args.model, "--json").stdout)
        for name in ("t2i", "i2t"):
            figures = " / ".join(f"{bench[name][f'R@{k}']:.1f}" for k in (1, 5, 10))
            row(f"Flickr8k test, {name} R@1/5/10 ({bench['precision']})", figures)


def row(what: str, value: str) -> None:
    print(f"{what:<60} {value}", flush=True)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmsearch", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)


def timed(repeats: int, *arguments: object) -> str:
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run(*arguments)
        seconds.append(time.perf_counter() - started)
    return f"{statistics.median(seconds[1:]):.2f} s (median of {repeats}, after one to warm up)"


if __name__ == "__main__":
    main()

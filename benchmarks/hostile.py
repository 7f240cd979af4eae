"""What files that mean harm cost: `python benchmarks/hostile.py [--flips 1000] [--files 100000]`.

Every format cut at every tenth, so many damaged copies of each, bombs, and a folder of so many
files with the odd names among them. Each file is read in a process as an index run does it; the
longest time and the largest memory of any are printed, and what became of the bombs. A cut file
that passes for a picture ends the script.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from mmsearch import Engine
from mmsearch.errors import DecodeError
from mmsearch.media.sandbox import Decoders
from mmsearch.types import Preprocess

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "media"))

import hostile

HOW = Preprocess((224, 224), (0.0,) * 3, (1.0,) * 3, resize_mode="squash")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=1000, help="damaged copies of each format")
    parser.add_argument("--files", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmsearch-hostile-") as scratch:
        folder = Path(scratch)
        cut_and_flipped(folder, args.flips)
        bombs(folder)
        many(folder, args.files)


class Trial:
    """Reads files one after the other, and keeps what they cost."""

    def __init__(self) -> None:
        self.seconds, self.memory, self.ends = 0.0, 0, Counter()
        self.decoders = Decoders()

    def __call__(self, path: Path) -> str:
        started = time.monotonic()
        with self.decoders.open(os.fsencode(path)) as file:
            child = file._process._child.pid  # noqa: SLF001 - to look at its memory
            reason = file.reason
            if not reason:
                try:
                    file.pixels(asdict(HOW))
                except DecodeError as error:
                    reason = str(error)
            self.seconds = max(self.seconds, time.monotonic() - started)
            try:
                status = Path(f"/proc/{child}/status").read_text()
                peak = int(status.partition("VmHWM:")[2].split()[0]) / 1e3
            except (OSError, IndexError):  # it is gone
                peak = 0
            self.memory = max(self.memory, peak)
        ended = "picture" if not reason else "crashed" if "crashed" in reason else "reason"
        self.ends[ended] += 1
        return reason


def cut_and_flipped(folder: Path, flips: int) -> None:
    trial, rng = Trial(), random.Random(0)
    for name, content in hostile.wholes().items():
        path = folder / f"x{hostile.SUFFIX[name]}"
        for cut in hostile.cuts(content):
            path.write_bytes(cut)
            if not trial(path):
                sys.exit(f"{name}, cut to {len(cut)} of {len(content)} bytes, passes for a picture")
        for _ in range(flips):
            path.write_bytes(hostile.flipped(content, rng))
            trial(path)
        path.unlink()
    trial.decoders.close()
    print(f"cut and flipped: {sum(trial.ends.values())} files of {len(hostile.FORMATS)} kinds, "
          f"{dict(trial.ends)}; at most {trial.seconds:.2f} s and {trial.memory:.0f} MB",
          flush=True)  # fmt: skip


def bombs(folder: Path) -> None:
    for name, content in hostile.bombs().items():
        path = folder / name
        path.write_bytes(content)
        trial = Trial()  # a process of its own, for its memory
        reason = trial(path)
        trial.decoders.close()
        print(f"{name:16} {len(content):>10,} bytes {trial.seconds:6.2f} s {trial.memory:6.0f} MB  "
              f"{reason or 'a picture'}", flush=True)  # fmt: skip
        path.unlink()


def many(folder: Path, count: int) -> None:
    photos = folder / "photos"
    photos.mkdir()
    contents = [hostile.saved(hostile.picture((64, 48), seed), "JPEG") for seed in range(200)]
    for number in range(count):
        (photos / f"{number}.jpg").write_bytes(contents[number % len(contents)])
    for name in hostile.NAMES:
        Path(os.fsdecode(os.path.join(os.fsencode(photos), name))).write_bytes(contents[0])
    with Engine.open(folder / "index", model="tiny", notify=lambda line: None) as engine:
        for what in ("indexed", "looked at again"):
            started = time.monotonic()
            report = engine.index([photos])
            print(f"{count:,} files in one folder: {what} in {time.monotonic() - started:.1f} s, "
                  f"{report.added} added, {report.failed} failed", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""What a process that stays open does: one changed file, and queries from several threads.

    python benchmarks/warm.py --count 100000

An index of so many made-up pictures (every second one with a caption) takes in one real picture
again and again; what decoding and encoding take alone stands beside it. Then threads ask for texts,
with captions: queries a second, over the same by one thread, and what as many processes as cores
do, which share nothing but the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

import load
import numpy as np

from mmsearch import Engine
from mmsearch.config import Settings, available_cores, load_settings
from mmsearch.datasets import scene_art, scenes

TEXTS = ("a dog on the beach", "two people in the snow", "a man riding a bike", "a red car")
RUNS, SECONDS = 30, 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmsearch-warm-") as scratch:
        load.make(Path(scratch), args.count)
        picture = Path(scratch) / "photos" / "one.png"
        picture.parent.mkdir()
        settings = load_settings(index=Path(scratch) / "index")
        with Engine(settings, notify=lambda line: None) as engine:
            one_file(engine, picture)
        settings = dataclasses.replace(settings, streams=available_cores())
        with Engine(settings, notify=lambda line: None) as engine:
            threads(engine)
        with multiprocessing.get_context("spawn").Pool(available_cores()) as pool:
            rates = pool.map(one_process, [settings] * available_cores(), chunksize=1)
        print(f"{len(rates)} processes of one thread each: {sum(rates):.0f} queries/s")


def one_file(engine: Engine, picture: Path) -> None:
    taken, decoding, encoding = [], [], []
    encoder = engine.opened.encoder_of(engine.opened.space.spec)
    how = encoder.spec.inputs["image"]
    for number in range(RUNS + 5):
        scene_art.render(scenes.scene(number)).resize((500, 375)).save(picture)
        taken.append(seconds(lambda: engine.index(picture)))
        with engine.opened.decoders.open(os.fsencode(picture)) as file:
            begun = time.perf_counter()
            pixels = file.pixels(how)
            decoding.append(time.perf_counter() - begun)
        encoding.append(seconds(lambda one=pixels: encoder.encode("image", one[None])))
    whole, decoded, encoded = (1e3 * np.median(one[5:]) for one in (taken, decoding, encoding))
    print(f"one changed file: {whole:.1f} ms; decoding {decoded:.1f} and encoding {encoded:.1f} "
          f"alone, {whole - decoded - encoded:.1f} on top")  # fmt: skip


def threads(engine: Engine) -> None:
    for text in TEXTS:
        engine.search(text)
    rates = {count: rate(engine, count) for count in (1, 2, 4, 8)}
    for count, found in rates.items():
        print(f"{count} threads: {found:.0f} queries/s, {found / rates[1]:.2f} times one thread's")


def one_process(settings: Settings) -> float:
    with Engine(settings, notify=lambda line: None) as engine:
        for text in TEXTS:
            engine.search(text)
        return rate(engine, 1)


def rate(engine: Engine, count: int) -> float:
    done, stop = [0] * count, time.perf_counter() + SECONDS

    def ask(place: int) -> None:
        for text in itertools.cycle(TEXTS):
            if time.perf_counter() > stop:
                return
            engine.search(text)
            done[place] += 1

    workers = [threading.Thread(target=ask, args=(place,)) for place in range(count)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    return sum(done) / SECONDS


def seconds(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()

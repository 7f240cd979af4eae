"""Readers beside a writer for a long while: `python benchmarks/load.py [--minutes 10]`.

An index of 100,000 media, half of them with a caption, in `tiny`'s space, with random vectors. One
process adds and removes pictures in fifties as fast as it can, and compacts now and then. Two
more, with four threads on one engine each, search all the time: by vector for a picture that is
coming and going, by text, by text with captions. What was committed before such a search began and
is there until it ended has to be its first hit; what was removed before has to be none. Printed
are errors, wrong answers, latencies, memory and open files at the beginning and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from mmsearch import Engine
from mmsearch.store.rows import CaptionRecord, Item, MediaRecord, SegmentRecord
from mmsearch.store.store import Store
from mmsearch.types import Facts

SLOTS, TOGETHER, COMPACT_EVERY = 2000, 50, 40
TEXTS = ("a red car", "two dogs in the snow", "a bird over a lake", "number 77", "a green boat")
WORDS = ("red car", "white dog", "green boat", "bird over a lake", "house in the snow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--media", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--role", choices=("write", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        print(json.dumps({"write": write, "read": read}[args.role](args.folder, args.minutes)))
        return
    with tempfile.TemporaryDirectory(prefix="mmsearch-load-") as scratch:
        folder = Path(scratch)
        np.zeros(SLOTS, np.int64).tofile(folder / "state")
        make(folder, args.media)
        print(f"{args.media:,} media, {args.minutes:g} minutes", flush=True)
        same = ["--folder", folder, "--minutes", str(args.minutes)]
        processes = [
            subprocess.Popen([sys.executable, __file__, "--role", role, *same],
                             stdout=subprocess.PIPE)
            for role in ("write", "read", "read")
        ]  # fmt: skip
        wrote, *readers = (json.loads(one.communicate()[0]) for one in processes)
        with Engine.open(folder / "index") as engine:
            damages = engine.verify(deep=True).damages
    print("writer: " + ", ".join(f"{name} {value}" for name, value in wrote.items()))
    for name in ("by vector", "by text", "by text and captions"):
        spent = np.concatenate([one["spent"][name] for one in readers])
        print(f"{name}: {len(spent)} searches, p50 {np.quantile(spent, 0.5):.1f} ms, "
              f"p99 {np.quantile(spent, 0.99):.1f} ms, slowest {spent.max():.0f} ms")  # fmt: skip
    for one in readers:
        memory, files = zip(*one["samples"], strict=True)
        print(f"a reader: {one['checked']} answers checked, {one['wrong']} wrong, "
              f"{one['errors']} errors; memory {memory[0]:.0f} MB after a tenth, at most "
              f"{max(memory):.0f}, at the end {memory[-1]:.0f}; open files {files[0]}, at most "
              f"{max(files)}, at the end {files[-1]}")  # fmt: skip
    print(f"verify --deep: {damages or 'sound'}")
    if damages or any(one["wrong"] or one["errors"] for one in readers):
        sys.exit(1)


def vector_of(slot: int, version: int, dim: int) -> np.ndarray:
    found = np.random.default_rng((slot, version)).normal(size=dim).astype(np.float32)
    return found / np.linalg.norm(found)


def media(root: int, name: str, vector, caption: str | None = None) -> MediaRecord:
    return MediaRecord(
        root, name.encode(), 1, 1, name.encode()[-16:],
        Facts(1, 1),
        [SegmentRecord("image", vector)],
        [CaptionRecord(caption, "file", vector)] if caption else [],
    )  # fmt: skip


def make(folder: Path, count: int) -> None:
    with Engine.open(folder / "index", model="tiny", notify=lambda line: None) as engine:
        spec = engine.opened.encoder_to_add().spec
        rng = np.random.default_rng(0)
        with engine.opened.make().writer() as writer:
            space = writer.space_of(spec, "imported")
            root = writer.place([b"/load/any"])[0][b"/load/any"]
            for start in range(0, count, 10_000):
                vectors = rng.normal(size=(min(10_000, count - start), spec.dim))
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                with writer.change() as change:
                    for number, vector in enumerate(vectors.astype(np.float32), start):
                        caption = f"a {WORDS[number % 5]}, number {number}" if number % 2 else None
                        change.add_media(media(root.id, f"{number}", vector, caption), space)
            writer.compact()


def write(folder: Path, minutes: float) -> dict[str, int]:
    state = np.memmap(folder / "state", np.int64, "r+")
    rng, rounds, added, removed = np.random.default_rng(1), 0, 0, 0
    deadline = time.monotonic() + 60 * minutes
    with Engine.open(folder / "index", notify=lambda line: None) as engine:
        while time.monotonic() < deadline:
            rounds += 1
            chosen = rng.choice(SLOTS, TOGETHER, replace=False)
            before = state[chosen].copy()
            state[chosen] = -1
            with engine.store.writer() as writer:
                space = engine.store.active_space()
                root = writer.place([b"/load/any"])[0][b"/load/any"]
                # Odd: there, with the vector of that version. Even: not there.
                if gone := [slot for slot, was in zip(chosen, before, strict=True) if was % 2]:
                    writer.remove([b"/load/slot%d" % slot for slot in gone])
                    removed += len(gone)
                with writer.change() as change:
                    for slot, was in zip(chosen.tolist(), before.tolist(), strict=True):
                        if was % 2 == 0:
                            vector = vector_of(slot, was + 1, space.spec.dim)
                            change.add_media(media(root.id, f"slot{slot}", vector), space)
                            added += 1
                if rounds % COMPACT_EVERY == 0:
                    writer.compact()
            state[chosen] = before + 1
    return {"commits": 2 * rounds, "added": added, "removed": removed,
            "compactions": rounds // COMPACT_EVERY}  # fmt: skip


def nearest(store: Store, vector: np.ndarray) -> list[Item]:
    with store.reader() as reader:
        _, ids = reader.nearest("image", vector[None], 10)[0]
        items = reader.items("image", ids.tolist())
        return [items[number] for number in ids.tolist()]


def read(folder: Path, minutes: float) -> dict[str, object]:  # noqa: C901 - its threads
    state = np.memmap(folder / "state", np.int64, "r")
    deadline = time.monotonic() + 60 * minutes
    spent: dict[str, list[float]] = {"by vector": [], "by text": [], "by text and captions": []}
    totals = {"checked": 0, "wrong": 0, "errors": 0}
    samples: list[tuple[float, int]] = []
    with Engine.open(folder / "index", notify=lambda line: None) as engine:
        spec = engine.store.active_space().spec

        def timed(name, search):
            begun = time.perf_counter()
            found = search()
            spent[name].append(1e3 * (time.perf_counter() - begun))
            return found

        def by_vector(rng) -> None:
            slot = int(rng.integers(SLOTS))
            before = int(state[slot])
            if before < 1:
                return
            vector = vector_of(slot, before - 1 + before % 2, spec.dim)
            items = timed("by vector", lambda: nearest(engine.store, vector))
            if int(state[slot]) != before:
                return
            totals["checked"] += 1
            path = b"/load/slot%d" % slot
            places = [place for place, item in enumerate(items) if item.path == path]
            if places != ([0] if before % 2 else []):
                totals["wrong"] += 1

        def look(seed: int) -> None:
            rng = np.random.default_rng(seed + os.getpid())
            while time.monotonic() < deadline:
                try:
                    kind = rng.random()
                    text = TEXTS[int(rng.integers(len(TEXTS)))]
                    if kind < 0.6:
                        by_vector(rng)
                    elif kind < 0.8:
                        found = timed("by text", lambda t=text: engine.search(t, fusion="image"))
                        totals["wrong"] += len(found) != 10
                    else:
                        found = timed("by text and captions", lambda t=text: engine.search(t))
                        totals["wrong"] += len(found) != 10
                except Exception as error:  # noqa: BLE001 - all are counted
                    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    totals["errors"] += 1

        threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for number in range(10):
            time.sleep(max(0.0, deadline - 6 * minutes * (9 - number) - time.monotonic()))
            status = Path("/proc/self/status").read_text()
            anonymous = int(status.partition("RssAnon:")[2].split()[0]) / 1e3
            samples.append((anonymous, len(os.listdir("/proc/self/fd"))))
        for thread in threads:
            thread.join()
    return {**totals, "spent": spent, "samples": samples}


if __name__ == "__main__":
    main()

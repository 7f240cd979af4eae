"""What grows with an index, and what does not: `python benchmarks/growth.py --data DIR`.

Indexes of 10,000, 100,000 and 1,000,000 media, with vectors like those of `ivf.py` in
`tiny`'s space, a fiftieth of them under one folder that a filter names. For each: making it,
compaction (with inverted lists), adding and removing 100, indexing one more file and
rescanning all of them as processes, opening, a cold query as a process, warm queries, what of
them is the text tower's, filtered ones, exact ones, bytes on disk, and the memory of a process
that searches without what is mapped from files. `slope` is that of the log of a figure over the log
of the media: 0 does not grow, 1 grows with them. --plot draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from ivf import NEIGHBOURS, embeddings, mixed

from mmsearch import Engine
from mmsearch.store.rows import MediaRecord, SegmentRecord
from mmsearch.store.store import Store
from mmsearch.types import Facts

FILTERED = 1 / 50
TEXTS = ("a dog runs over the grass", "two people on a beach at sunset", "a red car",
         "a child in a pink dress is climbing up a set of stairs", "snowy mountains")  # fmt: skip
WARM = """
import json, sys, time
import numpy as np
from pathlib import Path
from mmsearch import Engine, Filter, Query, Term
folder, texts, repeats = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
started = time.perf_counter()
with Engine.open(folder) as engine:
    engine.store.active_space()
    found = {"opening, ms": 1e3 * (time.perf_counter() - started)}
    def measured(name, **options):
        spent = []
        for number in range(repeats):
            query = Query((Term(text=texts[number % len(texts)]),), fusion="image", **options)
            begun = time.perf_counter()
            assert len(engine.search(query)) == 10
            spent.append(1e3 * (time.perf_counter() - begun))
        found[f"{name}, p50 ms"] = np.median(spent[5:])
        found[f"{name}, p99 ms"] = np.quantile(spent[5:], 0.99)
    spent = []
    for number in range(repeats):
        begun = time.perf_counter()
        with engine.searcher() as searcher:
            searcher.embed((Term(text=texts[number % len(texts)]),))
        spent.append(1e3 * (time.perf_counter() - begun))
    found["its text tower, p50 ms"] = np.median(spent[5:])
    measured("warm query")
    measured("filtered", filter=Filter(under=Path(sys.argv[4])))
    status = Path("/proc/self/status").read_text()
    found["memory, MB"] = int(status.partition("RssAnon:")[2].split()[0]) / 1e3
    measured("exact query", exact=True)
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--features", type=Path, help="keep the embeddings of the photos here")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    own = embeddings(args.data, args.features)["photos"]
    near = np.concatenate([
        np.argpartition(-(some @ own.T), NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        for some in np.array_split(own, 16)
    ])  # fmt: skip
    example = next(iter(sorted((args.data / "photos").iterdir())))
    table: dict[str, list[float]] = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            for name, value in one(Path(folder), size, own, near, example).items():
                table.setdefault(name, []).append(value)
        print(f"{size:,} media: done", file=sys.stderr, flush=True)
    print(f"{'':24}" + "".join(f"{size:>12,}" for size in args.sizes) + "   slope")
    for name, values in table.items():
        shown = "".join(f"{value:12.4g}" for value in values)
        print(f"{name:24}{shown}   {slope(args.sizes, values):5.2f}")
    if args.plot is not None:
        plot(args.sizes, table, args.plot)


def one(folder: Path, size: int, own, near, example: Path) -> dict[str, float]:
    index, top = folder / "index", os.fsencode(folder / "photos")
    rng = np.random.default_rng(size)
    found: dict[str, float] = {}

    def add(count: int, start: int, store: Store, spec) -> None:
        with store.writer() as writer:
            space = writer.space_of(spec, "imported")
            with store.catalog.read() as queries:
                roots = queries.roots()
            if roots:
                root = roots[0]
            else:
                with writer.change() as change:
                    root = change.add_root(top, walked=True)
            for first in range(start, start + count, 5000):
                some = range(first, min(first + 5000, start + count))
                rows = rng.integers(len(own), size=len(some))
                vectors = mixed(own, near, rows, rng).astype(np.float32)
                with writer.change() as change:
                    for number, vector in zip(some, vectors, strict=True):
                        change.add_media(media(root, number, size, vector), space)
            begun = time.perf_counter()
            writer.compact(only_if="short")
            found["compaction, s"] = time.perf_counter() - begun

    for number in range(size + 100):
        touch(os.path.join(top, path_of(number, size)), number)
    with Engine.open(index, model="tiny") as engine:
        spec = engine.opened.encoder_to_add().spec
        store = Store.create(index)
        begun = time.perf_counter()
        add(size, 0, store, spec)
        found["making it, s"] = time.perf_counter() - begun
        made = found["compaction, s"]
        begun = time.perf_counter()
        add(100, size, store, spec)
        found["adding 100, s"] = time.perf_counter() - begun
        found["compaction, s"] = made
        begun = time.perf_counter()
        with store.writer() as writer:
            gone = [os.path.join(top, b"a", b"%07d.jpg" % number) for number in range(100)]
            writer.remove(gone)
        found["removing 100, s"] = time.perf_counter() - begun
        for path in gone:
            os.unlink(path)
        store.close()
    photo = folder / "photo.jpg"
    spent = []
    for number in range(5):
        photo.write_bytes(example.read_bytes() + bytes([number]))
        spent.append(process("index", photo, "--index", index))
    found["indexing a file, s"] = float(np.median(spent[1:]))
    found["rescan, s"] = process("index", "--index", index)
    queries = [process("search", TEXTS[0], "--index", index) for _ in range(7)]
    found["cold query, s"] = float(np.median(queries[2:]))
    command = [sys.executable, "-c", WARM, str(index), json.dumps(TEXTS), "205",
               os.fsdecode(os.path.join(top, b"a"))]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found |= json.loads(done.stdout)
    found["disk, MB"] = sum(p.stat().st_size for p in index.rglob("*") if p.is_file()) / 1e6
    return found


def path_of(number: int, size: int) -> bytes:
    part = b"a" if number < FILTERED * size + 100 else b"b%03d" % (number % 997)
    return part + b"/%07d.jpg" % number


def media(root, number: int, size: int, vector) -> MediaRecord:
    name = path_of(number, size)
    return MediaRecord(
        root_id=root.id, path=name, size=1, mtime_ns=number, content_hash=name,
        facts=Facts(640, 480),
        segments=[SegmentRecord("image", vector)],
    )  # fmt: skip


def touch(path: bytes, mtime_ns: int) -> None:
    """A file as the catalog says: a rescan looks at nothing but its size and time."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path))
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(file, b".")
    os.utime(file, ns=(mtime_ns, mtime_ns))
    os.close(file)


def process(*arguments: object) -> float:
    """The seconds of a whole process."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "mmsearch", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def slope(sizes, values) -> float:
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0])


#: What is drawn on the left: all else is what somebody waits for.
GROWS = ("making it", "compaction", "rescan", "exact", "filtered", "memory", "disk")


def plot(sizes, table, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    for name, values in table.items():
        axis = axes[0] if name.startswith(GROWS) else axes[1]
        axis.loglog(sizes, values, marker="o", label=f"{name} ({slope(sizes, values):.2f})")
    for axis, title in zip(axes, ("grows with the index", "does not"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("media")
        axis.legend(
            fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15),
            title="figure (slope)",
        )  # fmt: skip
        axis.grid(visible=True, alpha=0.3)
        axis.margins(y=0.15)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

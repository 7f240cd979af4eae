"""What `base` and `base-multilingual` cost here: `python benchmarks/base.py --data DIR`.

Both with random weights, since speed does not depend on them, and tokenizers of their kind and
size, as ONNX folders (tests/onnx_models.py). Prints how long each takes to prepare, what indexing
reaches in each precision, with a caption for each photo and without, and the largest memory of
each; then cold queries (new process, warm disk; medians) beside rclip's over the same photos, whose
model is ViT-B-32-256 (benchmarks/compare.py has more of that).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from compare import QUERY, prepare, rclip, rclip_query, timed
from ingest import photos

MODELS = Path(__file__).parents[1] / "tests" / "onnx_models.py"
#: Their architectures.
BASE, MULTILINGUAL = "ViT-B-32", "ViT-B-32-SigLIP2-256"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--work", type=Path, default=Path("build/compare"))
    parser.add_argument("--architectures", nargs="+", default=[BASE, MULTILINGUAL])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"MMSEARCH_CACHE": str(work / "cache"), "MMSEARCH_HOME": str(work / "home"),
                   "RCLIP_DATADIR": str(work / "rclip")}  # fmt: skip
    folder = work / f"small-{args.images}"
    if not folder.is_dir():
        photos(args.data / "photos", folder, args.images, large=False)
    prepare(work)
    rclip(work, folder)
    queries = {"rclip 3.3": lambda: rclip_query(work, folder)}
    for name in args.architectures:
        if not (work / name).is_dir():  # in a process of its own: it takes torch
            subprocess.run([sys.executable, MODELS, name, work / name], check=True)
        index = work / f"{name}.index"
        costs(name, f"onnx:{work / name}", folder, work, index)
        queries[name] = lambda index=index: measured("search", QUERY, index=index, fresh=False)
    for query in queries.values():
        query()
    cold = {name: [] for name in queries}
    for _ in range(args.repeats):  # in turns, so that what disturbs the machine disturbs all
        for name, query in queries.items():
            cold[name] += timed(query, 1)
    reference = statistics.median(cold["rclip 3.3"])
    for name, seconds in cold.items():
        found = statistics.median(seconds)
        print(f"{name}: cold query {found:.2f} s ({found / reference:.2f} of rclip's)")


def costs(name, model, folder, work, index):
    """Prepares a model, and indexes with it."""
    shutil.rmtree(work / "cache" / "models", ignore_errors=True)
    took, memory, _ = measured("index", next(folder.iterdir()), "--model", model, index=index)
    print(f"{name}: prepared in {took:.0f} s, {memory:.2f} GB", flush=True)
    files = sorted(folder.iterdir())
    captions = work / "captions.csv"
    lines = [f"{file.name},a dog runs over the grass, number {file.stem}" for file in files]
    captions.write_text("image,caption\n" + "\n".join(lines) + "\n")
    for precision in ("fp32", "bf16"):
        for what in ((), ("--captions", captions)):
            _, memory, report = measured(
                "index", folder, "--model", model, *what, "--precision", precision, index=index
            )
            print(f"{name}, {precision}{', captions' if what else ''}: "
                  f"{len(files) / report['seconds']:.1f} images/s, {memory:.2f} GB",
                  flush=True)  # fmt: skip
    _, memory, _ = measured("search", QUERY, index=index, fresh=False)
    print(f"{name}: a search takes {memory:.2f} GB", flush=True)


def measured(command, *arguments, index, fresh=True):
    """Seconds, the largest memory in GB, and what it reported."""
    if fresh:
        shutil.rmtree(index, ignore_errors=True)
    words = [sys.executable, "-m", "mmsearch", command, *map(str, arguments), "--index", str(index)]
    started = time.perf_counter()
    with subprocess.Popen([*words, "--json"], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as running:  # fmt: skip
        said = running.stdout.read()
        _, status, usage = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
    assert running.returncode == 0, words
    report = json.loads(said) if command == "index" else None
    return time.perf_counter() - started, usage.ru_maxrss / 1e6, report


if __name__ == "__main__":
    main()

"""How near indexing comes to what the machine can do: `python benchmarks/ingest.py --data DIR`.

The photos of DIR, several times over: each copy has other bytes behind its end, so that it is
another file to whoever hashes it, and the same picture. With d and e the CPU seconds that one
core takes to decode and to encode one image when it does nothing else, cores / (d + e) images a
second is the most there is; the table gives what `mmsearch index` reaches of it, its stages and
its largest memory. `--large` takes the photos at 4000 x 3000 pixels instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mmsearch.config import load_settings
from mmsearch.encoders.encoder_provider import EncoderProvider
from mmsearch.media.fit import fit
from mmsearch.media.image import decode

LARGE = (4000, 3000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--models", nargs="+", default=["tiny"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        photos(args.data / "photos", folder, args.images, large=args.large)
        print(f"{args.images} photos, {cores} cores")
        print("model, precision: decode + encode, CPU ms an image; the most there is; reached; "
              "stages, CPU or wall seconds; largest memory")  # fmt: skip
        for model in args.models:
            for precision in args.precisions:
                one(model, precision, folder, Path(scratch), cores)


def photos(source: Path, folder: Path, count: int, *, large: bool) -> None:
    """So many photos that differ in their bytes."""
    folder.mkdir()
    originals = sorted(source.iterdir())
    made = []
    for path in originals:
        content = path.read_bytes()
        if large:
            with Image.open(path) as image:
                big = Path(folder) / "big.jpg"
                image.convert("RGB").resize(LARGE, Image.Resampling.BICUBIC).save(big, quality=90)
            content = big.read_bytes()
            big.unlink()
        made.append(content)
        if len(made) == count:
            break
    for number in range(count):
        mark = number.to_bytes(4, "little")
        (folder / f"{number:06}.jpg").write_bytes(made[number % len(made)] + mark)


def one(model: str, precision: str, folder: Path, scratch: Path, cores: int) -> None:
    settings = load_settings(precision=precision)
    encoder = EncoderProvider(settings, print, None).for_new_index(model, "cpu")
    how = encoder.spec.preprocess
    contents = [path.read_bytes() for path in sorted(folder.iterdir())[:100]]
    started = time.process_time()
    pixels = np.stack([fit(decode(one, at_least=how.size).image, how) for one in contents])
    decoding = (time.process_time() - started) / len(contents)
    encoding = min(alone(encoder, pixels) for _ in range(2))
    bound = cores / (decoding + encoding)
    index = scratch / "index"
    shutil.rmtree(index, ignore_errors=True)
    report, memory = run(folder, index, model, precision)
    rate = report["images_per_second"]
    stages = " ".join(f"{name} {seconds:.1f}" for name, seconds in report["stages"].items())
    print(
        f"{model}, {precision}: {1e3 * decoding:.1f} + {1e3 * encoding:.1f}; {bound:.0f}/s; "
        f"{rate:.0f}/s, {100 * rate / bound:.0f}%; {stages}; {memory:.2f} GB",
        flush=True,
    )


def alone(encoder, pixels) -> float:
    """CPU seconds to encode one image, by one thread that has the machine to itself."""
    slow = encoder.with_streams(os.cpu_count() or 1)  # of which one works, on its one core
    slow.encode("image", pixels[: slow.batch])
    started = time.process_time()
    for start in range(0, len(pixels), slow.batch):
        slow.encode("image", pixels[start : start + slow.batch])
    return (time.process_time() - started) / len(pixels)


def run(folder: Path, index: Path, model: str, precision: str) -> tuple[dict, float]:
    command = [sys.executable, "-m", "mmsearch", "index", str(folder), "--index", str(index),
               "--model", model, "--precision", precision, "--json"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return json.loads(out), usage.ru_maxrss / 1e6


if __name__ == "__main__":
    main()

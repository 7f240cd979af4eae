"""What a card does with a folder: `python benchmarks/gpu.py --data DIR --model MODEL`.

Indexes photos of DIR with torch in bf16 on the card, and says which limit the rate stands against:
the card alone (pixels that lie in its memory already), the same from the machine's memory, and
decoding alone, by threads and by processes. `share` is the card's rate times the model's
operations an image, over what the card reaches in one large bf16 matrix product, measured here.
Without a card, --device cpu tries the script itself.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from ingest import photos
from torch.utils.flop_counter import FlopCounterMode

from mmsearch import Engine
from mmsearch.encoders.open_clip import ImageTower, TorchEncoder, load_model
from mmsearch.encoders.registry import parse_model
from mmsearch.media.fit import fit
from mmsearch.media.image import decode
from mmsearch.types import Preprocess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--model", default="ViT-B-32-256/datacomp_s34b_b86k")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {os.cpu_count()} cores, {args.model}, bf16, batches of {args.batch}")
    source = parse_model(args.model)
    loaded = load_model(source)
    how = loaded.spec.preprocess
    tower = ImageTower(loaded)
    flops = operations(tower, how)
    tower = tower.to(device).to(memory_format=torch.channels_last)
    encoder = TorchEncoder(loaded, args.device, "bf16")
    peak = matrix_peak(device)
    pixels = np.zeros((args.batch, *how.size, 3), np.uint8)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        lying = torch.from_numpy(pixels).to(device)
        alone = args.batch / seconds(lambda: tower(lying), device)
    fed = args.batch / seconds(lambda: encoder.encode("image", pixels), device)
    share = alone * flops / peak
    print(f"the card alone: {alone:.0f} images/s, {share:.0%} of {peak / 1e12:.1f} TFLOP/s "
          f"({flops / 1e9:.2f} GFLOP an image); from the machine's memory: {fed:.0f}")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        photos(args.data / "photos", folder, args.images, large=False)
        files = sorted(folder.iterdir())
        workers = os.cpu_count() or 1
        for kind in (ThreadPoolExecutor, ProcessPoolExecutor):
            rate = decoding(kind(workers), files[:2000], how)
            print(f"decoding, {workers} {kind.__name__.removesuffix('PoolExecutor').lower()} "
                  f"workers: {rate:.0f} images/s", flush=True)  # fmt: skip
        index = Path(scratch) / "index"
        with Engine.open(index, model=args.model, device=args.device, precision="bf16") as engine:
            report = engine.index([folder])
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in report.stages.items())
        print(f"indexing: {report.images_per_second:.0f} images/s ({stages})")


def operations(tower: torch.nn.Module, how: Preprocess) -> float:
    """Multiplications and additions an image."""
    torch.backends.mha.set_fastpath_enabled(False)  # it hides the attention from the counter
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        tower(torch.zeros((1, *how.size, 3), dtype=torch.uint8))
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


def matrix_peak(device: torch.device, size: int = 8192) -> float:
    """Operations a second in one large product."""
    size = size if device.type == "cuda" else 2048
    one, other = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / seconds(lambda: one @ other, device)


def seconds(action, device: torch.device, repeats: int = 20) -> float:
    """The median time of one call, after some to get warm."""
    spent = []
    for number in range(repeats + 3):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 3:
            spent.append(time.perf_counter() - started)
    return float(np.median(spent))


def decoding(pool: Executor, files: list[Path], how: Preprocess) -> float:
    with pool:
        list(pool.map(pixels_of, files[:64], [how] * 64))  # the workers are there
        started = time.perf_counter()
        list(pool.map(pixels_of, files, [how] * len(files), chunksize=16))
        return len(files) / (time.perf_counter() - started)


def pixels_of(file: Path, how: Preprocess) -> int:
    return fit(decode(file.read_bytes(), at_least=how.size).image, how).nbytes


if __name__ == "__main__":
    main()

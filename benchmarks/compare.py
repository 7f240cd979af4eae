"""mmsearch beside its neighbours, in one run: `python benchmarks/compare.py --data DIR`.

The same photos for rclip, for a plain loop and for mmsearch, on the same machine, and the same
architecture: ViT-B-32-256 with random weights, since speed does not depend on them. rclip is
installed into an environment of its own below --work, which is kept for the next time, and given
the weights as ONNX, exported here. "Plain" is what one writes with open_clip: Pillow, its own
transform, batches of 32, torch. Every figure is a whole process, from its start to its end, the
model converted or exported before; medians of --repeats. --plot draws them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

from ingest import photos

ARCHITECTURE = "ViT-B-32-256"
RCLIP = "rclip==3.3.0"
QUERY = "a dog running on the beach"
#: How rclip calls its model's folder.
RCLIP_FOLDER = "ViT-B-32-256-datacomp_s34b_b86k"

EXPORT = """
import sys, warnings
import open_clip, torch
from safetensors.torch import save_file
warnings.simplefilter("ignore")
torch.manual_seed(0)
torch.backends.mha.set_fastpath_enabled(False)
model = open_clip.create_model({architecture!r}).eval()
save_file(model.state_dict(), {weights!r})
class Tower(torch.nn.Module):
    def __init__(self, encode):
        super().__init__()
        self.encode = encode
        self.model = model
    def forward(self, input):
        return self.encode(input)
def export(encode, example, path):
    torch.onnx.export(Tower(encode), (example,), path, input_names=["input"], dynamo=False,
                      output_names=["output"], opset_version=17,
                      dynamic_axes={{"input": {{0: "n"}}, "output": {{0: "n"}}}})
with torch.no_grad():
    export(model.encode_image, torch.zeros(2, 3, 256, 256), {folder!r} + "/visual.onnx")
    export(model.encode_text, torch.zeros(2, 77, dtype=torch.int64), {folder!r} + "/textual.onnx")
"""

PLAIN = """
import sys
from pathlib import Path
import open_clip, torch
from PIL import Image
found = open_clip.create_model_and_transforms({architecture!r}, pretrained={weights!r})
model, _, transform = found
model.eval()
files = sorted(Path({photos!r}).iterdir())
with torch.inference_mode():
    rows = []
    for start in range(0, len(files), 32):
        batch = [transform(Image.open(file)) for file in files[start : start + 32]]
        found = model.encode_image(torch.stack(batch))
        rows.append(found / found.norm(dim=-1, keepdim=True))
    torch.save(torch.cat(rows), {out!r})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--work", type=Path, default=Path("build/compare"))
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--large", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"MMSEARCH_CACHE": str(work / "cache"), "MMSEARCH_HOME": str(work / "home"),
                   "RCLIP_DATADIR": str(work / "rclip")}  # fmt: skip
    weights = prepare(work)
    folders = {}
    for size, count in (("small", args.small), ("large", args.large)):
        folders[size] = work / f"{size}-{count}"
        if not folders[size].is_dir():
            photos(args.data / "photos", folders[size], count, large=size == "large")
    model = f"{ARCHITECTURE}:{weights}"
    warm_up(work, model, folders["small"])
    print(f"{platform.machine()}, {os.cpu_count()} cores; {args.small} photos of 500 x 375, "
          f"{args.large} of 4000 x 3000")  # fmt: skip
    rows = {
        "rclip 3.3": lambda folder: rclip(work, folder),
        "plain open_clip and torch": lambda folder: plain(work, weights, folder),
        f"mmsearch {ARCHITECTURE} fp32": lambda folder: mmsearch(work, model, "fp32", folder),
        f"mmsearch {ARCHITECTURE} bf16": lambda folder: mmsearch(work, model, "bf16", folder),
        f"mmsearch {ARCHITECTURE} int8": lambda folder: mmsearch(work, model, "int8", folder),
        "mmsearch tiny": lambda folder: mmsearch(work, "tiny", "auto", folder),
    }
    rates: dict[str, dict[str, float]] = {}
    for name, index in rows.items():
        rates[name] = {}
        for size, folder in folders.items():
            count = len(list(folder.glob("*.jpg")))
            seconds = statistics.median(timed(functools.partial(index, folder), args.repeats))
            rates[name][size] = count / seconds
        ratios = [rates[name][size] / rates["rclip 3.3"][size] for size in folders]
        print(f"{name:30} {rates[name]['small']:6.1f} images/s ({ratios[0]:.2f} of rclip's), large "
              f"{rates[name]['large']:6.1f} ({ratios[1]:.2f})", flush=True)  # fmt: skip
    small = folders["small"]
    rclip(work, small)
    mmsearch(work, model, "auto", small, fresh=False, index="vit")
    mmsearch(work, "tiny", "auto", small, fresh=False, index="tiny")
    queries = {
        "rclip 3.3": lambda: rclip_query(work, small),
        f"mmsearch {ARCHITECTURE}": lambda: run("search", QUERY, "--index", work / "vit"),
        "mmsearch tiny": lambda: run("search", QUERY, "--index", work / "tiny"),
    }
    cold = {}
    for name, query in queries.items():
        query()
        cold[name] = statistics.median(timed(query, 3 * args.repeats))
        print(f"{name:30} cold query {cold[name]:.2f} s ({cold[name] / cold['rclip 3.3']:.2f} of "
              "rclip's)", flush=True)  # fmt: skip
    if args.plot is not None:
        plot(rates, cold, args.plot)


def prepare(work: Path) -> Path:
    """rclip in an environment of its own, and one random model for all; returns its weights."""
    weights, folder = work / "weights.safetensors", work / "rclip" / RCLIP_FOLDER
    python = work / "env/bin/python"
    if not (work / "env/bin/rclip").is_file():
        venv.create(work / "env", with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", RCLIP], check=True)
    if not (folder / "textual.onnx").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        code = EXPORT.format(architecture=ARCHITECTURE, weights=str(weights), folder=str(folder))
        subprocess.run([sys.executable, "-c", code], check=True)
        import open_clip

        vocabulary = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
        (work / "rclip/tokenizer").mkdir(exist_ok=True)
        shutil.copy(vocabulary, work / "rclip/tokenizer")
    return weights


def warm_up(work: Path, model: str, folder: Path) -> None:
    """Converts what has to be converted once, and compiles for this machine."""
    for name, precision in ((model, "fp32"), (model, "bf16"), (model, "int8"), ("tiny", "auto")):
        mmsearch(work, name, precision, folder)


def timed(action, repeats: int) -> list[float]:
    spent = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        spent.append(time.perf_counter() - started)
    return spent


def run(*arguments: object) -> str:
    command = [sys.executable, "-m", "mmsearch", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def mmsearch(work, model, precision, folder, *, fresh=True, index="index") -> None:
    if fresh:
        shutil.rmtree(work / index, ignore_errors=True)
    report = json.loads(run("index", folder, "--index", work / index, "--model", model,
                            "--precision", precision, "--json"))  # fmt: skip
    assert report["failed"] == 0


def rclip(work: Path, folder: Path) -> None:
    for path in (work / "rclip").glob("*.sqlite*"):
        path.unlink()
    rclip_query(work, folder, "--top", "1")


def rclip_query(work: Path, folder: Path, *options: str) -> None:
    what = options or ("--no-indexing",)
    command = [work / "env/bin/rclip", "--filepath-only", *what, QUERY]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def plain(work: Path, weights: Path, folder: Path) -> None:
    code = PLAIN.format(architecture=ARCHITECTURE, weights=str(weights), photos=str(folder),
                        out=str(work / "plain.pt"))  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def plot(rates, cold, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axis, size, title in ((axes[0], "small", "500 x 375"), (axes[1], "large", "4000 x 3000")):
        names = list(rates)[::-1]
        values = [rates[name][size] for name in names]
        axis.barh([n.replace(f" {ARCHITECTURE}", "") for n in names], values, color=colours(names))
        axis.bar_label(axis.containers[0], fmt="%.0f", padding=3)
        axis.set_title(f"indexing, images/s, {title}")
    names = list(cold)[::-1]
    axes[2].barh([n.replace(f" {ARCHITECTURE}", "") for n in names],
                 [cold[name] for name in names], color=colours(names))  # fmt: skip
    axes[2].bar_label(axes[2].containers[0], fmt="%.2f", padding=3)
    axes[2].set_title("cold query, seconds")
    figure.suptitle(
        f"{ARCHITECTURE} with random weights on {os.cpu_count()} cores; tiny is bundled"
    )
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    figure.savefig(path, dpi=110)


def colours(names):
    return ["#2a6fbb" if name.startswith("mmsearch") else "#b0b0b0" for name in names]


if __name__ == "__main__":
    main()

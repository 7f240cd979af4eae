"""What `mmsearch train align` gains: `python benchmarks/align.py --data DIR`.

Runs the command as a user does, in new processes: on photos of rooms with what people said of
them (DAQUAR, by its own split), which `tiny` did not learn from; on Flickr8k, which it did; and on
two files of vectors whose makers never saw each other: MobileNetV2's of Flickr8k's photos (1280
wide) and the mean of each caption's static word vectors (potion-base-4M, 128 wide). Prints how long
each took and what it came to on held-out photos. Everything goes to a temporary folder; with
--rooms DIR the captions of rooms are written there, and that is all.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tqdm import tqdm

from mmsearch.datasets.formats import read_labelled
from mmsearch.media.fit import fit
from mmsearch.media.image import decode
from mmsearch.types import Preprocess

PLACES = ("on", "in", "under", "behind", "above", "below", "between", "beside", "near", "left",
          "right", "attached", "hanging", "hung", "inside", "over", "around")  # fmt: skip
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MMSEARCH_DATA"))
    parser.add_argument("--rooms", type=Path, help="only lay out the captions of rooms here")
    args = parser.parse_args()
    if args.data is None:
        parser.error("say where the data sets are: --data DIR or MMSEARCH_DATA")
    if args.rooms:
        lay_out_rooms(args.data / "daquar", args.rooms)
        return
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MMSEARCH_CACHE"] = f"{scratch}/cache"
        lay_out_rooms(args.data / "daquar", Path(scratch) / "rooms")
        for head in ("linear", "residual"):
            align(f"tiny on rooms, {head}", f"{scratch}/rooms-{head}",
                  f"{scratch}/rooms", "--base", "tiny", "--head", head)  # fmt: skip
        files = features(args.data, Path(scratch))
        for head in ("linear", "residual"):
            align(f"MobileNetV2 x word vectors, {head}", f"{scratch}/{head}",
                  "--features", *files, "--head", head)  # fmt: skip
        for head in ("linear", "residual"):
            align(f"tiny on Flickr8k, {head}", f"{scratch}/tiny-{head}",
                  args.data / "flickr8k", "--base", "tiny", "--head", head)  # fmt: skip


def align(name, out, *arguments):
    started = time.perf_counter()
    command = [sys.executable, "-m", "mmsearch", "train", "align", *map(str, arguments),
               "--out", out, "--json"]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    took = time.perf_counter() - started
    report = json.loads(done.stdout)
    print(f"{name}: {took:.0f} s, learned from {report['images']['train']} photos, measured on "
          f"{report['images']['test']}")  # fmt: skip
    for when in ("before", "after"):
        if report[when]:
            both = [" / ".join(f"{report[when][f'{way}_R@{k}']:.1f}" for k in (1, 5, 10))
                    for way in ("t2i", "i2t")]  # fmt: skip
            print(f"  {when:6}  t2i {both[0]}   i2t {both[1]}")
    if report["overall"]:
        gain = report["overall"]
        print(f"  gain of the mean {gain['mean']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]"
              f"{'' if report['folder'] else ', not kept'}")  # fmt: skip


def lay_out_rooms(daquar: Path, out: Path) -> None:
    """Captions of photos of rooms, beside links to them: what people answered, as statements."""
    out.mkdir(parents=True, exist_ok=True)
    tested = set((daquar / "test_images_list.txt").read_text().split())
    said: dict[str, list[str]] = {}
    with (daquar / "data.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if text := statement(row["question"], row["answer"]):
                said.setdefault(row["image_id"], []).append(text)
    with (out / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for name, captions in said.items():
            link = out / f"{name}.jpg"
            if not link.is_symlink():
                link.symlink_to((daquar / f"images/{name}.jpg").resolve())
            split = "test" if name in tested else "train"
            row = {"file_name": link.name, "caption": captions, "split": split}
            file.write(json.dumps(row) + "\n")


def statement(question: str, answer: str) -> str | None:
    """A question about a place and its answer as one: "what is on the desk" and "lamp" make
    "lamp on the desk". None for other questions, and for those that name the picture's file."""
    asked = re.fullmatch(r"what (?:is|are) (?:the objects? )?(?:found )?(.+)", question)
    if not asked or asked[1].split()[0] not in PLACES or re.search(r"image\d", question):
        return None
    things = [one.strip().replace("_", " ") for one in answer.split(",")]
    return None if answer.isdigit() else f"{' and '.join(things)} {asked[1]}"


def features(data: Path, folder: Path) -> tuple[Path, Path]:
    """One row in both files for each caption that has a known word."""
    labelled = read_labelled(data / "flickr8k")
    network = timm.create_model("mobilenetv2_100", num_classes=0).eval()
    weights = torch.load(data / "weights/mobilenetv2_100_imagenet.pt", weights_only=True)
    network.load_state_dict(weights, strict=False)
    how = Preprocess((224, 224), *IMAGENET, "bicubic", "squash")
    rows = []
    files = [data / "flickr8k/images" / image.file for image in labelled.images]
    with torch.inference_mode():
        for start in tqdm(range(0, len(files), 32), unit_scale=32, unit=" photos"):
            pixels = np.stack([fit(decode(file.read_bytes()).image, how)
                               for file in files[start : start + 32]])  # fmt: skip
            scaled = (torch.from_numpy(pixels) / 255 - torch.tensor(IMAGENET[0])) / torch.tensor(
                IMAGENET[1]
            )
            rows.append(network(scaled.permute(0, 3, 1, 2).contiguous()).numpy())
    counts = [len(image.captions) for image in labelled.images]
    images = np.repeat(np.concatenate(rows), counts, axis=0)
    texts = word_means(data, [text for image in labelled.images for text in image.captions])
    known = np.linalg.norm(texts, axis=1) > 0
    np.save(folder / "image.npy", images[known])
    np.save(folder / "text.npy", texts[known])
    return folder / "text.npy", folder / "image.npy"


def word_means(data: Path, texts: list[str]) -> np.ndarray:
    source = data / "weights/potion-base-4m-int8"
    words = load_file(source / "model.safetensors")["embeddings"].float().numpy()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    found = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return np.stack([words[ids].mean(axis=0) for ids in found])


if __name__ == "__main__":
    main()

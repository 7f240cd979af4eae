"""Trains the bundled model: `python scripts/train_tiny.py --data DIR --out DIR`.

The image tower is MobileNetV2 with ImageNet weights, kept frozen: its features of every
training picture (plain, mirrored, and randomly cropped and recoloured) are computed once.
What is learned is the projection head and a small text transformer, with CLIP's symmetric
contrastive loss (Radford et al. 2021, "Learning Transferable Visual Models From Natural
Language Supervision"). Token embeddings start from static word vectors. The epoch with the
best Recall@10 on Flickr8k's validation split is kept; no test split is read.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from PIL import Image, ImageEnhance
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm

import mmsearch.encoders  # noqa: F401 - first: it keeps OpenVINO from calling home
from mmsearch.datasets import karpathy, scene_art, scenes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224
CONFIG = {
    "model_cfg": {
        "embed_dim": 256,
        "vision_cfg": {
            "timm_model_name": "mobilenetv2_100",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "mlp",
            "image_size": SIZE,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "width": 128,
            "heads": 4,
            "layers": 3,
        },
    },
    "preprocess_cfg": {
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}
TEMPLATES = (
    "a photo of {}", "a picture of {}", "{}", "{}", "a close view of {}", "there is {} here",
)  # fmt: skip
#: The drawn scenes learned from start here; the demo's and the tests' start far below.
SCENE_SEED = 1_000_000

Picture = Callable[[], Image.Image]


@dataclass
class Part:
    """A share of the training data: `views[i]` are the features of picture i, (V, 1280)."""

    pictures: list[Picture]
    captions: list[list[str]]
    views: np.ndarray
    batch: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="where the model's folder goes")
    parser.add_argument("--cache", type=Path, default=Path("build/train_tiny"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--scenes", type=int, default=16000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2, help="of image features")
    parser.add_argument("--word-drop", type=float, default=0.1, help="share of tokens removed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.cache.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")

    model = new_model(args.out, args.data)
    parts, validation = load_parts(args, model)
    best = fit(model, parts, validation, args)
    weights = {name: value.half().contiguous() for name, value in best.items()}
    save_file(weights, args.out / "open_clip_model.safetensors")
    print("saved", args.out, f"{sum(v.nbytes for v in weights.values()) / 1e6:.1f} MB")


def new_model(folder: Path, data: Path) -> torch.nn.Module:
    """The untrained model: the backbone's weights and word meanings in place."""
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    state = torch.load(data / "weights/mobilenetv2_100_imagenet.pt", weights_only=True)
    missing, unexpected = model.visual.trunk.load_state_dict(state, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise SystemExit(f"backbone: missing {missing}, unexpected {unexpected}")
    with torch.no_grad():
        table = torch.from_numpy(word_meanings(data / "weights/potion-base-4m-int8"))
        table = table[:, : model.token_embedding.weight.shape[1]]
        model.token_embedding.weight.copy_(table / table.std() * 0.02)
    return model.eval()


def word_meanings(folder: Path) -> np.ndarray:
    """A vector for each of CLIP's tokens: the mean of the static vectors of its pieces."""
    stored = load_file(folder / "model.safetensors")
    table = stored["embeddings"].float().numpy()
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = open_clip.SimpleTokenizer().decoder
    rng = np.random.default_rng(0)
    found = rng.normal(0, table.std(), (len(names), table.shape[1])).astype(np.float32)
    decode = open_clip.SimpleTokenizer().decode
    for token in names:
        ids = pieces.encode(decode([token]).strip(), add_special_tokens=False).ids
        if ids:
            found[token] = table[ids].mean(axis=0)
    return found


# -- data ----------------------------------------------------------------------------------


def load_parts(args: argparse.Namespace, model: torch.nn.Module) -> tuple[list[Part], Part]:
    compute = feature_maker(model.visual.trunk)
    document = json.loads((args.data / "flickr8k/dataset_flickr8k.json").read_text())
    photos = karpathy.read(document, args.data).images
    folder = args.data / "flickr8k/images"

    def of(*splits: str) -> tuple[list[Picture], list[list[str]]]:
        chosen = [photo for photo in photos if photo.split in splits]
        return (
            [opener(folder / photo.file) for photo in chosen],
            [list(photo.captions) for photo in chosen],
        )

    def part(name: str, pictures: list[Picture], texts: list[list[str]], views: int, batch: int):
        file = args.cache / f"{name}.npy"
        if not file.exists():
            features = compute(pictures, views, name)
            np.save(file.with_suffix(".part.npy"), features)
            file.with_suffix(".part.npy").rename(file)
        return Part(pictures, texts, np.load(file), batch)

    drawn = [scenes.scene(SCENE_SEED + i) for i in range(args.scenes)]
    return [
        part("flickr", *of("train", "restval"), 8, 384),
        part("objects", *objects(args.data / "objects"), 3, 96),
        # One view each: a mirror image would make a caption that names a side wrong.
        part("scenes", [lambda s=s: scene_art.render(s) for s in drawn],
             [scenes.captions(s) for s in drawn], 1, 96),
    ], part("validation", *of("val"), 1, 0)  # fmt: skip


def opener(file: Path) -> Picture:
    return lambda: Image.open(file).convert("RGB")


def objects(folder: Path) -> tuple[list[Picture], list[list[str]]]:
    """Named objects; every fifth picture of a name (every second of ImageNet's) is held out."""
    seen: dict[tuple[str, str], int] = {}
    pictures, texts = [], []
    for row in csv.DictReader((folder / "labels.csv").open(encoding="utf-8")):
        name = row["label"].replace("_", " ").lower().strip()
        source = row["file"].split("/")[0]
        place = seen.get((source, name), 0)
        seen[source, name] = place + 1
        if name == "images to predict" or place % (2 if source == "imagenet" else 5) == 1:
            continue
        article = "an" if name[0] in "aeiou" else "a"
        pictures.append(opener(folder / row["file"]))
        texts.append([t.format(n) for n in (name, f"{article} {name}") for t in TEMPLATES])
    return pictures, texts


def feature_maker(trunk: torch.nn.Module) -> Callable[[list[Picture], int, str], np.ndarray]:
    """Features through OpenVINO, which runs this backbone seven times as fast as torch."""
    import openvino as ov

    example = torch.zeros(1, 3, SIZE, SIZE)
    graph = ov.convert_model(trunk, example_input=example, input=[-1, 3, SIZE, SIZE])
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    mean, std = np.float32(MEAN), np.float32(STD)

    def view(picture: Picture, number: int, seed: str) -> np.ndarray:
        image = augmented(picture(), number, random.Random(seed))
        pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)
        return ((pixels / 255 - mean) / std).transpose(2, 0, 1)

    def compute(pictures: list[Picture], views: int, name: str) -> np.ndarray:
        found = np.empty((len(pictures), views, 1280), np.float16)
        jobs = [(i, v) for i in range(len(pictures)) for v in range(views)]
        with ThreadPoolExecutor(2) as pool:
            for start in tqdm(range(0, len(jobs), 64), desc=name, mininterval=5):
                block = jobs[start : start + 64]
                pixels = pool.map(lambda job: view(pictures[job[0]], job[1], f"{name}{job}"), block)
                out = compiled(np.stack(list(pixels)))[0]
                for (i, v), row in zip(block, out, strict=True):
                    found[i, v] = row
        return found

    return compute


def augmented(image: Image.Image, number: int, rng: random.Random) -> Image.Image:
    """View 0 is the picture, 1 its mirror image, the others are crops with changed colours."""
    if number == 0:
        return image
    if number == 1 or (number > 1 and rng.random() < 0.5):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if number == 1:
        return image
    area, ratio = rng.uniform(0.45, 1), math.exp(rng.uniform(-0.25, 0.25))
    width = min(1.0, math.sqrt(area * ratio)) * image.width
    height = min(1.0, math.sqrt(area / ratio)) * image.height
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    image = image.crop((round(left), round(top), round(left + width), round(top + height)))
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(0.8, 1.2))
    return image


# -- learning ------------------------------------------------------------------------------


def fit(
    model: torch.nn.Module, parts: list[Part], validation: Part, args: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """Trains the head and the text tower; returns the best epoch's whole state."""
    for parameter in model.visual.trunk.parameters():
        parameter.requires_grad = False
    learned = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in learned if p.ndim > 1 and "embedding" not in n]
    plain = [p for n, p in learned if not (p.ndim > 1 and "embedding" not in n)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.rate, betas=(0.9, 0.98),
    )  # fmt: skip
    tokens = [[tokenise(texts) for texts in part.captions] for part in parts]
    steps = len(parts[0].views) // parts[0].batch
    total = steps * args.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / total)),
    )
    loss_of = ClipLoss()
    rng = np.random.default_rng(args.seed)
    best, kept = -1.0, {}
    for epoch in range(args.epochs):
        started, losses = time.time(), []
        model.train()
        model.visual.trunk.eval()  # its folded batch norms must not be re-estimated
        orders = [rng.permutation(len(part.views)) for part in parts]
        for step in range(steps):
            features, words = zip(
                *(draw(p, t, o, step, rng) for p, t, o in zip(parts, tokens, orders, strict=True)),
                strict=True,
            )
            image = torch.nn.functional.dropout(torch.cat(features), args.dropout)
            image = torch.nn.functional.normalize(model.visual.head(image), dim=-1)
            text = model.encode_text(drop_words(torch.cat(words), args.word_drop), normalize=True)
            loss = loss_of(image, text, model.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in learned], 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            losses.append(loss.item())
        recall = evaluate(model, validation)
        mean = (recall["t2i"][10] + recall["i2t"][10]) / 2
        print(f"epoch {epoch + 1} loss {np.mean(losses):.3f} scale {model.logit_scale.exp():.1f} "
              f"val {recall} {time.time() - started:.0f}s", flush=True)  # fmt: skip
        if mean > best:
            best = mean
            kept = {name: value.clone() for name, value in model.state_dict().items()}
    return kept


def tokenise(texts: Iterable[str]) -> torch.Tensor:
    return open_clip.tokenize(list(texts), CONFIG["model_cfg"]["text_cfg"]["context_length"])


def draw(
    part: Part, tokens: list[torch.Tensor], order: np.ndarray, step: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of a part: a random view and a random caption of each picture."""
    places = np.take(order, range(step * part.batch, (step + 1) * part.batch), mode="wrap")
    views = rng.integers(part.views.shape[1], size=len(places))
    chosen = torch.stack([tokens[i][rng.integers(len(tokens[i]))] for i in places])
    return torch.from_numpy(part.views[places, views].astype(np.float32)), chosen


def drop_words(tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Removes random tokens between the first and the last, so that no word is relied on."""
    start, end = tokens[0, 0], tokens.max()
    keep = (torch.rand(tokens.shape) >= share) | (tokens == start) | (tokens == end)
    keep &= tokens != 0
    order = torch.argsort(~keep, dim=1, stable=True)
    return torch.gather(tokens * keep, 1, order)


@torch.no_grad()
def evaluate(model: torch.nn.Module, part: Part) -> dict[str, dict[int, float]]:
    model.eval()
    image = model.visual.head(torch.from_numpy(part.views[:, 0].astype(np.float32)))
    image = torch.nn.functional.normalize(image, dim=-1)
    text = model.encode_text(torch.cat([tokenise(c) for c in part.captions]), normalize=True)
    owner = torch.tensor([i for i, texts in enumerate(part.captions) for _ in texts])
    scores = text @ image.T
    own = scores.gather(1, owner[:, None])
    t2i = (scores >= own).sum(1)  # ranks from 1
    true = owner[None, :] == torch.arange(len(image))[:, None]
    best = scores.T.masked_fill(~true, -2).max(1, keepdim=True).values
    i2t = 1 + (scores.T.masked_fill(true, -2) >= best).sum(1)
    return {
        name: {k: round(100 * (ranks <= k).float().mean().item(), 2) for k in (1, 5, 10)}
        for name, ranks in (("t2i", t2i), ("i2t", i2t))
    }


if __name__ == "__main__":
    main()

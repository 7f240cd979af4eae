"""A folder of ONNX graphs against open_clip's own model, pixel for pixel and token for token.

    python benchmarks/onnx_parity.py MODEL OPEN_CLIP [--photos DIR] [--tokenizer DIR]

MODEL is what `--model` takes, as hf-hub:immich-app/ViT-B-32__laion2b-s34b-b79k or onnx:/path, and
OPEN_CLIP the model that it was exported from, as ViT-B-32/laion2b_s34b_b79k. open_clip loads that
itself, with its own transform and tokenizer (--tokenizer takes one from a folder instead), and runs
it in fp32. Prints how many texts have the same tokens and the cosines of the vectors in each
precision; ends with 1 where tokens differ or a cosine in fp32 is below 0.999. Photos are those in
--photos, or else drawn scenes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from mmsearch.config import load_settings
from mmsearch.datasets import scene_art, scenes
from mmsearch.encoders.loading import ModelCache, open_encoder
from mmsearch.encoders.registry import parse_model
from mmsearch.media.fit import fit

TEXTS = [
    "a dog runs over the grass", "Two people, one red car!", "", "  spaces   and\ttabs ",
    "x " * 200,
    "1,234.5 km/h @ 50% &amp; more", "naïve café “quoted” … ﬁne", "ein Hund am Strand",
    "un perro en la playa", "un chien sur la plage", "собака бежит по траве", "狗在草地上跑",
    "犬が草の上を走る", "كلب يركض على العشب", "कुत्ता घास पर दौड़ता है", "👍🏽 🏳️‍🌈",
    "UPPER lower MiXeD",
]  # fmt: skip
LEAST = 0.999
SUFFIXES = (".jpg", ".jpeg", ".png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("open_clip")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--count", type=int, default=64)
    args = parser.parse_args()
    if args.photos is None:
        pictures = [scene_art.render(one) for one in scenes.gallery(args.count, seed=1)]
    else:
        files = [path for path in sorted(args.photos.rglob("*")) if path.suffix.lower() in SUFFIXES]
        pictures = [Image.open(path).convert("RGB") for path in files[: args.count]]
    source, cache = parse_model(args.model), ModelCache(load_settings().cache_folder())
    ids, images, texts = by_open_clip(parse_model(args.open_clip), pictures, args.tokenizer)
    print(f"{args.model} against {args.open_clip}: {len(pictures)} pictures, {len(TEXTS)} texts")
    ours = open_encoder(source, cache, precision="fp32", notify=print)
    same = (ours.tokenize(TEXTS) == ids).all(axis=1)
    print(f"tokens: {same.sum()} of {len(TEXTS)} texts have open_clip's")
    for text in np.array(TEXTS)[~same]:
        print(f"  not {text!r}")
    pixels = np.stack([fit(picture, ours.spec.preprocess) for picture in pictures])
    lowest = 1.0
    for precision in ("fp32", "bf16"):
        encoder = open_encoder(source, cache, precision=precision)
        for what, batch, expected in (("image", pixels, images), ("text", TEXTS, texts)):
            cosines = (encoder.encode(what, batch) * expected).sum(axis=1)
            print(f"{precision}, {what}: cosine {np.median(cosines):.6f} in the median, "
                  f"{cosines.min():.6f} at least")  # fmt: skip
            lowest = min(lowest, cosines.min()) if precision == "fp32" else lowest
    sys.exit(0 if lowest > LEAST and same.all() else 1)


def by_open_clip(source, pictures, tokenizer):
    """Ids, and vectors of pictures and texts, by open_clip alone."""
    network, _, transform = open_clip.create_model_and_transforms(
        source.open_clip_name, pretrained=source.pretrained
    )
    config = open_clip.get_model_config(source.open_clip_name)["text_cfg"]
    tokenize = open_clip.get_tokenizer(source.open_clip_name) if tokenizer is None else (
        open_clip.tokenizer.HFTokenizer(
            str(tokenizer), config.get("context_length", 77),
            config.get("tokenizer_kwargs", {}).get("clean", "whitespace"),
        )
    )  # fmt: skip
    network.eval()
    ids = tokenize(TEXTS)
    with torch.inference_mode():
        images = [network.encode_image(transform(one)[None], normalize=True) for one in pictures]
        texts = network.encode_text(ids, normalize=True)
    return ids.numpy(), torch.cat(images).numpy(), texts.numpy()


if __name__ == "__main__":
    main()

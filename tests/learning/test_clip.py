"""`train clip` as a user meets it: a recipe in, a model by name out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import open_clip
import pytest
import torch
from fakes import FakeEncoder
from safetensors.torch import load_file, save_file
from toys import RECIPE, write_recipe, write_set
from typer.testing import CliRunner

from mmsearch.cli.app import app
from mmsearch.encoders.open_clip import load_model
from mmsearch.encoders.registry import parse_model
from mmsearch.errors import UsageError
from mmsearch.learning.clip import Place, start_network, train_clip
from mmsearch.learning.recipe import ModelTable, read_recipe


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def place_in(folder, **more):
    return Place(folder, folder / "model", folder / "cache", folder / "home", **more)


def trained(folder, text=RECIPE, open_model=None, **place):
    recipe = write_recipe(folder, text)
    train_clip(read_recipe(recipe), place_in(folder, **place), open_model=open_model or pytest.fail)
    return load_file(folder / "model/open_clip_model.safetensors")


TWO_STAGES = (
    RECIPE
    + """
freeze = ["visual.transformer"]
[[stage]]
name = "second"
epochs = 2
batch = 8
chunk = 3
rate = 1e-3
rates = { "visual" = 1e-4 }
input_dropout = { "visual.transformer" = 0.1 }
"""
)


def test_a_model_is_trained_indexed_and_searched_by_name(tmp_path):
    recipe = write_recipe(tmp_path / "set", TWO_STAGES)
    home = {"MMSEARCH_HOME": str(tmp_path / "home")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSEARCH_HOME", home["MMSEARCH_HOME"])
        told = run("train", "clip", recipe, "--out", "mine")
        assert "test: t2i" in told.stdout
        assert "mmsearch index FOLDER --model mine" in told.stdout
        folder = tmp_path / "home/models/mine"
        card = (folder / "README.md").read_text()
        assert "24 pictures, 48 captions" in card
        assert "metadata.jsonl, test" in card
        assert "mine " in run("models").stdout
        run("index", tmp_path / "set", "--index", tmp_path / "i", "--model", "mine")
        found = run("search", "a red picture", "--index", tmp_path / "i", "-k", 3, "--json")
        assert len(found.stdout.splitlines()) == 3
        assert (
            "holds a trained model" in run("train", "clip", recipe, "--out", "mine", code=2).stderr
        )
        further = RECIPE.replace('config = "architecture"', 'weights = "mine"')
        (tmp_path / "set/further.toml").write_text(further)
        run("train", "clip", tmp_path / "set/further.toml", "--out", "further")
        assert "mine" in (tmp_path / "home/models/further/README.md").read_text()
        first = load_model(parse_model(f"local-dir:{folder}")).spec.space
        run("train", "clip", recipe, "--out", "other", "--restart")
        again = load_model(parse_model(f"local-dir:{tmp_path / 'home/models/other'}")).spec.space
    assert again == first  # the same seed, so the same weights: the same space
    assert (folder / "training/plot.png").stat().st_size > 1000


def test_a_run_that_was_killed_comes_to_the_same_weights(tmp_path):
    """SIGKILL in the second stage of a whole run, with cached views and all."""
    text = TWO_STAGES.replace("epochs = 2\nbatch = 8\nchunk", "epochs = 6\nbatch = 8\nchunk")
    undisturbed = trained(tmp_path / "a", text)
    recipe = write_recipe(tmp_path / "b", text)
    command = [sys.executable, "-m", "mmsearch", "train", "clip", recipe, "--out",
               tmp_path / "b/model"]  # fmt: skip
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while b"second: epoch 2" not in process.stderr.readline():
        assert time.monotonic() < end
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "b/model/open_clip_config.json").exists()  # half a model is none
    done = subprocess.run([*map(str, command)], capture_output=True, check=True)
    assert b"going on at step" in done.stderr
    resumed = load_file(tmp_path / "b/model/open_clip_model.safetensors")
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)


def test_training_starts_from_a_checkpoint_a_part_and_word_meanings(tmp_path):
    trained(tmp_path)
    table = ModelTable(weights="local-dir:model")
    start = start_network(table, "clip", place_in(tmp_path)).state_dict()
    assert torch.equal(
        start["visual.conv1.weight"], load_file(tmp_path / "model/open_clip_model.safetensors")
        ["visual.conv1.weight"],
    )  # fmt: skip
    part = {"weight": torch.full((32, 3, 16, 16), 0.5)}
    save_file(part, tmp_path / "part.safetensors")
    table = ModelTable(config=str(tmp_path / "architecture"),
                       parts={"visual.conv1": "part.safetensors"})  # fmt: skip
    assert (
        start_network(table, "clip", place_in(tmp_path)).visual.conv1.weight.unique().item() == 0.5
    )
    bad = ModelTable(config=str(tmp_path / "architecture"), parts={"visual": "part.safetensors"})
    with pytest.raises(UsageError, match="weights that do not fit 'visual'"):
        start_network(bad, "clip", place_in(tmp_path))
    with pytest.raises(UsageError, match="no module 'nowhere'"):
        start_network(
            ModelTable(config=str(tmp_path / "architecture"),
                       parts={"nowhere": "part.safetensors"}), "clip", place_in(tmp_path),
        )  # fmt: skip


def test_word_meanings_bring_words_near_each_other(data, tmp_path):
    write_recipe(tmp_path)
    table = ModelTable(config=str(tmp_path / "architecture"),
                       words=str(data / "weights/potion-base-4m-int8"))  # fmt: skip
    network = start_network(table, "clip", place_in(tmp_path))
    weights = torch.nn.functional.normalize(network.token_embedding.weight.detach(), dim=-1)

    def vector(word):
        return weights[open_clip.tokenize([word])[0, 1]]

    assert vector("dog") @ vector("dogs") > vector("dog") @ vector("bicycle")
    assert vector("ocean") @ vector("sea") > vector("ocean") @ vector("kitchen")


def test_a_teacher_is_followed(tmp_path):
    """The teacher pairs by colour; a student of it differs from one without."""
    taught = TWO_STAGES.replace("[augment]", '[teacher]\nmodel = "tiny"\nscale = 20.0\n[augment]')
    alone = trained(tmp_path / "a", TWO_STAGES)
    student = trained(tmp_path / "b", taught, open_model=FakeEncoder)
    assert any(not torch.equal(alone[name], student[name]) for name in alone)


def test_siglip_s_loss_trains_a_model_with_a_bias(tmp_path):
    weights = trained(tmp_path, 'loss = "siglip"\n' + RECIPE)
    assert weights["logit_bias"].item() != 0
    config = json.loads((tmp_path / "model/open_clip_config.json").read_text())
    assert config["model_cfg"]["init_logit_bias"] == -10
    loaded = load_model(parse_model(f"local-dir:{tmp_path / 'model'}"))
    assert loaded.network.logit_bias.item() == pytest.approx(weights["logit_bias"].item())


def test_bf16_trains(tmp_path):
    weights = trained(tmp_path, 'precision = "bf16"\n' + RECIPE)
    assert all(np.isfinite(value.float().numpy()).all() for value in weights.values())


def test_workers_give_the_same_weights_as_none(tmp_path):
    alone, helped = trained(tmp_path / "a"), trained(tmp_path / "b", workers=2)
    assert all(torch.equal(alone[name], helped[name]) for name in alone)


def test_a_recipe_that_learns_from_its_validation_split_is_refused(tmp_path):
    text = RECIPE.replace('splits = ["train"]', 'splits = ["train", "val"]')
    recipe = write_recipe(tmp_path, text)
    told = run("train", "clip", recipe, "--out", tmp_path / "m", code=2)
    assert "are in a split that is measured on" in told.stderr


def test_splits_that_are_measured_on_are_not_learned_from_unasked(tmp_path):
    """Without `splits`, val and test stay out."""
    recipe = write_recipe(tmp_path, RECIPE.replace('splits = ["train"]\n', ""))
    run("train", "clip", recipe, "--out", tmp_path / "m")
    assert "24 pictures" in (tmp_path / "m/README.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 2", "epochs = -1", "stage.0.epochs: Input should be greater than 0"),
        ("epochs = 2", "epochz = 2", "stage.0.epochz: Unexpected"),
        ('config = "architecture"', 'config = "No-Such-Net"', "'No-Such-Net' cannot be made"),
        ('config = "architecture"', "half = true", "needs one of config and weights"),
        ("[model]", "[model", "not TOML"),
        ('labels = "metadata.jsonl"', 'labels = "nothing.jsonl"', "nothing.jsonl"),
        ('split = "val"', 'split = "dev"', "no captioned picture in the split 'dev'"),
        ("batch = 8", "batch = 800", "fewer than the 800"),
        ("warmup = 1", 'cache = ["transformer"]', "cache: "),
    ],
)
def test_a_recipe_that_makes_no_sense_is_one_clear_line(tmp_path, old, new, message):
    recipe = write_recipe(tmp_path, RECIPE.replace(old, new, 1))
    told = run("train", "clip", recipe, "--out", tmp_path / "m", code=2)
    assert message in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "m/open_clip_config.json").exists()


def test_a_missing_picture_is_named(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "5.png").unlink()
    assert "5.png: named in" in run("train", "clip", recipe, "--out", tmp_path / "m", code=2).stderr


@pytest.mark.parametrize("name", ["tiny", "base", "auto", "-x", "a b"])
def test_a_name_that_is_taken_or_odd_is_refused(tmp_path, name):
    recipe = write_recipe(tmp_path)
    result = CliRunner().invoke(app, ["train", "clip", str(recipe), f"--out={name}"])
    assert result.exit_code == 2
    assert "cannot be a model's name" in result.stderr


def test_the_recipe_of_tiny_is_valid():
    from conftest import REPOSITORY

    recipe = read_recipe(REPOSITORY / "recipes/tiny.toml")
    assert os.path.isdir(recipe.model.config)
    assert [table.name for table in recipe.data] == ["flickr8k", "objects", "scenes"]


def test_a_toy_set_has_the_splits_that_these_tests_speak_of(tmp_path):
    write_set(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [sum(row["split"] == name for row in rows) for name in ("train", "val", "test")] == [
        24, 12, 12,
    ]  # fmt: skip

"""`train clip` as a user meets it: a recipe in, a model by name out."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import open_clip
import pytest
import tokenizers
import torch
from fakes import FakeEncoder
from PIL import Image
from safetensors.torch import load_file, save_file
from toys import ARCHITECTURE, COLOURS, RECIPE, write_recipe, write_set
from typer.testing import CliRunner

from mmsearch.cli.app import app
from mmsearch.encoders.open_clip import load_model
from mmsearch.encoders.registry import parse_model
from mmsearch.errors import Interrupted, TrainingError, UsageError
from mmsearch.store.files import draft_of
from mmsearch.training.clip import train_clip
from mmsearch.training.distributed import processes
from mmsearch.training.network import check_size, start_network
from mmsearch.training.recipe import ModelTable, read_recipe
from mmsearch.training.runs import Place, load_checkpoint, run_folder
from mmsearch.training.trainer import check_schedule
from mmsearch.training.views import plain_transform, preprocess_of

pytestmark = pytest.mark.slow


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
        assert "mmsearch index FOLDER --model mine --index mine.index" in told.stdout
        folder = tmp_path / "home/models/mine"
        card = (folder / "README.md").read_text()
        assert "24 pictures, 48 captions" in card
        assert "metadata.jsonl, test" in card
        assert "mine " in run("models").stdout
        run("index", tmp_path / "set", "--index", tmp_path / "i", "--model", "mine")
        found = run("search", "a red picture", "--index", tmp_path / "i", "-k", 3, "--json")
        assert len(found.stdout.splitlines()) == 3
        assert not found.stderr
        odd = run("search", "a yelow zeppelin", "--index", tmp_path / "i")
        assert "'yelow' is unknown to the model" in odd.stderr
        assert "did you mean 'yellow'?" in odd.stderr
        assert "'zeppelin' is unknown to the model" in odd.stderr
        where = ("--and", "a yelow one", "--index", tmp_path / "i")
        foreign = run("search", "una foto roja", *where).stderr
        assert "knows few words of 'una foto roja'" in foreign
        assert "'foto'" not in foreign
        assert "'yelow' is unknown to the model" in foreign
        assert (
            "holds a trained model" in run("train", "clip", recipe, "--out", "mine", code=2).stderr
        )
        further = RECIPE.replace('config = "architecture"', 'weights = "mine"')
        (tmp_path / "set/further.toml").write_text(further)
        run("train", "clip", tmp_path / "set/further.toml", "--out", "further")
        assert "mine" in (tmp_path / "home/models/further/README.md").read_text()
        first = load_model(parse_model(f"local-dir:{folder}")).spec.space
        run("train", "clip", recipe, "--out", "other", "--restart")
        recipe.write_text("seed = 5\n" + TWO_STAGES)
        run("train", "clip", recipe, "--out", "other", "--restart")
        run("index", tmp_path / "set", "--index", tmp_path / "o", "--model", "other")
        recipe.write_text(TWO_STAGES)
        run("train", "clip", recipe, "--out", "other", "--restart")
        changed = run("index", tmp_path / "set", "--index", tmp_path / "o", "--model", "other")
        assert "embedded again" in changed.stdout  # other weights are another space
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


def test_training_starts_from_a_checkpoint_or_a_part(tmp_path):
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
    for wrong in ({"parts": {"nowhere": "part.safetensors"}}, {"int8": ["nowhere"]}):
        with pytest.raises(UsageError, match="no module 'nowhere'"):
            start_network(
                ModelTable(config=str(tmp_path / "architecture"), **wrong), "clip",
                place_in(tmp_path),
            )  # fmt: skip
    check_size(network := start_network(table, "clip", place_in(tmp_path)), 32)
    with pytest.raises(UsageError, match="does not take 48 pixels"):
        check_size(network, 48)


class Backwards(FakeEncoder):
    """A teacher that pairs every colour with another's name."""

    def texts(self, texts):
        turned = {"red": "green", "green": "blue", "blue": "yellow", "yellow": "red"}
        return super().texts(
            [" ".join(turned.get(word, word) for word in text.split()) for text in texts]
        )


def test_a_teacher_is_followed(tmp_path):
    """Even where it is wrong: its student pairs as it does, and not as the captions do."""
    text = RECIPE.replace("epochs = 2", "epochs = 30\nrate = 3e-3").replace("ema = 0.8", "")
    taught = text.replace(
        "[augment]", '[teacher]\nmodel = "tiny"\nscale = 20.0\nweight = 100.0\n[augment]'
    )

    def pairing(folder, recipe, teacher=None):
        """How near pictures are to their own colour's name, and to the backward one."""
        trained(folder, recipe, open_model=teacher)
        last = load_checkpoint(folder / "model/training/checkpoint.pt")["network"]
        network = load_model(parse_model(f"local-dir:{folder / 'model'}")).network
        network.load_state_dict(last)
        how = plain_transform(preprocess_of(network))
        names = list(COLOURS)
        with torch.no_grad():
            pictures = network.eval().encode_image(
                torch.stack([how(Image.new("RGB", (40, 32), COLOURS[name])) for name in names]),
                normalize=True,
            )
            words = [f"a {name} picture number 1" for name in names]
            texts = network.encode_text(
                open_clip.tokenize(words, context_length=12), normalize=True
            )
        scores = pictures @ texts.T
        return scores.diagonal().mean(), scores.roll(1, 1).diagonal().mean()

    own, backward = pairing(tmp_path / "a", text)
    assert own > backward + 0.1
    own, backward = pairing(tmp_path / "b", taught, Backwards)
    assert backward > own + 0.1


def test_siglip_s_loss_trains_a_model_with_a_bias(tmp_path):
    weights = trained(tmp_path, 'loss = "siglip"\n' + RECIPE)
    assert weights["logit_bias"].item() not in (0, -10)  # it began at -10, and learned
    config = json.loads((tmp_path / "model/open_clip_config.json").read_text())
    assert config["model_cfg"]["init_logit_bias"] == -10
    loaded = load_model(parse_model(f"local-dir:{tmp_path / 'model'}"))
    assert loaded.network.logit_bias.item() == pytest.approx(weights["logit_bias"].item())


def test_bf16_learns_nearly_the_same(tmp_path):
    """Its steps differ in the third digit, and what they lead to by little more."""
    full = trained(tmp_path / "a")
    half = trained(tmp_path / "b", 'precision = "bf16"\n' + RECIPE)
    learned = [name for name in full if full[name].is_floating_point()]
    assert any(not torch.equal(full[name], half[name]) for name in learned)
    for name in learned:
        torch.testing.assert_close(half[name], full[name], atol=0.01, rtol=0.05)


def test_a_tokenizer_of_its_own_is_kept_with_the_model(tmp_path):
    """The model is used on a machine without what its tokenizer came from."""
    transformers = pytest.importorskip("transformers")
    recipe = write_recipe(tmp_path, RECIPE.replace("word_drop = 0.1\n", ""))
    words = ["[PAD]", "[UNK]", "a", "picture", "number", *COLOURS]
    words = {word: place for place, word in enumerate(words)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "plain.json"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "plain.json"), pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "architecture")
    text = {**ARCHITECTURE["model_cfg"]["text_cfg"], "vocab_size": len(words),
            "hf_tokenizer_name": "somewhere/else"}  # fmt: skip
    architecture = {**ARCHITECTURE, "model_cfg": {**ARCHITECTURE["model_cfg"], "text_cfg": text}}
    (tmp_path / "architecture/open_clip_config.json").write_text(json.dumps(architecture))
    run("train", "clip", recipe, "--out", tmp_path / "m")
    (tmp_path / "architecture").rename(tmp_path / "gone")
    run("index", tmp_path, "--index", tmp_path / "i", "--model", f"local-dir:{tmp_path}/m")
    found = run("search", "a red picture", "--index", tmp_path / "i", "-k", 3, "--json")
    assert len(found.stdout.splitlines()) == 3


def test_a_changed_stage_is_trained_anew_and_those_before_it_are_not(tmp_path):
    recipe = write_recipe(tmp_path, TWO_STAGES)
    run("train", "clip", recipe, "--out", tmp_path / "m")
    (tmp_path / "m/open_clip_config.json").unlink()  # as if it had been killed at the end
    recipe.write_text(TWO_STAGES.replace("rate = 1e-3", "rate = 2e-3"))
    told = run("train", "clip", recipe, "--out", tmp_path / "m", code=6).stderr
    assert "stage 'second' was begun there with other settings or data" in told
    assert "delete checkpoint.pt in it" in told
    (tmp_path / "m/training/checkpoint.pt").unlink()
    told = run("train", "clip", recipe, "--out", tmp_path / "m").stderr
    assert "first: epoch" not in told
    assert "second: epoch 2 of 2" in told
    with (tmp_path / "m/training/log.csv").open() as file:
        rows = [(row["stage"], float(row["epoch"])) for row in csv.DictReader(file)]
    assert rows == [(stage, epoch) for stage in ("first", "second") for epoch in (0, 1, 2)]


def test_what_the_card_says_and_measures_can_change_on_the_way(tmp_path):
    """Neither decides the weights: nothing is trained again for it."""
    recipe = write_recipe(tmp_path, TWO_STAGES)
    run("train", "clip", recipe, "--out", tmp_path / "m")
    weights = (tmp_path / "m/open_clip_model.safetensors").read_bytes()
    (tmp_path / "m/open_clip_config.json").unlink()
    without = TWO_STAGES.replace('[test]\nlabels = "metadata.jsonl"\nsplit = "test"\n', "")
    recipe.write_text(without + '[card]\nlicence = "my own"\n')
    told = run("train", "clip", recipe, "--out", tmp_path / "m")
    assert "epoch" not in told.stderr
    assert "**Terms**: my own" in (tmp_path / "m/README.md").read_text()
    assert (tmp_path / "m/open_clip_model.safetensors").read_bytes() == weights


def test_another_recipe_is_refused_before_its_teacher_works(tmp_path):
    recipe = write_recipe(tmp_path)
    run("train", "clip", recipe, "--out", tmp_path / "m")
    (tmp_path / "m/open_clip_config.json").unlink()
    taught = RECIPE.replace("[augment]", '[teacher]\nmodel = "tiny"\n[augment]')
    recipe.write_text(taught)
    teacher = FakeEncoder("tiny")
    place = dataclasses.replace(place_in(tmp_path), folder=tmp_path / "m")
    with pytest.raises(TrainingError, match="other settings"):
        train_clip(read_recipe(recipe), place, open_model=lambda name: teacher)
    assert not teacher.images_encoded


#: In the first stage the bias alone learns, much too fast: it leaps from where pairs cost too much
#: to where all else costs more.
RISING = f"""
loss = "siglip"
{RECIPE.replace("epochs = 2", "epochs = 1")}
rate = 12.8
freeze = ["visual", "transformer", "token_embedding", "positional_embedding", "ln_final",
          "text_projection", "logit_scale"]
[[stage]]
name = "second"
epochs = 2
batch = 8
"""


def test_the_log_keeps_the_end_of_a_stage_that_was_not_saved(tmp_path):
    """A checkpoint is not replaced while the loss rises: the next stage's log has all of it."""
    recipe, saved = write_recipe(tmp_path, RISING), {}

    def look(line):
        if line.startswith("stage first is done"):
            saved.update(load_checkpoint(tmp_path / "model/training/checkpoint.pt"))

    train_clip(read_recipe(recipe), place_in(tmp_path), open_model=None, notify=look)
    assert (saved["stage"], saved["step"]) == ("first", 0)
    with (tmp_path / "model/training/log.csv").open() as file:
        rows = [(row["stage"], float(row["epoch"])) for row in csv.DictReader(file)]
    assert rows == [(stage, epoch) for stage, most in (("first", 1), ("second", 2))
                    for epoch in range(most + 1)]  # fmt: skip


def test_a_damaged_file_of_a_finished_stage_is_named(tmp_path):
    recipe = write_recipe(tmp_path)
    run("train", "clip", recipe, "--out", tmp_path / "m")
    (tmp_path / "m/open_clip_config.json").unlink()
    stage = tmp_path / "m/training/stage-first.safetensors"
    stage.write_bytes(stage.read_bytes()[:1000])
    told = run("train", "clip", recipe, "--out", tmp_path / "m", code=6).stderr
    assert told.strip().splitlines()[-1].endswith("damaged; delete it, and it is made again")
    stage.unlink()
    run("train", "clip", recipe, "--out", tmp_path / "m")


def test_a_model_that_is_not_finished_is_none_and_says_so(tmp_path):
    recipe = write_recipe(tmp_path)
    run("train", "clip", recipe, "--out", tmp_path / "m")
    (tmp_path / "m/open_clip_config.json").unlink()
    told = run("index", tmp_path, "--index", tmp_path / "i", "--model", tmp_path / "m", code=3)
    assert "no finished model there" in told.stderr


def test_the_recipe_in_the_documentation_fits_the_model_that_it_names(tmp_path):
    from conftest import REPOSITORY

    text = (REPOSITORY / "docs/training.md").read_text()
    (tmp_path / "recipe.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    recipe = read_recipe(tmp_path / "recipe.toml")
    network = start_network(recipe.model, recipe.loss, place_in(tmp_path))
    for stage in recipe.stage:
        check_schedule(network, stage, world=1)


def test_an_architecture_is_not_trained_into_itself(tmp_path):
    """A restart would remove it, and find that out at the end."""
    recipe = write_recipe(tmp_path, RECIPE.replace('"architecture"', '"m"'))
    run("train", "clip", write_recipe(tmp_path / "a"), "--out", tmp_path / "m")
    told = run("train", "clip", recipe, "--out", tmp_path / "m", "--restart", code=2)
    assert "take another --out" in told.stderr
    assert (tmp_path / "m/open_clip_model.safetensors").is_file()


def test_copies_of_a_picture_are_one_to_learn_from(tmp_path):
    """Side by side in a batch, each would be a false answer to the other's caption."""
    recipe = write_recipe(tmp_path)
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    told = run("train", "clip", recipe, "--out", tmp_path / "m")
    assert "1 pictures are listed twice or copies of others" in told.stderr
    assert "23 pictures, 48 captions" in (tmp_path / "m/README.md").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
def test_a_disk_that_fills_says_what_to_do(tmp_path):
    recipe = write_recipe(tmp_path)

    def stop(progress):
        if progress.stage == "stage first":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train_clip(read_recipe(recipe), place_in(tmp_path), open_model=None, on_progress=stop)
    log = tmp_path / "model/training/log.csv"
    draft_of(log).symlink_to("/dev/full")  # the log, after the run has begun
    told = run("train", "clip", recipe, "--out", tmp_path / "model", code=6).stderr
    assert "No space left on device; once there is room, the same command resumes" in told


@pytest.mark.parametrize("device", ["cuda:99", "bogus", "mps:7"])
def test_a_device_that_is_not_there_is_one_clear_line(tmp_path, device):
    recipe = write_recipe(tmp_path)
    told = run("train", "clip", recipe, "--out", tmp_path / "m", "--device", device, code=2)
    assert told.stderr.startswith(f"mmsearch: device '{device}' cannot be used: ")
    assert len(told.stderr.strip().splitlines()) == 1


def test_several_processes_do_not_share_one_card(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="a card of its own"), processes("cuda:0"):
        pass


def test_a_copy_of_what_is_measured_on_is_not_learned_from(tmp_path):
    recipe = write_recipe(tmp_path)
    held = next(n for n in range(48) if (n // 4) % 4 == 3)  # of the test split
    (tmp_path / "0.png").write_bytes((tmp_path / f"{held}.png").read_bytes())
    told = run("train", "clip", recipe, "--out", tmp_path / "m")
    assert "1 of its pictures are left out: " in told.stderr
    assert "23 pictures" in (tmp_path / "m/README.md").read_text()


def test_workers_give_the_same_weights_as_none(tmp_path):
    alone, helped = trained(tmp_path / "a"), trained(tmp_path / "b", workers=2)
    assert all(torch.equal(alone[name], helped[name]) for name in alone)


def test_a_recipe_that_learns_from_its_validation_split_is_refused(tmp_path):
    text = RECIPE.replace('splits = ["train"]', 'splits = ["train", "val"]')
    recipe = write_recipe(tmp_path, text)
    told = run("train", "clip", recipe, "--out", tmp_path / "m", code=2)
    assert "are in a split that is measured on" in told.stderr


def test_splits_that_are_measured_on_are_not_learned_from_unasked(tmp_path):
    """Without `splits`, val and test stay out, however they are written."""
    text = RECIPE.replace('splits = ["train"]\n', "").replace('split = "test"', 'split = "Test"')
    recipe = write_recipe(tmp_path, text)
    rows = (tmp_path / "metadata.jsonl").read_text()
    (tmp_path / "metadata.jsonl").write_text(rows.replace('"split": "test"', '"split": "Test"'))
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
        ('split = "test"', 'split = "val"', "are in a split that is measured on"),
        ('name = "first"', 'name = "a/b"', "stage.0.name: String should match"),
        ("epochs = 2", "epochs = inf", "stage.0.epochs: Input should be a finite number"),
        ("warmup = 1", "warmup = -5", "stage.0.warmup"),
        ("warmup = 1", "betas = [0.9, 1.5]", "stage.0.betas.1: Input should be less than 1"),
        ("warmup = 1", "rates = { visual = -3.0 }", "stage.0.rates.visual"),
        ("warmup = 1", 'freeze = ["visuel"]', "no module 'visuel'; 'visual' perhaps"),
        ("scale = [0.8, 1.0]", 'scale = "big"', "augment: open_clip does not take it"),
        ("warmup = 1", 'cache = ["transformer"]', "cache: "),
        ("ema = 0.8", "seed = 18446744073709551616", "seed: Input should be less than"),
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


def test_a_damaged_picture_is_left_out_and_said(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "0.png").write_bytes(b"not a picture")
    told = run("train", "clip", recipe, "--out", tmp_path / "m")
    assert "are left out (1): 0.png" in told.stderr
    card = (tmp_path / "m/README.md").read_text()
    assert "23 pictures" in card
    assert f"mmsearch index FOLDER --model local-dir:{tmp_path}/m\n" in card


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    """Neither written into nor cleared, even with --restart."""
    recipe = write_recipe(tmp_path)
    theirs = tmp_path / "theirs"
    (theirs / "training").mkdir(parents=True)
    (theirs / "training/mine.txt").write_text("mine")
    for more in ((), ("--restart",)):
        told = run("train", "clip", recipe, "--out", theirs, *more, code=2)
        assert "holds files that no training made" in told.stderr
    assert (theirs / "training/mine.txt").read_text() == "mine"
    assert [path.name for path in theirs.iterdir()] == ["training"]


def test_a_restart_that_cannot_begin_leaves_the_model(tmp_path):
    recipe = write_recipe(tmp_path)
    run("train", "clip", recipe, "--out", tmp_path / "m")
    weights = (tmp_path / "m/open_clip_model.safetensors").read_bytes()
    everything = '"visual", "transformer", "token_embedding", "positional_embedding", '
    everything += '"ln_final", "text_projection", "logit_scale"'
    for text in (
        TWO_STAGES.replace("chunk = 3", f"chunk = 3\nfreeze = [{everything}]"),
        TWO_STAGES + "input_dropout = { logit_scale = 0.1 }\n",
        TWO_STAGES + "input_dropout = { token_embedding = 0.1 }\n",
        TWO_STAGES + 'keep_eval = [""]\n',
        TWO_STAGES + 'freeze = ["visuel"]\n',
        TWO_STAGES + 'cache = ["transformer"]\n',
        TWO_STAGES.replace("batch = 8", "batch = 800"),
        TWO_STAGES.replace("scale = [0.8, 1.0]", 'scale = "big"'),
    ):
        write_recipe(tmp_path, text)
        code = 6 if everything in text else 2
        run("train", "clip", recipe, "--out", tmp_path / "m", "--restart", code=code)
        assert (tmp_path / "m/open_clip_model.safetensors").read_bytes() == weights
    (tmp_path / "metadata.jsonl").rename(tmp_path / "elsewhere.jsonl")
    run("train", "clip", recipe, "--out", tmp_path / "m", "--restart", code=2)
    assert (tmp_path / "m/open_clip_model.safetensors").read_bytes() == weights


def test_a_model_is_not_trained_into_itself(tmp_path):
    """A restart would remove what it starts from, or what teaches it."""
    recipe = write_recipe(tmp_path)
    run("train", "clip", recipe, "--out", tmp_path / "m")
    before = {path: path.read_bytes() for path in (tmp_path / "m").iterdir() if path.is_file()}
    own = f"local-dir:{tmp_path / 'm'}"
    for text in (
        RECIPE.replace('config = "architecture"', f'weights = "{own}"'),
        RECIPE.replace("[augment]", f'[teacher]\nmodel = "{own}"\n[augment]'),
    ):
        write_recipe(tmp_path, text)
        told = run("train", "clip", recipe, "--out", tmp_path / "m", "--restart", code=2)
        assert "take another --out" in told.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_two_runs_do_not_share_a_folder(tmp_path):
    recipe = write_recipe(tmp_path)
    with run_folder(tmp_path / "m", restart=False):
        told = run("train", "clip", recipe, "--out", tmp_path / "m", code=6)
    assert "another process is training into it" in told.stderr


@pytest.mark.parametrize("change", ["moved", "repainted"])
def test_other_data_does_not_go_on_with_a_run(tmp_path, change):
    """A picture that went from train to val, or that shows something else now."""
    recipe = write_recipe(tmp_path)
    run("train", "clip", recipe, "--out", tmp_path / "m")
    (tmp_path / "m/open_clip_config.json").unlink()  # as if it had been killed at the end
    if change == "moved":
        rows = (tmp_path / "metadata.jsonl").read_text()
        turned = rows.replace('"split": "train"', '"split": "val"', 1)
        (tmp_path / "metadata.jsonl").write_text(turned)
    else:
        Image.new("RGB", (40, 32), "white").save(tmp_path / "0.png")
    told = run("train", "clip", recipe, "--out", tmp_path / "m", code=6)
    assert "other settings or data" in told.stderr


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
    names = ["flickr8k", "german", "everyday", "web", "objects", "scenes"]
    assert [table.name for table in recipe.data] == names


def test_the_permissive_recipe_of_tiny_is_valid_and_names_no_other_set(tmp_path):
    from conftest import REPOSITORY

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "scripts"))
        from tiny_data import permissive
    text = permissive((REPOSITORY / "recipes/tiny.toml").read_text())
    (tmp_path / "tiny.toml").write_text(text)
    recipe = read_recipe(tmp_path / "tiny.toml")
    assert [table.name for table in recipe.data] == ["everyday", "scenes"]
    assert "flickr8k" not in text
    assert "german" not in text
    assert recipe.stage[0].views == 4


def test_a_toy_set_has_the_splits_that_these_tests_speak_of(tmp_path):
    write_set(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [sum(row["split"] == name for row in rows) for name in ("train", "val", "test")] == [
        24, 12, 12,
    ]  # fmt: skip

"""`train align`: heads over a frozen model that help, or are not kept."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from fakes import FakeEncoder
from PIL import Image
from toys import RECIPE, write_recipe
from typer.testing import CliRunner

from mmsearch.cli.app import app
from mmsearch.config import load_settings
from mmsearch.datasets import scene_art, scenes
from mmsearch.datasets.labelled import LabelledImage
from mmsearch.encoders.loading import ModelCache, open_encoder
from mmsearch.encoders.open_clip import TorchEncoder, load_heads, load_model
from mmsearch.encoders.registry import base_source, full_name, parse_model, tower_source
from mmsearch.errors import ModelNotFound, TrainingError, UsageError
from mmsearch.networks.aligned import AlignedHeads, HeadsConfig
from mmsearch.training.align import AlignSettings, align, compare
from mmsearch.training.sets import Features, embed_set, read_features

pytestmark = pytest.mark.slow


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def turned_apart(images=240, captions=2, width=16, other=16, noise=0.3, seed=0):
    """Features of two towers whose spaces are turned against each other."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(images, 8))
    owner = np.repeat(np.arange(images), captions)

    def unit(value):
        value = value + noise * rng.normal(size=value.shape)
        return (value / np.linalg.norm(value, axis=1, keepdims=True)).astype(np.float32)

    image = unit(hidden @ rng.normal(size=(8, width)))
    text = unit(hidden[owner] @ rng.normal(size=(8, other)))
    splits = ("train",) * (images - 80) + ("val",) * 40 + ("test",) * 40
    return Features(image, text, owner, splits)


QUICK = AlignSettings(epochs=20, batch=64, rate=1e-2)


def test_heads_that_help_are_kept_with_their_gain(tmp_path):
    report = align(turned_apart(), QUICK, tmp_path, base=None, name="x", data="toys")
    assert report.folder == tmp_path
    assert report.overall.is_gain
    assert report.after["t2i_R@10"] > report.before["t2i_R@10"] + 20
    mean = {side: np.mean(list(getattr(report, side).values())) for side in ("before", "after")}
    assert report.overall.mean == pytest.approx(mean["after"] - mean["before"])
    for key, gain in report.gains.items():
        assert gain.mean == pytest.approx(report.after[key] - report.before[key])
        assert gain.low <= gain.mean <= gain.high
    assert report.images == {"train": 160, "val": 40, "test": 40}


def test_the_decision_is_by_the_recalls_that_are_shown():
    """Captions weigh alike in them, however many their picture has."""
    features = turned_apart(captions=1)
    counts = np.where(np.arange(len(features.images)) % 4 == 0, 9, 1)
    owner = np.repeat(features.owner, counts)
    uneven = Features(features.images, features.texts[owner], owner, features.splits)
    torch.manual_seed(0)
    report = compare(AlignedHeads(HeadsConfig(16, 16, 8, "linear", 0.0)), uneven.of("test"))
    shown = [report.after[key] - report.before[key] for key in report.after]
    assert report.overall.mean == pytest.approx(np.mean(shown))
    assert report.overall.low <= report.overall.mean <= report.overall.high


def test_heads_that_do_not_help_are_not_kept_unless_asked(tmp_path):
    """Texts and images that agree already leave nothing to gain."""
    features = turned_apart()
    same = Features(features.images, features.images[features.owner], features.owner,
                    features.splits)  # fmt: skip
    report = align(same, QUICK, tmp_path / "a", base=None, name="x", data="toys")
    assert report.folder is None
    assert not (tmp_path / "a/mmsearch_model.json").exists()
    report = align(same, QUICK, tmp_path / "b", base=None, name="x", data="toys", keep=True)
    assert report.folder == tmp_path / "b"
    assert (tmp_path / "b/mmsearch_model.json").exists()


def test_widths_may_differ(tmp_path):
    features = turned_apart(width=24, other=12)
    report = align(features, QUICK, tmp_path, base=None, name="x", data="toys")
    assert report.before is None
    assert report.after["t2i_R@10"] > 45  # a guess would be right in 25
    heads = load_heads(tmp_path)
    assert (heads.config.image_width, heads.config.text_width, heads.config.dim) == (24, 12, 12)


def test_feature_files_are_aligned_from_the_command_line(tmp_path):
    """768 and 512 columns, two texts an image, in any order; the aligned files come back."""
    features = turned_apart(width=64, other=96)
    order = np.random.default_rng(1).permutation(len(features.owner))
    np.save(tmp_path / "image.npy", features.images[features.owner][order])
    np.save(tmp_path / "text.npy", features.texts[order])
    told = run("train", "align", "--features", tmp_path / "text.npy", tmp_path / "image.npy",
               "--out", tmp_path / "m", "--epochs", 20, "--batch", 64, "--rate", 0.01)  # fmt: skip
    assert "trained on 192 images, chosen on 24, measured on 24" in told.stdout
    text, image = np.load(tmp_path / "m/text.npy"), np.load(tmp_path / "m/image.npy")
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-5)
    true = (text * image).sum(axis=1).mean()
    assert true > (text * np.roll(image, 5, axis=0)).sum(axis=1).mean() + 0.3
    told = run("index", tmp_path, "--index", tmp_path / "i", "--model", f"local-dir:{tmp_path}/m",
               code=3)  # fmt: skip
    assert "heads for vectors from elsewhere" in told.stderr


def test_one_image_with_several_texts_is_in_one_split_only(tmp_path):
    features = turned_apart(images=120, captions=3)
    np.save(tmp_path / "i.npy", features.images[features.owner])
    np.save(tmp_path / "t.npy", features.texts)
    found = read_features(tmp_path / "t.npy", tmp_path / "i.npy", seed=0)
    assert len(found.images) == 120
    assert len(found.texts) == 360
    assert np.bincount(found.owner).tolist() == [3] * 120
    test = found.of("test")
    assert len(test.images) == 12
    assert len(test.texts) == 36


@pytest.mark.parametrize(
    ("text", "image", "message"),
    [
        (np.ones((20, 3)), np.ones((19, 3)), "20 rows"),
        (np.ones(20), np.ones((20, 3)), "two dimensions"),
        (np.full((20, 3), np.nan), np.ones((20, 3)), "no finite"),
        (np.zeros((20, 3)), np.ones((20, 3)), "zeros"),
        (np.array([["a"] * 3] * 20), np.ones((20, 3)), "numbers"),
        (np.eye(20), np.eye(20), "too few for 'val' .a tenth is held out"),
    ],
)
def test_feature_files_that_make_no_sense_are_refused(tmp_path, text, image, message):
    np.save(tmp_path / "t.npy", text)
    np.save(tmp_path / "i.npy", image)
    with pytest.raises(UsageError, match=message):
        read_features(tmp_path / "t.npy", tmp_path / "i.npy", seed=0)


def test_the_scale_of_the_vectors_does_not_matter(tmp_path):
    features = turned_apart(images=120, captions=1)
    found = []
    for scale in (1.0, 1e-30, 1e30):
        np.save(tmp_path / "i.npy", (features.images * scale).astype(np.float32))
        np.save(tmp_path / "t.npy", (features.texts * scale).astype(np.float32))
        found.append(read_features(tmp_path / "t.npy", tmp_path / "i.npy", seed=0))
        np.testing.assert_allclose(np.linalg.norm(found[-1].images, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found[1].texts, found[0].texts, atol=1e-5)
    np.testing.assert_allclose(found[2].texts, found[0].texts, atol=1e-5)


def labelled(splits):
    return [LabelledImage(f"{place}.png", ("words",), split) for place, split in enumerate(splits)]


@pytest.mark.parametrize("held", ["test", "val", "validation"])
def test_what_a_set_holds_out_is_never_learned_from(tmp_path, held):
    """Even where it lacks the other split, which then comes out of what is learned from."""
    names = ["train"] * 100 + [held] * 20
    gallery = tmp_path / "set"
    gallery.mkdir()
    for place in range(120):
        Image.new("RGB", (8, 8), (place, 0, 0)).save(gallery / f"{place}.png")
    found = embed_set(FakeEncoder("x"), gallery, labelled(names), tmp_path / "cache", 0)
    kept = "test" if held == "test" else "val"
    assert set(found.splits[100:]) == {kept}
    assert found.splits[:100].count("train") == 90


def test_copies_of_a_picture_are_one_picture(tmp_path):
    """Under another name or spelling too: held out where one of them is."""
    gallery = tmp_path / "set"
    gallery.mkdir()
    for place in range(120):
        Image.new("RGB", (8, 8), (place, 0, 0)).save(gallery / f"{place}.png")
    images = labelled(["train"] * 80 + ["val"] * 20 + ["test"] * 20)
    (gallery / "copy.png").write_bytes((gallery / "119.png").read_bytes())
    images = [LabelledImage("copy.png", ("red", "more"), "train"),
              LabelledImage("./7.png", ("words",), "val"), *images]  # fmt: skip
    told = []
    found = embed_set(FakeEncoder("x"), gallery, images, tmp_path / "cache", 0, notify=told.append)
    assert [found.splits.count(split) for split in ("train", "val", "test")] == [79, 21, 20]
    assert np.bincount(found.owner)[0] == 3
    assert found.splits[:2] == ("test", "val")
    assert "2 pictures are listed twice or copies of others" in told[0]


def test_too_few_pictures_to_learn_from_are_refused(tmp_path):
    gallery = tmp_path / "set"
    gallery.mkdir()
    for place in range(23):
        Image.new("RGB", (8, 8), (place, 0, 0)).save(gallery / f"{place}.png")
    names = ["train"] + ["val"] * 11 + ["test"] * 11
    with pytest.raises(UsageError, match="1 are left to train on"):
        embed_set(FakeEncoder("x"), gallery, labelled(names), tmp_path / "cache", 0)


def test_damaged_heads_are_one_clear_error(tmp_path):
    align(turned_apart(), QUICK, tmp_path / "m", base=None, name="x", data="toys", keep=True)
    load_heads(tmp_path / "m")
    content = (tmp_path / "m/heads.safetensors").read_bytes()
    (tmp_path / "m/heads.safetensors").write_bytes(content[:100])
    with pytest.raises(ModelNotFound, match=r"heads.safetensors: heads that cannot be loaded"):
        load_heads(tmp_path / "m")


def test_other_splits_do_not_go_on_with_a_run(tmp_path):
    features = turned_apart()
    align(features, QUICK, tmp_path, base=None, name="x", data="toys")
    (tmp_path / "mmsearch_model.json").unlink()  # as if it had been killed at the end
    moved = dataclasses.replace(features, splits=features.splits[::-1])
    with pytest.raises(TrainingError, match="other settings or data"):
        align(moved, QUICK, tmp_path, base=None, name="x", data="toys")


def test_files_that_no_training_made_are_left_alone(tmp_path):
    features = turned_apart(width=24, other=12)
    np.save(tmp_path / "image.npy", features.images[features.owner])
    np.save(tmp_path / "text.npy", features.texts)
    (tmp_path / "README.md").write_text("mine")
    files = ("--features", tmp_path / "text.npy", tmp_path / "image.npy")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for more in ((), ("--restart",)):
        told = run("train", "align", *files, "--out", tmp_path, "--epochs", 1, *more, code=2)
        assert "holds files that no training made" in told.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    model = tmp_path / "m"
    run("train", "align", *files, "--out", model, "--epochs", 1)
    aligned = ("--features", model / "text.npy", model / "image.npy")
    told = run("train", "align", *aligned, "--out", model, "--restart", code=2)
    assert "take another --out" in told.stderr
    run("train", "align", "nowhere", "--out", model, "--restart", code=2)
    assert (model / "mmsearch_model.json").is_file()


def test_heads_are_not_put_where_their_base_is(tmp_path):
    """They would be their own base."""
    features = turned_apart()
    folder = tmp_path / "m"
    align(features, QUICK, folder, base=None, name="x", data="toys", keep=True)
    before = (folder / "heads.safetensors").read_bytes()
    (folder / "mmsearch_model.json").write_text(
        json.dumps({"version": 1, "base": "tiny", "space": "x", "heads": {}})
    )
    base = FakeEncoder(f"local-dir:{folder}")
    with pytest.raises(UsageError, match="take another --out"):
        align(features, QUICK, folder, base=base, name="x", data="toys", restart=True)
    assert (folder / "heads.safetensors").read_bytes() == before


def test_heads_that_give_no_numbers_are_an_error(tmp_path):
    """Even where no loss has seen them yet: they are neither the best nor the last good ones."""
    far = AlignSettings(head="residual", epochs=3, rate=1e10)
    with pytest.raises(TrainingError, match="not a finite number"):
        align(turned_apart(), far, tmp_path / "m", base=None, name="x", data="toys")
    assert not (tmp_path / "m/mmsearch_model.json").exists()
    told = CliRunner().invoke(app, ["train", "align", "x", "--out", "m", "--rate", "1e39"])
    assert told.exit_code == 2
    assert "Invalid value for '--rate'" in told.stderr


def test_a_pickle_is_not_loaded(tmp_path):
    np.save(tmp_path / "t.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="not an array"):
        read_features(tmp_path / "t.npy", tmp_path / "t.npy", seed=0)
    (tmp_path / "t.npy").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(UsageError, match="not an array"):
        read_features(tmp_path / "t.npy", tmp_path / "t.npy", seed=0)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """120 drawn scenes whose captions use words of their own for the colours."""
    code = dict(zip(scenes.COLOURS, ("zorp", "blick", "fendle", "quist", "marn", "tovo", "ulp",
                                     "drask", "wix", "yarl", "hesk"), strict=True))  # fmt: skip
    folder = tmp_path_factory.mktemp("scenes")
    for number, scene in enumerate(scenes.gallery(120, seed=5000)):
        scene_art.render(scene).resize((96, 96)).save(folder / f"{number}.png")
        words = scenes.captions(scene)[0]
        for colour, name in code.items():
            words = words.replace(colour, name)
        (folder / f"{number}.txt").write_text(words)
    return folder


def test_a_user_aligns_indexes_and_searches(gallery, tmp_path, monkeypatch, tiny):
    monkeypatch.setenv("MMSEARCH_HOME", str(tmp_path / "home"))
    told = run("train", "align", gallery, "--base", "tiny", "--out", "mine", "--epochs", 5,
               "--keep")  # fmt: skip
    assert "use it: mmsearch index FOLDER --model mine" in told.stdout
    run("index", gallery, "--index", tmp_path / "i", "--model", "mine")
    status = json.loads(run("status", "--index", tmp_path / "i", "--json").stdout)
    assert status["model"] == f"local-dir:{tmp_path}/home/models/mine"
    assert status["space"] != tiny.spec.space
    assert run("search", "two cats", "--index", tmp_path / "i", "--paths").stdout
    back = run("index", gallery, "--index", tmp_path / "i", "--model", "tiny")
    assert "the index is now in 'tiny', no longer in" in back.stdout
    status = json.loads(run("status", "--index", tmp_path / "i", "--json").stdout)
    assert status["space"] == tiny.spec.space
    card = (tmp_path / "home/models/mine/README.md").read_text()
    assert "`tiny`, frozen" in card
    assert "with the heads" in card
    recipe = RECIPE.replace('config = "architecture"', 'weights = "mine"')
    refused = run("train", "clip", write_recipe(tmp_path / "set", recipe), "--out", "x", code=2)
    assert "'mine' is heads on a frozen model" in refused.stderr


def test_heads_stand_on_heads(gallery, tmp_path, monkeypatch):
    """All the way down to the towers, by either runtime."""
    monkeypatch.setenv("MMSEARCH_HOME", str(tmp_path / "home"))
    for base, name in (("tiny", "one"), ("one", "two")):
        run("train", "align", gallery, "--base", base, "--out", name, "--epochs", 2, "--keep")
    source = parse_model(full_name("two", tmp_path / "home"))
    assert tower_source(source).name == "tiny"
    texts = ["a red circle", "two dogs"]
    found = open_encoder(source, ModelCache(tmp_path / "cache"), precision="fp32")
    one, two = TorchEncoder(load_model(source)), load_model(base_source(source)).spec.space
    np.testing.assert_allclose(found.encode("text", texts), one.encode("text", texts), atol=1e-4)
    assert len({found.spec.space, two}) == 2
    run("index", gallery, "--index", tmp_path / "i", "--model", "two")
    assert run("search", "two cats", "--index", tmp_path / "i", "--paths").stdout


def test_openvino_serves_an_aligned_model_as_torch_does(gallery, tmp_path, tiny):
    run("train", "align", gallery, "--base", "tiny", "--out", tmp_path / "m", "--epochs", 2,
        "--head", "residual", "--dim", 64, "--keep")  # fmt: skip
    source = parse_model(f"local-dir:{tmp_path / 'm'}")
    assert tower_source(source).name == "tiny"
    torch_encoder = TorchEncoder(load_model(source))
    encoder = open_encoder(source, ModelCache(load_settings().cache), precision="fp32")
    assert encoder.spec.dim == 64
    texts = ["a red circle", "two dogs"]
    np.testing.assert_allclose(
        encoder.encode("text", texts), torch_encoder.encode("text", texts), atol=1e-4
    )
    pixels = np.random.default_rng(0).integers(
        0, 255, (2, *encoder.spec.preprocess.size, 3), np.uint8
    )
    np.testing.assert_allclose(
        encoder.encode("image", pixels), torch_encoder.encode("image", pixels), atol=1e-3
    )
    assert encoder.spec.space == torch_encoder.spec.space


def test_heads_whose_base_has_changed_are_refused(gallery, tmp_path, tiny):
    run("train", "align", gallery, "--base", "tiny", "--out", tmp_path / "m", "--epochs", 1,
        "--keep")  # fmt: skip
    path = tmp_path / "m/mmsearch_model.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "space": "another"}))
    with pytest.raises(ModelNotFound, match="not those that the heads"):
        load_model(parse_model(f"local-dir:{tmp_path / 'm'}"))
    path.write_text(json.dumps({**manifest, "version": 9}))
    with pytest.raises(ModelNotFound, match="newer program"):
        load_model(parse_model(f"local-dir:{tmp_path / 'm'}"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a DATASET"),
        (["--features", "a.npy", "b.npy", "--base", "tiny"], "go with a DATASET"),
        (["nowhere"], "nowhere"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, arguments, message):
    told = run("train", "align", *arguments, "--out", tmp_path / "m", code=2)
    assert message in told.stderr

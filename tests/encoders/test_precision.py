"""The precision that a model runs in: what is chosen, and by what evidence."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from mmsearch.config import load_settings
from mmsearch.datasets import scene_art, scenes
from mmsearch.encoders.checking import check_precisions, overlap
from mmsearch.encoders.loading import ModelCache, open_encoder
from mmsearch.encoders.openvino import OpenVinoEncoder
from mmsearch.encoders.precision import (
    FILE_NAME,
    Verdict,
    choose_precision,
    doubt,
    read_verdicts,
    write_verdicts,
)
from mmsearch.encoders.registry import parse_model
from mmsearch.errors import UsageError
from mmsearch.media.fit import fit

pytestmark = pytest.mark.slow

ALL = ("FP32", "BF16", "INT8")
NAME = "ViT-B-32:/weights"


def good(rate):
    return Verdict(0.99, 0.9999, rate)


def bad(rate):
    return Verdict(0.80, 0.99, rate)


@pytest.mark.parametrize(
    ("verdicts", "chosen"),
    [
        ({"fp32": good(10), "bf16": good(20), "int8": good(40)}, "int8"),
        ({"fp32": good(10), "bf16": good(20), "int8": bad(40)}, "bf16"),
        ({"fp32": good(10), "bf16": bad(20), "int8": bad(40)}, "fp32"),
        ({"fp32": good(30), "bf16": good(20), "int8": good(10)}, "fp32"),  # slower here
        ({"fp32": bad(10), "int8": bad(40)}, "fp32"),  # which the others are held against
    ],
)
def test_auto_takes_the_fastest_that_agrees(verdicts, chosen):
    assert choose_precision("auto", NAME, {}, verdicts, ALL) == chosen


def test_a_precision_that_this_cpu_lacks_is_not_taken_for_what_another_saw():
    verdicts = {"fp32": good(10), "bf16": good(20)}
    assert choose_precision("auto", NAME, {}, verdicts, ("FP32",)) == "fp32"


@pytest.mark.parametrize(("cosine", "chosen"), [(0.9, "fp32"), (0.999, "bf16")])
def test_before_it_was_looked_at_only_bf16_that_agrees_with_torch_is_taken(cosine, chosen):
    agreement = {"fp32": 1.0, "bf16": cosine}
    assert choose_precision("auto", NAME, agreement, {}, ALL) == chosen
    assert choose_precision("auto", NAME, agreement, {}, ("FP32",)) == "fp32"


def test_the_bundled_model_goes_by_what_was_measured_on_labels():
    assert choose_precision("auto", "tiny", {"bf16": 0.5}, {}, ALL) == "bf16"
    assert choose_precision("auto", "tiny", {"bf16": 0.5}, {}, ("FP32",)) == "fp32"
    assert doubt("bf16", "tiny", {"bf16": 0.5}, {}) is None


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8"])
def test_a_precision_that_is_asked_for_is_obeyed(name):
    assert choose_precision(name, NAME, {"bf16": 0.1}, {name: bad(1)}, ("FP32",)) == name


def test_a_precision_that_changes_results_is_told_of():
    assert "80% of a picture's ten nearest" in doubt("int8", NAME, {}, {"int8": bad(40)})
    assert doubt("int8", NAME, {}, {"int8": good(40)}) is None
    assert "cosine down to 0.900" in doubt("bf16", NAME, {"bf16": 0.9}, {})
    assert doubt("bf16", NAME, {"bf16": 0.9}, {"bf16": good(20)}) is None
    assert doubt("fp32", NAME, {}, {"fp32": bad(10)}) is None


def test_verdicts_are_kept_and_damage_says_nothing(tmp_path):
    verdicts = {"fp32": good(10.5), "int8": bad(40)}
    write_verdicts(tmp_path, verdicts)
    assert read_verdicts(tmp_path) == verdicts
    for damage in ("{", "[]", '{"fp32": 1}', '{"fp32": {"overlap": 1}}'):
        (tmp_path / FILE_NAME).write_text(damage)
        assert read_verdicts(tmp_path) == {}


def test_overlap_counts_the_ten_nearest_others_that_stay():
    rng = np.random.default_rng(3)
    first = rng.normal(size=(40, 8))
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = first + rng.normal(scale=0.2, size=first.shape)
    second /= np.linalg.norm(second, axis=1, keepdims=True)

    def ten(rows, own):
        order = sorted(range(len(rows)), key=lambda n: -float(rows[own] @ rows[n]))
        order.remove(own)
        return set(order[:10])

    kept = [len(ten(first, n) & ten(second, n)) / 10 for n in range(40)]
    assert overlap(first, second) == pytest.approx(np.mean(kept))
    assert overlap(first, first) == 1.0


def test_int8_is_made_from_pictures_and_held_against_fp32(tmp_path, capfd):
    cache = ModelCache(load_settings().cache)
    tiny = open_encoder(parse_model("tiny"), cache, precision="fp32")
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder, ignore=shutil.ignore_patterns("compiled", "local"))
    with pytest.raises(UsageError, match="index --precision int8"):
        OpenVinoEncoder(folder, "int8").warm_up("image")
    pixels = np.stack(
        [fit(scene_art.render(scenes.scene(n)), tiny.spec.preprocess) for n in range(96)]
    )
    told = []
    verdicts = check_precisions(folder, pixels, told.append)
    assert told == []
    assert "".join(capfd.readouterr()) == ""
    assert verdicts == read_verdicts(folder)
    assert verdicts["fp32"].overlap == 1.0
    small = OpenVinoEncoder(folder, "int8")
    cosines = (small.encode("image", pixels) * tiny.encode("image", pixels)).sum(axis=1)
    # A quarter of the pictures was calibrated on, the others were compared.
    assert 0.95 < cosines.mean() < 0.9999  # drawn scenes lie near each other
    assert verdicts["int8"].cosine == pytest.approx(cosines.mean(), abs=0.002)
    texts = ["a red ring", "two blue squares"]
    assert (small.encode("text", texts) * tiny.encode("text", texts)).sum(axis=1).min() > 0.999


def test_where_int8_cannot_be_made_the_others_stay(tmp_path, monkeypatch):
    cache = ModelCache(load_settings().cache)
    tiny = open_encoder(parse_model("tiny"), cache, precision="fp32")
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder, ignore=shutil.ignore_patterns("compiled", "local"))
    monkeypatch.setattr("mmsearch.encoders.checking.sys.executable", shutil.which("false"))
    pixels = np.random.default_rng(0).integers(
        0, 255, (80, *tiny.spec.preprocess.size, 3), np.uint8
    )
    told = []
    verdicts = check_precisions(folder, pixels, told.append)
    assert "int8" not in verdicts
    assert told == ["no int8 for this model: exit code 1"]

"""A space's model may have several names: each serves, whichever was there first."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from conftest import REPOSITORY
from fakes import paint

from mmsearch import Engine
from mmsearch.config import Settings
from mmsearch.encoders.loading import ModelCache, open_encoder, pick_device
from mmsearch.encoders.registry import parse_model
from mmsearch.errors import ModelNotFound, UsageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny):
    """Two copies of one model, a picture, and a cache with what `tiny` was converted to."""
    top = tmp_path_factory.mktemp("names")
    for name in ("first", "second"):
        shutil.copytree(REPOSITORY / "mmsearch" / "encoders" / "bundled" / "tiny", top / name)
    paint(top / "p" / "a.png", "red")
    shutil.copytree(os.environ["MMSEARCH_CACHE"], top / "cache")
    return top


def opened(place, index, model=None):
    settings = Settings(index=place / index, cache=place / "cache", home=place / "home")
    return Engine(settings, model=model, notify=lambda line: None)


def test_an_index_has_the_name_that_was_asked_for_and_outlives_its_files(place):
    with opened(place, "i", f"local-dir:{place / 'first'}") as engine:
        engine.index([place / "p"])
    with opened(place, "j", f"local-dir:{place / 'second'}") as engine:
        engine.index([place / "p"])
        assert engine.status().model == f"local-dir:{place / 'second'}"
        space = engine.status().space
    manifest = json.loads((place / "cache" / "models" / space / "manifest.json").read_text())
    assert manifest["spec"]["model"] in ("", "tiny")  # no name of another
    shutil.move(place / "first", place / "gone")
    with opened(place, "i") as engine:
        assert engine.search("red")
        assert (
            engine.opened.encoder_of(engine.opened.space.spec).spec.model
            != f"local-dir:{place / 'first'}"
        )
    shutil.rmtree(place / "cache" / "models" / space)  # and without what it was converted to
    with opened(place, "i") as engine:
        assert engine.search("red")
        assert engine.index([place / "p"]).unchanged == 1
    with opened(place, "i", f"local-dir:{place / 'second'}") as engine:
        report = engine.index([place / "p"])  # another name of the same space: nothing to do
        assert (report.unchanged, report.embedded_again, report.replaced) == (1, 0, "")
    shutil.move(place / "gone", place / "first")


def test_without_any_of_its_names_a_model_is_missing(place):
    source = f"local-dir:{place / 'second'}"
    with opened(place, "k", source) as engine:
        engine.index([place / "p"])
    cache = place / "cache" / "models"
    kept = (cache / "weights.json").read_text()
    (cache / "weights.json").write_text("{}")
    shutil.rmtree(cache / engine_space(place, "k"))
    shutil.move(place / "second", place / "gone")
    try:
        with opened(place, "k") as engine, pytest.raises(ModelNotFound, match="second"):
            engine.search("red")
    finally:
        shutil.move(place / "gone", place / "second")
        (cache / "weights.json").write_text(kept)


def engine_space(place, index):
    with opened(place, index) as engine:
        return engine.status().space


def test_a_labelled_set_is_measured_with_the_model_of_the_index(place, tmp_path):
    (place / "p" / "c.csv").write_text("image,caption\na.png,red\n")
    with opened(place, "m", f"local-dir:{place / 'second'}") as engine:
        engine.index([place / "p"])
    told = []
    settings = Settings(index=place / "m", cache=place / "cache", home=place / "home")
    with Engine(settings, notify=told.append) as engine:
        report = engine.bench(place / "p" / "c.csv")
        fusions = engine.compare_fusions("image", place / "p" / "c.csv", hold_out=0)
    for model in (report.model, fusions.model):
        assert ModelCache(place / "cache").find(parse_model(model))["space"] == engine_space(
            place, "m"
        )
    assert not any("tiny" in line for line in told)  # what is taken where nothing is named
    with Engine(settings, model="tiny", notify=told.append) as engine:
        assert engine.bench(place / "p" / "c.csv").model == "tiny"


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_the_cpu_is_the_cpu_by_any_name(place, device):
    assert pick_device(device) == "cpu"
    settings = Settings(index=place / "n", cache=place / "cache", device=device, precision="fp32")
    with Engine(settings, model="tiny", notify=lambda line: None) as engine:
        assert type(engine.opened.encoder_to_index()[0]).__name__ == "OpenVinoEncoder"


def test_int8_on_a_device_of_torch_is_refused(place):
    with pytest.raises(UsageError, match="int8 is for OpenVINO"):
        open_encoder(
            parse_model("tiny"), ModelCache(place / "cache"), device="cuda", precision="int8"
        )

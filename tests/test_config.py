"""Settings: defaults < config file < environment < flags."""

from __future__ import annotations

import pytest

from mmsearch.config import MARKER, load_settings
from mmsearch.errors import UsageError


@pytest.fixture
def config(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    monkeypatch.setenv("MMSEARCH_CONFIG", str(path))
    return path


def test_each_source_overrules_the_one_before(config, monkeypatch):
    assert load_settings().model == "auto"
    config.write_text('model = "tiny"\nworkers = 3\n')
    assert load_settings().model == "tiny"
    monkeypatch.setenv("MMSEARCH_MODEL", "base")
    assert load_settings().model == "base"
    assert load_settings(model="hf-hub:a/b").model == "hf-hub:a/b"
    assert load_settings(model=None).model == "base"
    assert load_settings().workers == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [("model = ", "cannot be read"), ("colour = 1", "unknown setting 'colour'"),
     ("workers = 0", "from 1"),
        ("workers = [1]", "whole number"),
        ("model = 3", "model is a text"),
        ("index = 3", "index is a text"), ('precision = "fp8"', "precision is one of")],
)  # fmt: skip
def test_a_bad_config_file_is_explained(config, content, says):
    config.write_text(content)
    with pytest.raises(UsageError, match=says):
        load_settings()


def test_a_bad_environment_is_explained(config, monkeypatch):
    monkeypatch.setenv("MMSEARCH_WORKERS", "many")
    with pytest.raises(UsageError, match="not 'many'"):
        load_settings()


def test_the_index_is_ours_only_with_its_marker(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = load_settings(home="h").index_folder()
    assert str(home) == "h/index"
    (tmp_path / "index").mkdir()
    assert load_settings(home="h").index_folder() == home
    (tmp_path / "index" / MARKER).touch()
    assert str(load_settings(home="h").index_folder()) == "index"
    assert str(load_settings(index="other").index_folder()) == "other"

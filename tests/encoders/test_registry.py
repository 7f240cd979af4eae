"""Names of models, and what happens without a network."""

from __future__ import annotations

import socket
import time

import pytest

from mmsearch.encoders import registry
from mmsearch.encoders.registry import (
    cached_files,
    full_name,
    hub_reachable,
    model_folder,
    name_of,
    parse_model,
    require_weights,
)
from mmsearch.errors import ModelNotFound, UsageError


@pytest.mark.parametrize(
    ("name", "kind", "architecture", "location"),
    [
        ("ViT-B-32/laion2b_s34b_b79k", "tag", "ViT-B-32", "laion2b_s34b_b79k"),
        ("base", "hf-hub", "", "immich-app/ViT-B-32__laion2b-s34b-b79k"),
        ("base-multilingual", "hf-hub", "", "immich-app/ViT-B-32-SigLIP2-256__webli"),
        ("onnx:/models/mine", "onnx", "", "/models/mine"),
        ("ViT-B-32:/weights/my model.pt", "file", "ViT-B-32", "/weights/my model.pt"),
        ("hf-hub:org/name", "hf-hub", "", "org/name"),
        ("local-dir:/models/mine", "local-dir", "", "/models/mine"),
    ],
)
def test_names_say_where_a_model_comes_from(name, kind, architecture, location):
    source = parse_model(name)
    assert (source.kind, source.architecture, source.location) == (kind, architecture, location)
    assert parse_model(source.name) == source


def test_a_path_is_a_model_folder():
    for name in ("/a/b", "./b", "../b", "~/b"):
        assert parse_model(name) == parse_model(f"local-dir:{name}")


@pytest.mark.parametrize("name", ["", "clip", "ViT-B-32:", ":/path", "hf-hub:", "a/"])
def test_other_names_are_explained(name):
    with pytest.raises(UsageError, match="use tiny, base"):
        parse_model(name)


@pytest.mark.parametrize("name", ["a/b/c", "org/", "org/name (base)", "https://hub/org/name"])
def test_a_repository_has_a_name(name):
    with pytest.raises(UsageError, match="is no hub repository"):
        parse_model(f"hf-hub:{name}")


def test_tiny_is_always_there():
    assert [path.name for path in cached_files(parse_model("tiny"))] == [
        "open_clip_config.json",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "open_clip_model.safetensors",
    ]


def test_what_was_base_before_is_the_repository_that_open_clip_names():
    import open_clip

    source = parse_model(registry.DATACOMP)
    known = open_clip.get_pretrained_cfg(source.architecture, source.location)
    assert known["hf_hub"].rstrip("/") == registry.DATACOMP_REPOSITORY


@pytest.mark.parametrize("name", ["local-dir:/no/such", "ViT-B-32:/no/such.pt"])
def test_a_path_that_is_not_there_is_named(name):
    with pytest.raises(ModelNotFound, match="/no/such"):
        cached_files(parse_model(name))


def test_an_unknown_tag_lists_those_there_are():
    with pytest.raises(ModelNotFound, match="laion2b_s34b_b79k"):
        cached_files(parse_model("ViT-B-32/nonsense"))


def test_weights_that_are_not_here_and_cannot_be_fetched():
    with pytest.raises(ModelNotFound, match="cannot be reached"):
        require_weights(parse_model("base"))


@pytest.mark.parametrize(("tag", "wanted"), [("openai", True), ("laion2b_s34b_b79k", False)])
def test_openai_weights_get_the_activation_they_learned_with(tag, wanted):
    from mmsearch.encoders.open_clip import model_config, wants_quick_gelu

    source = parse_model(f"ViT-B-32/{tag}")
    assert wants_quick_gelu(source) is wanted
    assert model_config(source).get("quick_gelu", False) is wanted


def test_a_hub_that_never_answers_is_given_up_in_seconds(monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert not hub_reachable()
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("out", ["mine", "./mine", "somewhere/mine"])
def test_a_trained_model_s_card_says_a_name_that_model_takes(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    folder = model_folder(out, home)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text("{}")
    assert full_name(name_of(folder, home), home) == f"local-dir:{folder}"


def test_what_base_takes_to_fetch_is_what_is_published():
    from mmsearch.encoders.published import published_models

    published = {model.name: model.megabytes for model in published_models()}
    for name in registry.ALIASES.values():
        assert registry.KNOWN[name].megabytes == published[name]

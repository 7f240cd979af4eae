"""Composing a picture with a text: NumPy against torch, the file, and when it is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import DECODERS, DIM, FakeEncoder, unit_vectors
from safetensors.torch import save_file

from mmsearch.errors import UsageError
from mmsearch.networks.early_fusion import EarlyFusion
from mmsearch.search.compose import FILE_NAME, Composer, late, read_composer, write_composer
from mmsearch.search.searcher import Learned, Searcher
from mmsearch.types import Query, Term

RNG = np.random.default_rng(3)


@pytest.fixture
def network():
    torch.manual_seed(1)
    made = EarlyFusion(DIM, 24).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made


def weights_of(network):
    return {name: value.detach().numpy() for name, value in network.state_dict().items()}


def test_numpy_computes_what_torch_computes(network):
    image, text = unit_vectors(RNG, 50), unit_vectors(RNG, 50)
    with torch.inference_mode():
        expected = network(torch.from_numpy(image), torch.from_numpy(text)).numpy()
    found = Composer(weights_of(network))(image, text)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_network_is_kept_for_its_space_alone(tmp_path, network):
    image, text = unit_vectors(RNG, 9), unit_vectors(RNG, 9)
    assert read_composer(tmp_path, "a", DIM) is None
    write_composer(tmp_path, weights_of(network), "a", is_for_photos=False)
    assert read_composer(tmp_path, "b", DIM) is None
    kept = read_composer(tmp_path, "a", DIM)
    assert not kept.is_for_photos
    assert read_composer(tmp_path, "a", DIM) is kept  # read once
    found = kept(image, text)
    np.testing.assert_allclose(found, Composer(weights_of(network))(image, text), atol=2e-3)
    with pytest.raises(UsageError, match=f"takes vectors of {DIM} dimensions, not 5"):
        read_composer(tmp_path, "a", 5)
    write_composer(tmp_path, weights_of(network), "a", is_for_photos=True)
    assert read_composer(tmp_path, "a", DIM).is_for_photos


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_damaged_file_is_one_clear_line(tmp_path, network, keep):
    write_composer(tmp_path, weights_of(network), "a", is_for_photos=True)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="delete it, or learn it anew"):
        read_composer(tmp_path, "a", DIM)


def test_a_newer_file_is_refused_in_its_own_space_alone(tmp_path, network):
    half = {name: torch.from_numpy(value).bfloat16() for name, value in weights_of(network).items()}
    for weights, version in ((half, "1"), ({}, "1"), (half, "2")):
        save_file(weights, tmp_path / FILE_NAME, {"version": version, "space": "a"})
        assert read_composer(tmp_path, "b", DIM) is None
        with pytest.raises(UsageError, match="delete it, or learn it anew"):
            read_composer(tmp_path, "a", DIM)


def test_nothing_is_left_of_two_that_are_opposite():
    """No gate, no residual: what is left is said where the query is put together."""
    network = EarlyFusion(DIM, 4)
    row = unit_vectors(RNG, 1)
    found = Composer(weights_of(network))(row, -row)
    np.testing.assert_allclose(found, np.zeros_like(row), atol=1e-3)
    far = weights_of(network) | {"gate.bias": np.array([-1e4], np.float32)}
    np.testing.assert_allclose(Composer(far)(row, -row), row, atol=1e-6)


def test_another_network_is_refused(network):
    good = weights_of(network)
    for change, message in (
        ({"gate.weight": good["text.weight"]}, "gate has the shape"),
        ({"residual.bias": good["gate.bias"]}, "residual has the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            Composer({**good, **change})


class Turned:
    """A network that cannot be taken for a sum: its opposite."""

    def __init__(self, *, is_for_photos=True):
        self.is_for_photos = is_for_photos

    def __call__(self, image, text):
        return -late(image, text)


def searcher_with(composer):
    return Searcher(
        None, FakeEncoder(), Learned(composer=lambda: composer), decoders=lambda: DECODERS
    )


@pytest.fixture
def pair(photos):
    return Term(image=photos / "red.png"), Term(text="blue")


def test_one_picture_and_one_text_are_composed_by_what_was_learned(pair):
    searcher = searcher_with(Turned())
    for terms in (pair, pair[::-1]):
        for asked in ("auto", "early"):
            assert searcher.compose_of(Query(terms, compose=asked), "image") == "early"
        assert searcher.compose_of(Query(terms, compose="late"), "image") == "late"
        np.testing.assert_allclose(
            searcher.embed(terms, "early"), -searcher.embed(terms, "late"), atol=1e-6
        )


def test_what_no_photo_has_shown_is_not_used_unasked(pair):
    searcher = searcher_with(Turned(is_for_photos=False))
    assert searcher.compose_of(Query(pair), "image") == "late"
    assert searcher.compose_of(Query(pair, compose="early"), "image") == "early"


def test_auto_is_for_images_by_what_they_show(pair):
    searcher = searcher_with(Turned())
    assert searcher.compose_of(Query(pair, to="caption"), "image") == "late"
    assert searcher.compose_of(Query(pair), "sum") == "late"
    assert searcher.compose_of(Query(pair, compose="early"), "sum") == "early"


def test_other_terms_are_added_up(pair):
    searcher = searcher_with(Turned())
    picture, text = pair
    for terms in (
        (text,), (picture,), (text, text), (picture, picture), (picture, text, text),
        (picture, Term(text="blue", weight=2)), (Term(image=picture.image, weight=-1), text),
    ):  # fmt: skip
        assert searcher.compose_of(Query(terms), "image") == "late"
        with pytest.raises(UsageError, match="one --image and one text"):
            searcher.compose_of(Query(terms, compose="early"), "image")


def test_what_was_not_learned_is_a_line(pair):
    searcher = Searcher(None, FakeEncoder(), decoders=lambda: DECODERS)
    assert searcher.compose_of(Query(pair), "image") == "late"
    with pytest.raises(UsageError, match="train compose"):
        searcher.compose_of(Query(pair, compose="early"), "image")
    with pytest.raises(UsageError, match="not 'soon'"):
        searcher.compose_of(Query(pair, compose="soon"), "image")
    nothing = searcher_with(lambda image, text: np.zeros_like(image))
    with pytest.raises(UsageError, match="nothing is left"):
        nothing.embed(pair, "early")

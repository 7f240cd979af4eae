"""Composing a picture with a text: OpenVINO against torch, the file, and when it is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import DECODERS, DIM, FakeEncoder, unit_vectors
from safetensors.torch import save_file

from mmsearch.errors import TrainingError, UsageError
from mmsearch.networks.fusion import EarlyFusion
from mmsearch.search.compose import FILE_NAME, Composer, read_composer, weighted_sum, write_composer
from mmsearch.search.searcher import Searcher, Trained
from mmsearch.search.trained import Network
from mmsearch.training.compose import export_composer
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


def composer_of(network):
    return Composer(export_composer(network), DIM)


def test_what_comes_with_tiny_is_for_tiny_and_for_photos(tiny, tmp_path):
    assert read_composer(tmp_path, tiny.spec.space, tiny.spec.dim).is_for_photos


def test_openvino_computes_what_torch_computes(network):
    image, text = unit_vectors(RNG, 50), unit_vectors(RNG, 50)
    composer = composer_of(network)
    with torch.inference_mode():
        expected = network(torch.from_numpy(image), torch.from_numpy(text)).numpy()
    found = composer(image, text)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_network_is_kept_for_its_space_alone(tmp_path, network):
    image, text = unit_vectors(RNG, 9), unit_vectors(RNG, 9)
    assert read_composer(tmp_path, "a", DIM) is None
    write_composer(tmp_path, export_composer(network), DIM, "a", is_for_photos=False)
    assert read_composer(tmp_path, "b", DIM) is None
    kept = read_composer(tmp_path, "a", DIM)
    assert not kept.is_for_photos
    assert read_composer(tmp_path, "a", DIM) is kept  # read once
    np.testing.assert_array_equal(kept(image, text), composer_of(network)(image, text))
    with pytest.raises(UsageError, match=f"takes vectors of {DIM} dimensions, not 5"):
        read_composer(tmp_path, "a", 5)
    write_composer(tmp_path, export_composer(network), DIM, "a", is_for_photos=True)
    assert read_composer(tmp_path, "a", DIM).is_for_photos


@pytest.mark.parametrize("place", [0, 7, 300, -1])
def test_a_damaged_file_is_one_clear_line(tmp_path, network, place):
    """Cut short, and with one bit that is another."""
    write_composer(tmp_path, export_composer(network), DIM, "a", is_for_photos=True)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[place] ^= 4
    for content in (whole[:place], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="delete it, or train it again"):
            read_composer(tmp_path, "a", DIM)


def test_a_graph_that_cannot_be_run_is_one_clear_line(tmp_path):
    """As of another OpenVINO."""
    write_composer(tmp_path, Network(b"<net/>", bytes(64)), DIM, "a", is_for_photos=True)
    with pytest.raises(UsageError, match="train it again"):
        read_composer(tmp_path, "a", DIM)(unit_vectors(RNG, 1), unit_vectors(RNG, 1))


def test_a_damaged_file_keeps_no_search_from_the_sum(tmp_path, pair, caplog):
    (tmp_path / FILE_NAME).write_bytes(b"nothing")
    trained = Trained(composer=lambda: read_composer(tmp_path, "a", DIM))
    searcher = Searcher(None, FakeEncoder(), trained)
    assert searcher.compose_of(Query(pair), "image") == "sum"
    assert "delete it, or train it again" in caplog.text
    with pytest.raises(UsageError, match="train it again"):
        searcher.compose_of(Query(pair, compose="early"), "image")


def test_files_of_other_programs_are_refused_in_their_own_space_alone(tmp_path):
    for weights, version in (({"image.weight": torch.zeros(2, 2)}, "1"), ({}, "2"), ({}, "3")):
        save_file(weights, tmp_path / FILE_NAME, {"version": version, "space": "a"})
        assert read_composer(tmp_path, "b", DIM) is None
        with pytest.raises(UsageError, match="delete it, or train it again"):
            read_composer(tmp_path, "a", DIM)


def test_nothing_is_left_of_two_that_are_opposite():
    """No gate, no residual: what is left is said where the query is put together."""
    network = EarlyFusion(DIM, 4)
    row = unit_vectors(RNG, 1)
    np.testing.assert_allclose(composer_of(network)(row, -row), np.zeros_like(row), atol=1e-3)
    torch.nn.init.constant_(network.gate.bias, -1e4)
    np.testing.assert_allclose(composer_of(network)(row, -row), row, atol=1e-6)


def test_a_network_of_no_numbers_is_refused(network):
    torch.nn.init.constant_(network.gate.bias, 1e6)  # more than half precision holds
    with pytest.raises(TrainingError, match="no numbers"):
        export_composer(network)


class Turned:
    """A network that cannot be taken for a sum: its opposite."""

    def __init__(self, *, is_for_photos=True):
        self.is_for_photos = is_for_photos

    def __call__(self, image, text):
        return -weighted_sum(image, text)


def searcher_with(composer):
    return Searcher(
        None, FakeEncoder(), Trained(composer=lambda: composer), decoders=lambda: DECODERS
    )


@pytest.fixture
def pair(photos):
    return Term(image=photos / "red.png"), Term(text="blue")


def test_one_picture_and_one_text_are_composed_by_what_was_learned(pair):
    searcher = searcher_with(Turned())
    for terms in (pair, pair[::-1]):
        for asked in ("auto", "early"):
            assert searcher.compose_of(Query(terms, compose=asked), "image") == "early"
        assert searcher.compose_of(Query(terms, compose="sum"), "image") == "sum"
        np.testing.assert_allclose(
            searcher.embed(terms, "early"), -searcher.embed(terms, "sum"), atol=1e-6
        )


def test_what_no_photo_has_shown_is_not_used_unasked(pair):
    searcher = searcher_with(Turned(is_for_photos=False))
    assert searcher.compose_of(Query(pair), "image") == "sum"
    assert searcher.compose_of(Query(pair, compose="early"), "image") == "early"


def test_auto_is_for_images_by_what_they_show(pair):
    searcher = searcher_with(Turned())
    assert searcher.compose_of(Query(pair, to="caption"), "image") == "sum"
    assert searcher.compose_of(Query(pair), "sum") == "sum"
    assert searcher.compose_of(Query(pair, compose="early"), "sum") == "early"


def test_other_terms_are_added_up(pair):
    searcher = searcher_with(Turned())
    picture, text = pair
    for terms in (
        (text,), (picture,), (text, text), (picture, picture), (picture, text, text),
        (picture, Term(text="blue", weight=2)), (Term(image=picture.image, weight=-1), text),
    ):  # fmt: skip
        assert searcher.compose_of(Query(terms), "image") == "sum"
        with pytest.raises(UsageError, match="one --image and one text"):
            searcher.compose_of(Query(terms, compose="early"), "image")


def test_what_was_not_learned_is_a_line(pair):
    searcher = Searcher(None, FakeEncoder(), decoders=lambda: DECODERS)
    assert searcher.compose_of(Query(pair), "image") == "sum"
    with pytest.raises(UsageError, match="train compose"):
        searcher.compose_of(Query(pair, compose="early"), "image")
    with pytest.raises(UsageError, match="not 'soon'"):
        searcher.compose_of(Query(pair, compose="soon"), "image")
    nothing = searcher_with(lambda image, text: np.zeros_like(image))
    with pytest.raises(UsageError, match="nothing is left"):
        nothing.embed(pair, "early")

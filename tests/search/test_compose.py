"""Composing a picture with a text: NumPy against torch, the file, and when it is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import DIM, FakeEncoder, unit_vectors

from mmsearch.errors import UsageError
from mmsearch.networks.early_fusion import EarlyFusion
from mmsearch.search.compose import FILE_NAME, Composer, late, read_composer, write_composer
from mmsearch.search.searcher import Learned, Searcher
from mmsearch.types import Term

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
    write_composer(tmp_path, weights_of(network), "a")
    assert read_composer(tmp_path, "b", DIM) is None
    found = read_composer(tmp_path, "a", DIM)(image, text)
    np.testing.assert_allclose(found, Composer(weights_of(network))(image, text), atol=2e-3)
    with pytest.raises(UsageError, match=f"takes vectors of {DIM} dimensions, not 5"):
        read_composer(tmp_path, "a", 5)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_damaged_file_is_one_clear_line(tmp_path, network, keep):
    write_composer(tmp_path, weights_of(network), "a")
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="delete it, or learn it anew"):
        read_composer(tmp_path, "a", DIM)


def test_another_network_or_no_numbers_are_refused(network):
    good = weights_of(network)
    for change, message in (
        ({"gate.weight": good["text.weight"]}, "gate has the shape"),
        ({"residual.bias": good["gate.bias"]}, "residual has the shape"),
        ({"joint.bias": np.full_like(good["joint.bias"], np.nan)}, "no finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            Composer({**good, **change})


class Spy:
    def __init__(self):
        self.read = 0

    def __call__(self):
        self.read += 1
        return lambda image, text: -late(image, text)


def test_one_picture_and_one_text_are_composed_by_what_was_learned(photos):
    spy = Spy()
    searcher = Searcher(None, FakeEncoder(), Learned(composer=spy))
    picture, text = Term(image=photos / "red.png"), Term(text="blue")
    added = searcher.embed((picture, text), "late")
    assert spy.read == 0
    for how in ("auto", "early"):
        np.testing.assert_allclose(searcher.embed((picture, text), how), -added, atol=1e-6)
        np.testing.assert_allclose(searcher.embed((text, picture), how), -added, atol=1e-6)
    assert spy.read == 4


def test_other_terms_are_added_up(photos):
    spy = Spy()
    searcher = Searcher(None, FakeEncoder(), Learned(composer=spy))
    picture, text = Term(image=photos / "red.png"), Term(text="blue")
    for terms in (
        (text,), (picture,), (text, text), (picture, picture), (picture, text, text),
        (picture, Term(text="blue", weight=2)), (Term(image=picture.image, weight=-1), text),
    ):  # fmt: skip
        np.testing.assert_array_equal(searcher.embed(terms), searcher.embed(terms, "late"))
        with pytest.raises(UsageError, match="one --image and one text"):
            searcher.embed(terms, "early")
    assert spy.read == 0


def test_what_was_not_learned_is_not_used_unasked(photos):
    searcher = Searcher(None, FakeEncoder())
    pair = (Term(image=photos / "red.png"), Term(text="blue"))
    np.testing.assert_array_equal(searcher.embed(pair), searcher.embed(pair, "late"))
    with pytest.raises(UsageError, match="train compose"):
        searcher.embed(pair, "early")
    with pytest.raises(UsageError, match="not 'soon'"):
        searcher.embed(pair, "soon")

"""Judgments with grades: what other tools make of the same qrels, and hand-worked cases."""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest
from fakes import unit_vectors
from ir_measures import Success, nDCG

from mmsearch.datasets.labelled import LabelledImage
from mmsearch.errors import LabelsError
from mmsearch.evaluation.judgments import by_judgments, caption_names, read_qrels

FILES = [f"{number}.jpg" for number in range(30)]


def measured(images, captions, owner, qrels, files=FILES):
    names = [[f"{files[image]}#{place}"] for place, image in enumerate(owner)]
    return by_judgments(images, captions, np.array(owner), names, files, qrels)


def test_figures_are_those_of_ir_measures():
    rng = np.random.default_rng(0)
    images, captions = unit_vectors(rng, 30), unit_vectors(rng, 20)
    owner = rng.integers(30, size=20)
    names = [f"{FILES[image]}#{place}" for place, image in enumerate(owner)]
    qrels = {
        name: {FILES[image]: int(rng.integers(4)) for image in rng.choice(30, 12, replace=False)}
        | {FILES[own]: 3}
        for name, own in zip(names, owner, strict=True)
    }
    found = measured(images, captions, owner, qrels)
    scores = captions @ images.T
    run = {
        name: {file: float(score) for file, score in zip(FILES, row, strict=True)}
        for name, row in zip(names, scores, strict=True)
    }
    wanted = ir_measures.calc_aggregate(
        [nDCG @ 10, Success(rel=1) @ 1, Success(rel=1) @ 5, Success(rel=1) @ 10], qrels, run
    )
    assert found.ndcg == pytest.approx(100 * wanted[nDCG @ 10])
    for k in (1, 5, 10):
        assert found.approved.recall[k] == pytest.approx(100 * wanted[Success(rel=1) @ k])
    assert found.ndcg_interval[0] < found.ndcg < found.ndcg_interval[1]


def test_another_picture_that_people_approved_counts_beside_the_captions_own():
    axes = np.eye(3, dtype=np.float32)
    caption = np.array([[0.6, 0.8, 0.0]], np.float32)  # nearest to the second picture
    found = measured(axes, caption, [0], {"0.jpg#0": {"1.jpg": 2, "2.jpg": 0}}, FILES[:3])
    assert found.plain.recall[1] == 0
    assert found.approved.recall[1] == 100
    assert found.ndcg == pytest.approx(100)  # its own has the file's highest grade, 2, as well


def test_a_tie_counts_against_us():
    images = np.eye(2, dtype=np.float32)
    caption = np.array([[0.5**0.5, 0.5**0.5]], np.float32)
    found = measured(images, caption, [1], {"1.jpg#0": {"0.jpg": 0, "1.jpg": 3}}, FILES[:2])
    assert found.approved.recall[1] == 0
    assert found.ndcg == pytest.approx(100 / np.log2(3))


def test_judgments_of_what_is_not_measured_are_counted_and_left_out():
    images = np.eye(2, dtype=np.float32)
    qrels = {"0.jpg#0": {"0.jpg": 1, "gone.jpg": 1}, "gone.jpg#0": {"0.jpg": 1, "1.jpg": 0}}
    found = measured(images, images[:1], [0], qrels, FILES[:2])
    assert (found.approved.queries, found.unknown) == (1, 3)
    with pytest.raises(LabelsError, match=r"IMAGE#N, .* such as '0.jpg#0'"):
        measured(images, images[:1], [0], {"7": {"0.jpg": 1}}, FILES[:2])


def test_a_captions_number_is_its_place_in_the_labelled_set():
    images = [LabelledImage("a.jpg", (" first", "second")), LabelledImage("b.jpg", ("first",))]
    # The index has them in another order, and one picture is missing.
    found = caption_names(images, {"a.jpg": 0}, ["second", "first"], np.array([0, 0]))
    assert found == [["a.jpg#1"], ["a.jpg#0"]]


def test_qrels_are_read_with_names_that_hold_spaces(tmp_path):
    path = tmp_path / "some.qrels"
    path.write_text("a.jpg#0 0 b c.jpg 2\n\na d.jpg#0\t0\te f.jpg\t0\n")
    assert read_qrels(path) == {"a.jpg#0": {"b c.jpg": 2}, "a d.jpg#0": {"e f.jpg": 0}}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a 0 b 1\na 0 b\n", "line 2 is not"),
        (b"a 0 b good\n", "line 1 is not"),
        (b"\n", "no judgments"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_what_is_no_qrels_is_told(tmp_path, content, told):
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(LabelsError, match=told):
        read_qrels(path)
    with pytest.raises(LabelsError, match="cannot be read"):
        read_qrels(tmp_path / "missing")

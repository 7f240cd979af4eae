"""Zero-shot classification: figures by hand, folders that are labels, and real pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mmsearch import Engine
from mmsearch.cli.app import app
from mmsearch.datasets import scene_art, scenes
from mmsearch.errors import LabelsError, UsageError
from mmsearch.evaluation.classification import (
    Classification,
    different_labels,
    label_sentences,
    label_vectors,
    read_labels,
    to_json,
    to_text,
    true_labels,
)
from mmsearch.evaluation.ranking import bootstrap_interval

LABELS = ("cat", "red dog", "bird")


def classified(scores, truth):
    paths = tuple(Path(f"/p/{number}.jpg") for number in range(len(scores)))
    return Classification("fake", LABELS, paths, np.array(scores, np.float32), np.array(truth))


def test_accuracy_and_confusions_by_hand():
    found = classified(
        [[0.9, 0.1, 0.0], [0.8, 0.7, 0.1], [0.2, 0.9, 0.1], [0.1, 0.1, 0.5], [0.5, 0.1, 0.1]],
        [0, 1, 1, 2, -1],
    )
    assert found.predicted.tolist() == [0, 0, 1, 2, 0]
    assert found.accuracy.top1 == 75
    assert found.accuracy.per_class == pytest.approx(100 * (1 + 0.5 + 1) / 3)
    assert (found.accuracy.pictures, found.accuracy.classes) == (4, 3)
    assert found.accuracy.top5 == 100
    assert found.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    document = to_json(found)
    assert document["confusion"]["red dog"] == {"cat": 1, "red dog": 1}
    assert document["pictures"][4] == {
        "path": "/p/4.jpg", "label": "cat", "score": 0.5, "true": None,
    }  # fmt: skip
    assert "red dog  1 of 2 as cat" in to_text(found)
    json.dumps(document)


def test_a_tie_counts_against_us_and_no_truth_gives_no_accuracy():
    assert classified([[0.5, 0.5, 0.1]], [0]).accuracy.top1 == 0
    assert classified([[0.5, 0.5, 0.1]], [-1]).accuracy is None
    assert to_text(classified([[0.5, 0.5, 0.1]], [-1])) == ""


def test_the_nearest_folder_that_is_called_like_a_label_is_the_truth():
    paths = [Path("bird/Red_Dog/a.jpg"), Path("CAT/x/a.jpg"), Path("cats/a.jpg"), Path("cat.jpg")]
    assert true_labels(paths, LABELS).tolist() == [1, 0, -1, -1]


def test_a_label_stands_for_the_mean_of_its_sentences():
    seen = []

    def encode(texts):
        first = len(seen) // 2
        seen.extend(texts)
        return np.eye(4, dtype=np.float32)[first : first + 2]

    sentences = label_sentences(["cat", "dog"], ["a {}", "two {}s"])
    found = label_vectors(sentences, encode)
    assert seen == ["a cat", "two cats", "a dog", "two dogs"]
    np.testing.assert_allclose(found, np.array([[1, 1, 0, 0], [0, 1, 1, 0]]) / 2**0.5, rtol=1e-6)
    with pytest.raises(UsageError, match="has no"):
        label_sentences(["cat"], ["a"])


def test_labels_that_differ_in_case_or_dashes_are_one():
    assert different_labels(["Cat", "red-dog", "cat", "red dog"]) == ["Cat", "red-dog"]
    with pytest.raises(LabelsError, match="at least two"):
        different_labels(["cat", "CAT"])


def test_the_interval_is_that_of_a_bootstrap_over_pictures():
    scores = np.eye(3, dtype=np.float32)[np.zeros(200, int)]
    truth = np.where(np.arange(200) < 150, 0, 1)
    accuracy = classified(scores, truth).accuracy
    expected = bootstrap_interval(100.0 * (truth == 0), np.arange(200))
    np.testing.assert_allclose(accuracy.interval, expected)


def test_labels_are_read_a_line_each(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("# animals\ncat\n\n red dog \ncat\n")
    assert read_labels(path) == ["cat", "red dog"]
    for content, told in ((b"cat\ncat\n", "at least two"), (b"\xff\xfe\0", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(LabelsError, match=told):
            read_labels(path)
    with pytest.raises(LabelsError, match="cannot be read"):
        read_labels(tmp_path / "missing")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Drawn scenes in folders that are called like what they show."""
    # A folder above may be called like a label.
    top = tmp_path_factory.mktemp("face", numbered=False) / "drawn"
    for kind in ("animal", "face", "landscape"):
        folder = top / kind.upper()
        folder.mkdir(parents=True)
        for seed in range(600, 604):
            scene_art.render(scenes.scene(seed, (kind,))).save(folder / f"{seed}.png")
    scene_art.render(scenes.scene(604, ("vehicle",))).save(top / "604.png")
    return top


@pytest.mark.slow
def test_drawn_scenes_are_told_apart(drawn, tmp_path, tiny):
    names = ["animal", "face", "landscape", "vehicle"]
    (tmp_path / "labels.txt").write_text("\n".join(names))
    arguments = ["classify", str(drawn), "--labels", str(tmp_path / "labels.txt"), "--index",
                 str(tmp_path / "none"), "--model", "tiny"]  # fmt: skip
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    lines = told.stdout.splitlines()
    assert len(lines[0].split("\t")) == 3
    assert any(line.startswith("accuracy ") for line in lines)
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["accuracy"]["pictures"] == 12
    assert [one["true"] for one in found["pictures"] if Path(one["path"]).parent == drawn] == [None]
    assert found["accuracy"]["top1"] > 50  # chance is 25
    assert not (tmp_path / "none").exists()
    with Engine.open(tmp_path / "index", model="tiny") as engine:
        engine.index([drawn])
        own = engine.classify(names)
        assert [names[label] for label in own.predicted] == [
            one["label"] for one in found["pictures"]
        ]
        (tmp_path / "empty").mkdir()
        with pytest.raises(UsageError, match="no picture that can be read"):
            engine.classify(names, tmp_path / "empty")

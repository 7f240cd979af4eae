"""The whole of it on real photos."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mmsearch import Engine, Query, Term
from mmsearch.evaluation.retrieval import export_vectors, to_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flickr(data, tiny):
    """Two hundred photos of Flickr8k's test split, with the vectors that were compared."""
    with Engine.open(model="tiny") as engine:
        return engine.bench(data / "flickr8k", limit=200)


def test_flickr8k_figures_follow_from_the_exported_vectors(flickr, tmp_path):
    export_vectors(flickr, tmp_path)
    image, text = np.load(tmp_path / "image.npy"), np.load(tmp_path / "text.npy")
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    owner = np.array([row["image_row"] for row in rows])
    assert (len(image), len(text)) == (200, 1000)
    scores = (text @ image.T).astype(float)
    own = scores[np.arange(len(text)), owner][:, None]
    false = owner[:, None] != np.arange(len(image))[None, :]
    t2i = 1 + ((scores > own - 1e-6) & false).sum(1)
    best = np.where(false.T, -1, scores.T).max(1, keepdims=True)
    i2t = 1 + ((best - 1e-6 < scores.T) & false.T).sum(1)
    report = to_json(flickr)
    for name, ranks in (("t2i", t2i), ("i2t", i2t)):
        for k in (1, 5, 10):
            assert report[name][f"R@{k}"] == pytest.approx(100 * np.mean(ranks <= k), abs=1e-4)
            assert report[name]["index_loss"][f"R@{k}"] == 0


def test_tiny_has_learned_something(flickr):
    """Chance would be 5 percent at 10 of 200."""
    assert flickr.result.t2i.metrics.recall[10] > 75
    assert flickr.result.i2t.metrics.recall[10] > 75


def test_a_folder_of_photos_is_searched_by_words_and_by_example(data, tiny, tmp_path):
    with Engine.open(tmp_path / "index", model="tiny") as engine:
        report = engine.index([data / "photos"])
        assert (report.added, report.failed) == (100, 0)
        assert engine.index([data / "photos"]).unchanged == 100
        photo = sorted((data / "photos").glob("*.jpg"))[3]
        assert engine.search(image=photo, k=1)[0].path == photo
        dogs = engine.search("a dog running on the beach", k=1)[0]
        assert dogs.path.name == "1057251835_6ded4ada9c.jpg"
        mixed = Query((Term(text="a dog"), Term(image=photo, weight=0.2)), k=5)
        assert len(engine.search(mixed)) == 5


def test_the_hostile_files_end_in_the_index_or_fail(data, tiny, tmp_path):
    files = [p for p in (data / "ugly" / "files").rglob("*") if p.is_file()]
    assert len(files) == 383
    with Engine.open(tmp_path / "index", model="tiny") as engine:
        report = engine.index([data / "ugly" / "files"])
        failures = engine.errors()
        assert report.added + report.failed == 383
        assert engine.status().images == report.added > 300
        assert len(failures) == report.failed
        assert all(failure.reason for failure in failures)
        again = engine.index([data / "ugly" / "files"])
        assert (again.unchanged, again.known_bad) == (report.added, report.failed)


def test_a_moved_root_of_photos_is_not_decoded_again(data, tiny, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(data / "photos", photos)
    with Engine.open(tmp_path / "index", model="tiny") as engine:
        engine.index([tmp_path], exclude=["index"])
        photos.rename(tmp_path / "renamed")
        report = engine.index([tmp_path])
        assert (report.moved, report.added, report.removed) == (100, 0, 0)

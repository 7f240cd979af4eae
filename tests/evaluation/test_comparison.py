"""Fusions are compared on captions that the index does not hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fakes import DECODERS, FakeEncoder, FakePatchEncoder, run_plan, searcher_over
from PIL import Image

from mmsearch.errors import UsageError
from mmsearch.evaluation import comparison as measuring
from mmsearch.evaluation.ranking import NOT_FOUND, Difference, metrics_of
from mmsearch.ingest.plan import make_plan, scopes_of
from mmsearch.search.fusion import fuse
from mmsearch.search.rerank import Mix, Reranker
from mmsearch.search.searcher import Trained
from mmsearch.store.rows import CaptionRecord
from mmsearch.store.store import Store
from mmsearch.training.fusion import train_weights
from mmsearch.types import Query, Term

COUNT = 48


@pytest.fixture
def store(tmp_path):
    """Pictures of no colour that a caption names, with captions that share a rare word each."""
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    rng = np.random.default_rng(3)
    for number in range(COUNT):
        shade = tuple(int(v) for v in rng.integers(0, 255, 3))
        Image.new("RGB", (16, 16), shade).save(gallery / f"{number:02}.png")
        lines = [
            f"thing{number} of kind{number % 5}",
            f"a thing{number}",
            f"kind{number % 5} again",
        ]
        (gallery / f"{number:02}.txt").write_text("\n".join(lines if number else lines[:1]))
    store = Store.create(tmp_path / "index")
    with store.writer() as writer:
        plan = make_plan(store, scopes_of(store, writer, [gallery], None), prune=None)
        run_plan(store, writer, plan, FakeEncoder(), workers=2)
    yield store
    store.close()


def test_what_asks_is_not_in_the_index(store):
    before = store.contents()
    asked = measuring.hold_out(store, 1)
    after = store.contents()
    assert [one.text for one in asked] == [f"thing{n} of kind{n % 5}" for n in range(COUNT)]
    assert not {one.text for one in asked} & set(after.caption_texts)
    assert len(after.caption_texts) == len(before.caption_texts) - COUNT
    with store.catalog.read() as queries:
        texts = [text for (text,) in queries.cursor("SELECT sidecar FROM words")]
    assert not any(one.text in text for one in asked for text in texts)
    assert len(after.image_ids) == COUNT


def test_the_same_text_twice_on_an_image_does_not_stay(store):
    held = store.contents()
    with store.writer() as writer:
        space = writer.space_of(FakeEncoder().spec, "fp32")
        with writer.change() as change:
            for owner in held.image_ids.tolist():
                text = change.captions_of(owner)[0][1]
                vector = FakeEncoder().encode("text", [text])[0]
                change.add_captions(owner, [CaptionRecord(text, "file", vector)], space)
    asked = measuring.hold_out(store, 1)
    assert not {one.text for one in asked} & set(store.contents().caption_texts)


def test_only_a_share_of_the_images_keeps_its_captions(store):
    asked = measuring.hold_out(store, 1, captioned=0.25)
    assert len(asked) == COUNT
    kept = set(store.contents().caption_media.tolist())
    assert all(one.is_bare == (one.media not in kept) for one in asked)
    rows = measuring.compare(searcher_over(store, FakeEncoder()), asked, [("words", 0)])
    assert rows[0].bare == {1: 0, 5: 0, 10: 0}  # words find no image without captions
    assert 0.2 < len(set(store.contents().caption_media.tolist())) / COUNT <= 0.25


def test_an_index_without_captions_cannot_be_measured(store):
    measuring.hold_out(store, 9)
    with pytest.raises(UsageError, match="no image here has a caption"):
        measuring.hold_out(store, 1)


def test_the_figures_are_those_of_ranking_everything(store):
    asked = measuring.hold_out(store, 1)
    searcher = searcher_over(store, FakeEncoder())
    rows = measuring.compare(searcher, asked, [(how, 0) for how in ("image", "words", "sum")])
    held = store.contents()
    queries = FakeEncoder().encode("text", [one.text for one in asked])
    scores = queries @ held.image_vectors.T
    true = np.array([one.media for one in asked])[:, None] == held.image_ids[None, :]
    own = np.where(true, scores, -np.inf).max(axis=1, keepdims=True)
    ranks = 1 + ((scores > own - 1e-6) & ~true).sum(axis=1)
    image, words, both = rows
    for k in (1, 5, 10):
        assert image.metrics.recall[k] == pytest.approx(100 * np.mean(ranks <= k))
    # A word of its own leads to every image but the one whose other captions are gone.
    assert words.metrics.recall[1] == pytest.approx(100 * (COUNT - 1) / COUNT)
    assert image.metrics.median_rank == np.median(ranks)  # also what plain `bench` gives
    assert image.metrics.mrr == pytest.approx(np.mean(1 / ranks))
    assert image.gains is None
    assert words.gains[1].mean == pytest.approx(words.metrics.recall[1] - image.metrics.recall[1])
    assert both.metrics.recall[10] > image.metrics.recall[10]


def test_a_rank_beyond_what_a_search_follows_is_not_found(store):
    """An image that its caption brought up has a rank by its picture, but among too few others."""
    evidence = searcher_over(store, FakeEncoder()).candidates(Query(Term(text="thing3")))
    scores = fuse(evidence, "image", None)
    order = np.argsort(-scores)
    for place in (0, 6, 7, 30):
        media = int(evidence.media[order[place]])
        expected = place + 1 if place < 7 else NOT_FOUND
        assert measuring.rank_in(evidence, scores, media, depth=7) == expected
    assert measuring.rank_in(evidence, scores, 10**6) == NOT_FOUND


def test_a_median_that_is_not_known_is_not_a_number():
    ranks = np.array([1, NOT_FOUND, NOT_FOUND])
    metrics = metrics_of(ranks, np.arange(3))
    assert metrics.median_rank == np.inf
    assert metrics.mrr == pytest.approx(1 / 3)
    row = measuring.Compared("image", 0, metrics, None, None)
    report = measuring.FusionReport("x", "", "fake", 9, 9, (row,))
    assert "> 200" in measuring.to_text(report)
    figures = measuring.to_json(report)["rows"][0]
    assert (figures["median_rank"], figures["MRR@200"]) == (None, 0.333333)


def test_a_report_says_whether_a_difference_is_real(store):
    asked = measuring.hold_out(store, 1)
    searcher = searcher_over(store, FakeEncoder())
    rows = measuring.compare(searcher, asked, [("image", 0), ("words", 0)])
    report = measuring.FusionReport("toys", "", "fake", COUNT, 9, rows)
    text = measuring.to_text(report)
    assert text.splitlines()[1].split()[:2] == ["setting", "R@1"]
    assert text.splitlines()[3].endswith("better")
    assert measuring.to_json(report)["rows"][1]["R@1_gain"][0] > 0
    assert measuring.verdict(Difference(1, -1, 2)) == "no real difference"
    assert measuring.verdict(Difference(-1, -2, -0.5)) == "worse"


def corners(tokens, patches, vectors, captions):
    """Tells pictures apart by their first patch; of all of them captions know as much."""
    del captions
    return (patches[:, 0] @ tokens.sum(axis=0)).astype(np.float32), np.zeros(len(vectors))


def test_settings_that_rank_again_are_compared_with_those_that_do_not(store):
    asked = measuring.hold_out(store, 0)
    assert len(asked) == 3 * COUNT - 2
    assert store.status().captions == 0
    reranker = Reranker(corners, np.eye(16, dtype=np.float32), Mix(0.5, 0.5))
    local = FakePatchEncoder()
    learned = Trained(reranker=lambda: reranker)
    searcher = searcher_over(store, FakeEncoder(), learned, lambda: local, lambda: DECODERS)
    plain, again = measuring.compare(searcher, asked, [("image", 0), ("image", 7)])
    assert (plain.name, again.name) == ("image", "image, rerank 7")
    assert plain.bare is None  # all of them are
    ranks = []
    for one in asked:
        query = Query((Term(text=one.text),), k=COUNT, fusion="image")
        first = [hit.media_id for hit in searcher.search(query)]
        best = [h.media_id for h in searcher.search(replace(query, k=7, rerank=7))]
        ranks.append(1 + [*best, *first[7:]].index(one.media))
    for k in (1, 5, 10):
        expected = 100 * np.mean(np.array(ranks) <= k)
        assert again.metrics.recall[k] == pytest.approx(expected, abs=100 / len(asked))
    assert again.metrics.recall[10] == pytest.approx(plain.metrics.recall[10], abs=1.5)
    report = measuring.FusionReport("toys", "", "fake", COUNT, 0, (plain, again))
    assert "image, rerank 7" in measuring.to_text(report)
    assert measuring.to_json(report)["rows"][1]["rerank"] == 7
    with pytest.raises(UsageError, match="--fusion words does not"):
        measuring.compare(searcher, asked, [("words", 7)])


def test_weights_are_learned_for_what_tells_images_apart(store):
    """Here the words: the pictures' colours tell nothing of their captions."""
    asked = measuring.hold_out(store, 1)
    searcher = searcher_over(store, FakeEncoder())
    evidences = [found for _, _, found in measuring.candidates_of(searcher, asked)]
    found = train_weights(evidences, asked)
    assert found.weights.words > 0.5
    assert sum(vars(found.weights).values()) == pytest.approx(1)
    assert found.trained_on + found.measured_on == COUNT
    assert train_weights(evidences, asked).weights == found.weights
    ranks = [
        measuring.rank_in(one, fuse(one, "trained", found.weights), held.media)
        for one, held in zip(evidences, asked, strict=True)
    ]
    assert np.mean(np.array(ranks) == 1) > 0.9


def test_too_few_captions_teach_nothing(store):
    asked = measuring.hold_out(store, 1)[:8]
    found = measuring.candidates_of(searcher_over(store, FakeEncoder()), asked)
    evidences = [evidence for _, _, evidence in found]
    with pytest.raises(UsageError, match="at least 10 are needed"):
        train_weights(evidences, asked)

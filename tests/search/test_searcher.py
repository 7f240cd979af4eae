"""Queries of one term and of several."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import DECODERS, run_plan, searcher_over

from mmsearch.errors import UsageError
from mmsearch.ingest.plan import make_plan, scopes_of
from mmsearch.search.fusion import Weights
from mmsearch.search.page import Section, Tile, render_page, tiles_of
from mmsearch.search.searcher import Trained
from mmsearch.store.store import Store
from mmsearch.types import Filter, Query, Term


@pytest.fixture
def store(tmp_path, photos, encoder):
    store = Store.create(tmp_path / "index")
    (photos / "red.txt").write_text("it is red\n")
    (photos / "green.txt").write_text("it is green\n")
    with store.writer() as writer:
        plan = make_plan(store, scopes_of(store, writer, [photos], None), prune=None)
        run_plan(store, writer, plan, encoder, workers=2)
    yield store
    store.close()


@pytest.fixture
def searcher(store, encoder):
    return searcher_over(store, encoder, decoders=lambda: DECODERS)


def names(hits):
    return [hit.path.name for hit in hits]


def test_hits_are_ranked_from_one_by_falling_cosine(searcher, encoder, photos):
    hits = searcher.search(Query((Term(text="red"),), k=6, fusion="image"))
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits[0].path == photos / "red.png"
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    assert (hits[0].modality, hits[0].caption) == ("image", None)


def test_captions_help_to_find_their_images(searcher, photos):
    """What was fused is shown: here the image and its caption are what is asked for."""
    hits = searcher.search(Query((Term(text="red"),), k=6, fusion="sum"))
    assert len(hits) == 6
    assert hits[0].path == photos / "red.png"
    assert hits[0].scores.keys() == {"image", "caption", "words"}
    assert hits[0].scores["caption"] == pytest.approx(1, abs=1e-3)
    bare = next(hit for hit in hits if hit.path.name not in ("red.png", "green.png"))
    assert bare.scores.keys() == {"image"}
    only = searcher.search(Query((Term(text="it is red"),), k=6, fusion="words"))
    assert names(only)[0] == "red.png"
    assert [hit.rank for hit in only] == list(range(1, len(only) + 1))


def test_what_auto_comes_to(searcher, store, encoder, photos):
    text, picture = Term(text="red"), Term(image=photos / "red.png")
    assert searcher.fusion_of(Query((text,))) == "image"  # two captions give no scale
    searcher = searcher_over(store, encoder, least_captions=2)
    assert searcher.fusion_of(Query((text,))) == "sum"
    assert searcher.fusion_of(Query((text, picture))) == "image"
    assert searcher.fusion_of(Query((text,), to="caption")) == "image"
    assert searcher.fusion_of(Query((text,), min_score=0.2)) == "image"
    assert searcher.fusion_of(Query((Term(text="red", weight=-1),))) == "image"
    weights = Weights(0.2, 0.3, 0.5)
    learned = searcher_over(store, encoder, Trained(weights=lambda: weights), least_captions=2)
    assert learned.fusion_of(Query((text,))) == "trained"
    learned.search(Query((text,), fusion="trained"))


def test_more_are_gathered_where_more_are_asked_for(store, encoder):
    searcher = searcher_over(store, encoder, depth=1)
    assert len(searcher.search(Query((Term(text="red"),), k=6, fusion="sum"))) == 6


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query((Term(text="red"),), to="caption", fusion="sum"), "--to image"),
        (Query((Term(text="red"),), min_score=0.1, fusion="rrf"), "a least score is a cosine"),
        (Query((Term(text="red", weight=-1),), fusion="words"), "needs a text"),
        (Query((Term(text="red"),), fusion="trained"), "train fusion"),
    ],
)
def test_a_fusion_that_does_not_go_with_the_query_is_refused(searcher, query, message):
    with pytest.raises(UsageError, match=message):
        searcher.search(query)


def test_an_image_finds_itself_and_captions(searcher, photos):
    term = (Term(image=photos / "green.png"),)
    assert names(searcher.search(Query(term, k=1))) == ["green.png"]
    (hit,) = searcher.search(Query(term, to="caption", k=1))
    assert (hit.caption, hit.path.name, hit.modality) == ("it is green", "green.png", "caption")


def test_a_text_finds_captions(searcher):
    assert searcher.search(Query((Term(text="red"),), to="caption", k=5))[0].caption == "it is red"


def test_terms_add_up_by_their_weights(searcher, encoder):
    red, blue = encoder.encode("text", ["red", "blue"])
    vector = searcher.embed([Term(text="red", weight=2), Term(text="blue", weight=-0.5)])
    expected = 2 * red - 0.5 * blue
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)


def test_text_and_image_terms_mix(searcher, encoder, photos):
    vector = searcher.embed([Term(image=photos / "green.png"), Term(text="red"), Term(text="blue")])
    expected = encoder.encode("text", ["green", "red", "blue"]).sum(axis=0)
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-2)


def test_terms_that_cancel_out_are_refused(searcher):
    with pytest.raises(UsageError, match="cancel"):
        searcher.search(Query((Term(text="red"), Term(text="red", weight=-1))))


def test_a_least_score_cuts_the_list(searcher):
    hits = searcher.search(Query((Term(text="red"),), k=6, min_score=0.99))
    assert names(hits) == ["red.png"]


def test_a_filter_holds_for_images_and_captions(searcher, photos):
    inner = Filter(under=photos / "more")
    hits = searcher.search(Query((Term(text="red"),), k=6, filter=inner))
    assert sorted(names(hits)) == ["black.webp", "white.png"]
    assert searcher.search(Query((Term(text="red"),), to="caption", filter=inner)) == []


def test_an_example_that_is_no_image_is_explained(searcher, tmp_path):
    with pytest.raises(UsageError, match="no such image file"):
        searcher.search(Query((Term(image=tmp_path / "nowhere.png"),)))
    (tmp_path / "bad.png").write_bytes(b"no")
    with pytest.raises(UsageError, match=r"bad\.png"):
        searcher.search(Query((Term(image=tmp_path / "bad.png"),)))


def test_a_page_escapes_whatever_comes_from_outside(searcher, photos):
    hits = searcher.search(Query((Term(text="red"),), k=2))
    evil = Tile(photos / "gone<script>.png", "<b>", '"><script>alert(1)</script>')
    page = render_page("<t>", [Section("<q>", [*tiles_of(hits), evil], "<n>")], intro="<i>")
    assert "<script" not in page
    assert "&lt;q&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert "no picture" in page

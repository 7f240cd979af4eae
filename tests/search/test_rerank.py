"""Re-ranking: OpenVINO against torch, the parts by hand, the file, and searches with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import (
    DECODERS,
    DIM,
    FakeEncoder,
    FakePatchEncoder,
    paint,
    run_plan,
    searcher_over,
    unit_vectors,
)

from mmsearch.encoders.openvino import Graph
from mmsearch.encoders.patch_encoder import PatchEmbeddings
from mmsearch.errors import DamageError, UsageError
from mmsearch.ingest.patches import add_patches
from mmsearch.ingest.plan import make_plan, scopes_of
from mmsearch.jobs.runner import Runner
from mmsearch.networks.matching import CrossAttention, LateInteraction
from mmsearch.search import rerank
from mmsearch.search.rerank import FILE_NAME, Mix, Reranker, read_reranker
from mmsearch.search.searcher import Trained
from mmsearch.store.store import Store
from mmsearch.training.rerank import export_scoring
from mmsearch.types import Filter, Query, Term

RNG = np.random.default_rng(8)
HEADS = 2
KINDS = pytest.mark.parametrize("kind", ["interaction", "attention"])


def made(kind):
    torch.manual_seed(1)
    attention = kind == "attention"
    network = CrossAttention(DIM, 12, HEADS, 2) if attention else LateInteraction(DIM, 12)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return network.eval()


@KINDS
def test_openvino_computes_what_torch_computes(kind):
    network = made(kind)
    exported = export_scoring(network, DIM)
    scoring = Graph.of_network(exported.graph, exported.weights)
    captions = unit_vectors(RNG, 7)
    for length, count in ((1, 1), (7, 5)):
        tokens, vectors = unit_vectors(RNG, length), unit_vectors(RNG, count)
        patches = unit_vectors(RNG, count * 6).reshape(count, 6, DIM)
        with torch.inference_mode():
            expected = network(
                torch.from_numpy(tokens)[None],
                torch.ones(1, length, dtype=torch.bool),
                torch.from_numpy(patches),
            )[0].numpy()
        match, hubness = scoring(tokens, patches, vectors, captions)
        assert match.dtype == np.float32
        np.testing.assert_allclose(match, expected, atol=2e-5)
        np.testing.assert_allclose(hubness, hubness_by_hand(vectors, captions), atol=1e-6)


def hubness_by_hand(vectors, captions):
    return [np.log(np.mean([np.exp(20 * (v @ caption)) for caption in captions])) / 20
            for v in vectors]  # fmt: skip


def brightness(tokens, patches, vectors, captions):
    """Scores that can be followed by hand: the sum of the first patch and of the tokens."""
    match = patches[:, 0].sum(axis=1) + tokens.sum()
    return match.astype(np.float32), np.array(hubness_by_hand(vectors, captions), np.float32)


def test_the_parts_are_what_they_are_called():
    captions, own, vectors = (unit_vectors(RNG, count) for count in (7, 3, 3))
    query, patches = unit_vectors(RNG, 1)[0], unit_vectors(RNG, 6).reshape(3, 2, DIM)
    texts = [(1.0, unit_vectors(RNG, 2)), (3.0, unit_vectors(RNG, 4))]
    found = Reranker(brightness, captions, Mix(0, 0)).parts(
        query, texts, own, PatchEmbeddings(vectors, patches)
    )
    for row in range(3):
        seen = own[row] + vectors[row]
        seen = seen / np.sqrt((seen**2).sum())
        assert found.cosine[row] == pytest.approx(seen @ query, abs=1e-6)
        (hubness,) = hubness_by_hand([seen], captions)
        assert found.hubness[row] == pytest.approx(hubness, abs=1e-6)
        both = [patches[row, 0].sum() + rows.sum() for _, rows in texts]
        assert found.match[row] == pytest.approx(0.25 * both[0] + 0.75 * both[1], abs=1e-5)
    mixed = Mix(0.5, 0.1).of(found)
    np.testing.assert_allclose(mixed, found.cosine - 0.5 * found.hubness + 0.1 * found.match)


def test_hubness_counts_for_queries_like_the_captions():
    captions = unit_vectors(RNG, 6)
    query = unit_vectors(RNG, 1)
    cosines = sorted((captions @ query[0]).tolist())
    near = (cosines[-1] + cosines[-2]) / 2
    assert rerank.nearness(query, captions, 2)[0] == pytest.approx(near, abs=1e-6)
    looks = PatchEmbeddings(unit_vectors(RNG, 3), unit_vectors(RNG, 6).reshape(3, 2, DIM))

    def hubness(familiar):
        made = Reranker(brightness, captions, Mix(1, 0), familiar, nearest=2)
        return made.parts(query[0], [(1.0, query)], looks.vectors, looks).hubness

    whole = hubness((near - 0.2, near - 0.1))
    assert abs(whole).min() > 0
    np.testing.assert_allclose(hubness((near - 0.1, near + 0.1)), 0.5 * whole, atol=1e-5)
    assert (hubness((near + 0.1, near + 0.2)) == 0).all()
    np.testing.assert_allclose(hubness((-1.0, -1.0)), whole)


def test_new_scores_stand_where_the_cosines_stood():
    reranker = Reranker(brightness, unit_vectors(RNG, 7), Mix(1.0, 5.0))
    looks = PatchEmbeddings(unit_vectors(RNG, 3), unit_vectors(RNG, 6).reshape(3, 2, DIM))
    own = unit_vectors(RNG, 3)
    parts = reranker.parts(own[0], [(1.0, unit_vectors(RNG, 2))], own, looks)
    cosines = np.array([0.1, 0.2, 0.4], np.float32)
    scores = reranker.rescored(cosines, parts)
    assert scores.mean() == pytest.approx(cosines.mean(), abs=1e-6)
    np.testing.assert_allclose(np.diff(scores), np.diff(reranker.mix.of(parts)), atol=1e-5)


# -- the file -----------------------------------------------------------------------------------


def write(folder, kind="interaction", space="a"):
    captions, exported = unit_vectors(RNG, 9), export_scoring(made(kind), DIM)
    reranker = Reranker(brightness, captions, Mix(0.75, 1 / 60), (0.5, 0.6))
    rerank.write_reranker(folder, exported, reranker, space)
    return captions


@KINDS
def test_a_reranker_is_kept_for_its_space_alone(tmp_path, kind):
    assert read_reranker(tmp_path, "a") is None
    captions = write(tmp_path, kind)
    assert read_reranker(tmp_path, "b") is None
    found = read_reranker(tmp_path, "a")
    assert found is read_reranker(tmp_path, "a")  # read once
    assert (found.mix, found.dim, found.familiar) == (Mix(0.75, 1 / 60), DIM, (0.5, 0.6))
    np.testing.assert_allclose(found.captions, captions, atol=1e-3)
    tokens, patches = unit_vectors(RNG, 3), unit_vectors(RNG, 8).reshape(2, 4, DIM)
    exported = export_scoring(made(kind), DIM)
    inputs = tokens, patches, patches[:, 0], captions
    expected = Graph.of_network(exported.graph, exported.weights)(*inputs)
    np.testing.assert_array_equal(found.network(*inputs), expected)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_damaged_file_is_one_clear_line(tmp_path, keep):
    write(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="delete it, or train it again"):
        read_reranker(tmp_path, "a")


# -- searches -----------------------------------------------------------------------------------

COUNT = 24


@pytest.fixture
def folder(tmp_path):
    shades = np.random.default_rng(6).integers(0, 255, (COUNT, 3))
    for number, shade in enumerate(shades):
        paint(tmp_path / "p" / f"{number:02}.png", tuple(int(v) for v in shade), mark=number + 1)
        (tmp_path / "p" / f"{number:02}.txt").write_text(f"thing{number} in red\nkind{number % 3}")
    return tmp_path / "p"


@pytest.fixture
def store(tmp_path, folder):
    store = Store.create(tmp_path / "index")
    with store.writer() as writer:
        plan = make_plan(store, scopes_of(store, writer, [folder], None), prune=None)
        run_plan(store, writer, plan, FakeEncoder(), workers=2)
    yield store
    store.close()


def searcher_of(store, local, mix=Mix(0.5, 0.3)):  # noqa: B008 - it is frozen
    reranker = Reranker(brightness, unit_vectors(np.random.default_rng(1), 30), mix)
    return searcher_over(
        store, FakeEncoder(), Trained(reranker=lambda: reranker), lambda: local, lambda: DECODERS
    )


def keep_looks(store, local):
    with store.writer() as writer:
        return add_patches(store, writer, local, store.active_space(), Runner(DECODERS, 2))


RED = Query((Term(text="red"),), k=3)


def ask(searcher, query=RED, **changes):
    return searcher.search(replace(query, **changes))


def test_the_first_are_ranked_by_the_mix_and_only_they(store):
    local = FakePatchEncoder()
    searcher = searcher_of(store, local)
    keep_looks(store, local)
    plain = ask(searcher, k=COUNT, fusion="image")
    found = ask(searcher, k=3, rerank=8, fusion="image")
    vector = searcher.embed(RED.terms)
    answer = searcher.rank(vector[None], "image", 8)[0]
    seen, parts = searcher.patch_scorer(RED).parts(vector, RED.terms, answer.items)
    assert seen.tolist() == list(range(8))
    scores = Mix(0.5, 0.3).of(parts)
    best = np.argsort(-scores)[:3]
    assert [hit.media_id for hit in found] == [answer.ids[row] for row in best]
    assert {hit.media_id for hit in found} <= {hit.media_id for hit in plain[:8]}
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    cosines = {hit.media_id: hit.score for hit in plain}
    assert all(hit.scores["image"] == pytest.approx(cosines[hit.media_id]) for hit in found)
    assert [hit.media_id for hit in found] != [hit.media_id for hit in plain[:3]]


def test_all_that_is_shown_is_looked_at(store):
    searcher = searcher_of(store, FakePatchEncoder())
    few = ask(searcher, k=9, rerank=2, fusion="image")
    assert few == ask(searcher, k=9, rerank=9, fusion="image")


def test_looks_that_are_not_kept_are_taken_now(store):
    local = FakePatchEncoder()
    searcher = searcher_of(store, local)
    before = ask(searcher, rerank=8, fusion="image")
    assert local.looked == 8
    assert keep_looks(store, local) == COUNT
    searcher = searcher_of(store, local)
    assert ask(searcher, rerank=8, fusion="image") == before
    assert local.looked == 8 + COUNT
    assert keep_looks(store, local) == 0


def test_many_are_looked_at_in_portions(store):
    searcher = searcher_of(store, FakePatchEncoder())
    vector = searcher.embed(RED.terms)
    answer = searcher.rank(vector[None], "image", 11)[0]
    scorer = searcher.patch_scorer(RED)
    whole, parts = (
        one.scores(vector, RED.terms, answer.items, np.array(answer.scores))
        for one in (scorer, replace(scorer, block=4))
    )
    assert not np.allclose(whole, answer.scores)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    hits = ask(searcher, rerank=11, fusion="image")
    assert [hit.score for hit in hits] == pytest.approx(sorted(parts, reverse=True)[:3], abs=1e-6)


def test_patches_that_cannot_be_read_are_told(store):
    keep_looks(store, FakePatchEncoder())
    with store.catalog.write() as connection:
        connection.exec_driver_sql(
            "UPDATE patch_embedding SET content = x'0102' WHERE media_id = 3"
        )
    with pytest.raises(DamageError, match="drop them with 'mmsearch index --no-patches'"):
        ask(searcher_of(store, FakePatchEncoder()), rerank=COUNT, fusion="image")


def test_files_that_are_gone_keep_their_cosine(store, folder):
    searcher = searcher_of(store, FakePatchEncoder())
    plain = ask(searcher, k=8, fusion="image")
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    gone = ask(searcher, k=8, rerank=8, fusion="image")
    assert [(hit.path, hit.score) for hit in gone] == [(hit.path, hit.score) for hit in plain]


def test_a_changed_file_is_left_to_the_next_run(store, folder):
    for path in folder.glob("0*.png"):
        paint(path, "white")
    assert keep_looks(store, FakePatchEncoder()) == COUNT - 10


def test_a_fusion_takes_the_new_scores_for_the_image(store):
    local = FakePatchEncoder()
    searcher = searcher_of(store, local)
    keep_looks(store, local)
    plain, found = (ask(searcher, k=COUNT, fusion="sum", rerank=n) for n in (0, 8))
    assert {hit.media_id for hit in found} == {hit.media_id for hit in plain}
    assert all(hit.scores["rerank"] is not None for hit in found)
    first = ask(searcher, fusion="sum", rerank=8)
    assert {hit.media_id for hit in first} <= {hit.media_id for hit in plain[:8]}
    by_media = {hit.media_id: hit for hit in plain}
    assert all(hit.scores["image"] == by_media[hit.media_id].scores["image"] for hit in first)
    assert any(hit.scores["rerank"] != hit.scores["image"] for hit in first)
    vector = searcher.embed(RED.terms)
    evidence = searcher.candidates(RED, vector)
    scores, image = searcher.scores(replace(RED, rerank=8), vector, evidence, "sum")
    order = np.argsort(-scores)
    assert evidence.media[order[:3]].tolist() == [hit.media_id for hit in first]
    # What lies beyond the first eight stays beyond, in its order.
    assert evidence.media[order[8:]].tolist() == [hit.media_id for hit in plain[8:]]
    assert (image[order[8:]] == evidence.image[order[8:]]).all()


def test_filters_and_least_scores_come_first(store, folder):
    searcher = searcher_of(store, FakePatchEncoder())
    chosen = folder / "03.png"
    (only,) = ask(searcher, rerank=9, fusion="image", filter=Filter(under=chosen))
    assert only.path == chosen
    plain = ask(searcher, k=COUNT, fusion="image")
    least = plain[4].score
    found = ask(searcher, k=COUNT, rerank=9, min_score=least)
    assert {hit.media_id for hit in found} == {hit.media_id for hit in plain[:5]}
    assert ask(searcher, rerank=9, min_score=2.0) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rerank": -1}, "whole number"),
        ({"to": "caption"}, "texts that look for images"),
        ({"fusion": "words"}, "--fusion words does not"),
        ({"fusion": "caption"}, "--fusion caption does not"),
    ],
)
def test_what_cannot_be_ranked_again_is_refused(store, changes, message):
    with pytest.raises(UsageError, match=message):
        ask(searcher_of(store, FakePatchEncoder()), **{"rerank": 5, **changes})


def test_pictures_do_not_ask_for_a_second_look(store, folder):
    searcher = searcher_of(store, FakePatchEncoder())
    for terms in ((Term(image=folder / "01.png"),), (Term(text="red", weight=-1), *RED.terms[:0])):
        with pytest.raises(UsageError, match="texts that look for images"):
            searcher.search(Query(terms, rerank=5, fusion="image"))


def test_nothing_learned_or_for_another_width_is_told(store):
    with pytest.raises(UsageError, match="train rerank"):
        searcher_over(store, FakeEncoder()).search(Query(RED.terms, rerank=5))
    narrow = Reranker(brightness, np.ones((3, 5), np.float32), Mix(0, 0))
    with pytest.raises(UsageError, match="takes vectors of 5 dimensions"):
        searcher_over(store, FakeEncoder(), Trained(reranker=lambda: narrow)).search(
            Query(RED.terms, rerank=5)
        )


def test_several_texts_match_by_their_weights_and_what_is_not_wanted_does_not(store):
    searcher = searcher_of(store, FakePatchEncoder())
    items = searcher.rank(searcher.embed(RED.terms)[None], "image", 5)[0].items
    vector = searcher.embed(RED.terms)

    def match(*terms):
        return searcher.patch_scorer(RED).parts(vector, terms, items)[1].match

    red, blue = match(Term(text="red")), match(Term(text="blue"))
    both = match(Term(text="red", weight=3.0), Term(text="blue"), Term(text="green", weight=-2))
    np.testing.assert_allclose(both, 0.75 * red + 0.25 * blue, atol=1e-5)


def test_what_comes_with_tiny_is_for_tiny(tiny, tmp_path):
    found = read_reranker(tmp_path, tiny.spec.space)
    assert found.dim == tiny.spec.dim
    assert found.mix.match > 0

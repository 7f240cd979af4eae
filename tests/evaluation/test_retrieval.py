"""The benchmark: both directions, ties, losses, and files that other tools read alike."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import ir_measures
import numpy as np
import pytest
from fakes import unit_vectors
from ir_measures import Success

from mmsearch.errors import UsageError
from mmsearch.evaluation.retrieval import (
    BenchReport,
    Corpus,
    evaluate,
    export_vectors,
    to_html,
    to_json,
    to_text,
    write_runs,
)


def corpus(images=40, per_image=3, seed=0, spread=0.8):
    rng = np.random.default_rng(seed)
    vectors = unit_vectors(rng, images)
    owner = np.repeat(np.arange(images), per_image)
    captions = vectors[owner] + spread * unit_vectors(rng, len(owner))
    captions /= np.linalg.norm(captions, axis=1, keepdims=True)
    return Corpus(
        image_ids=rng.permutation(1000)[:images].astype(np.int64),
        images=vectors,
        image_names=tuple(f"/p/{i}.jpg" for i in range(images)),
        caption_ids=rng.permutation(9000)[: len(owner)].astype(np.int64),
        captions=captions.astype(np.float32),
        texts=tuple(f"caption {i}" for i in range(len(owner))),
        owner=owner,
    )


def exact(held):
    def rank(queries, to, k):
        gallery, ids = (
            (held.images, held.image_ids) if to == "image" else (held.captions, held.caption_ids)
        )
        order = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")[:, :k]
        return [ids[row] for row in order]

    return rank


def report_of(held, rank=None):
    return BenchReport("set", "test", "fake", "fp32", held, evaluate(held, rank or exact(held)))


def test_both_directions_agree_with_a_few_lines_of_numpy():
    held = corpus()
    result = evaluate(held, exact(held))
    scores = held.captions.astype(float) @ held.images.T.astype(float)
    own = scores[np.arange(len(scores)), held.owner]
    t2i = 1 + (scores > own[:, None] + 1e-9).sum(1)
    for k in (1, 5, 10):
        assert result.t2i.metrics.recall[k] == pytest.approx(100 * np.mean(t2i <= k))
    i2t = []
    for image, row in enumerate(scores.T):
        order = np.argsort(-row)
        i2t.append(1 + np.flatnonzero(held.owner[order] == image)[0])
    for k in (1, 5, 10):
        assert result.i2t.metrics.recall[k] == pytest.approx(100 * np.mean(np.array(i2t) <= k))


def test_an_exact_index_loses_nothing_and_a_poor_one_is_found_out():
    held = corpus()
    result = evaluate(held, exact(held))
    assert set(result.t2i.loss.values()) == set(result.i2t.loss.values()) == {0.0}

    def half_blind(queries, to, k):
        return [ids[ids % 2 == 0] for ids in exact(held)(queries, to, k)]

    poor = evaluate(held, half_blind)
    assert poor.t2i.metrics.recall == result.t2i.metrics.recall
    assert poor.t2i.loss[10] > 20


def test_images_without_captions_ask_nothing_but_are_in_the_way():
    held = corpus(images=4, per_image=1, spread=0)
    lonely = Corpus(
        held.image_ids, held.images, held.image_names, held.caption_ids[:2],
        held.captions[:2], held.texts[:2], held.owner[:2],
    )  # fmt: skip
    result = evaluate(lonely, exact(lonely))
    assert (result.t2i.metrics.queries, result.i2t.metrics.queries) == (2, 2)


def named():
    """Twelve images of three names; the vector of a name lies nearest to its own four images,
    but for image 0, which looks like the second name."""
    names = unit_vectors(np.random.default_rng(1), 3)
    which = np.repeat(np.arange(3), 4)
    images = names[[1, *which[1:]]]
    return Corpus(
        image_ids=np.arange(12), images=images,
        image_names=tuple(f"/p/{i}.jpg" for i in range(12)), caption_ids=np.arange(12),
        captions=names[which], texts=tuple(("cat", "dog", "cow")[i] for i in which),
        owner=np.arange(12),
    )  # fmt: skip


def test_equal_captions_are_one_answer_beside_the_papers_figure():
    held = named()
    assert held.repeated == 12
    result = evaluate(held, exact(held))
    # By the papers, the same name of another image is a wrong answer that scores as much.
    assert result.i2t.metrics.recall[1] == 0
    assert result.t2i.metrics.recall[1] == 0
    # As one answer: 11 of 12 images find their name first, image 0 finds it second or third.
    assert result.i2t.one_answer.recall[1] == pytest.approx(100 * 11 / 12)
    assert result.i2t.one_answer.recall[5] == 100
    # "cat" finds images 1 to 3 first, and each is true; so do the other names, but that "dog" is
    # met by image 0, which scores as much as its own: a tie, which counts against.
    assert result.t2i.one_answer.recall[1] == pytest.approx(100 * 8 / 12)
    assert result.t2i.one_answer.recall[5] == 100
    report = report_of(held)
    text = to_text(report)
    assert text.count("equal captions as one") == 2
    assert "12 of 12 captions are also those of another image" in text
    document = to_json(report)
    assert document["repeated_captions"] == 12
    assert document["i2t"]["equal_captions_one_answer"]["R@1"] == pytest.approx(91.6667)


def test_captions_of_their_own_have_one_figure():
    held = corpus()
    twice = replace(held, texts=("again", "again", *held.texts[2:]))  # both of image 0
    for one in (held, twice):
        report = report_of(one)
        assert one.repeated == 0
        assert [direction.one_answer for direction in report.result] == [None, None]
        assert "equal captions" not in to_text(report)


def test_no_captions_no_benchmark():
    held = corpus(per_image=0)
    with pytest.raises(UsageError, match="nothing to measure"):
        evaluate(held, exact(held))


def tied():
    """Two images that look the same, and captions that fit both alike."""
    held = corpus(images=6, per_image=2, spread=0.3)
    held.images[1] = held.images[0]
    return held


@pytest.mark.slow
@pytest.mark.parametrize("held", [corpus(), tied(), corpus(images=150, spread=1.5)])
def test_other_tools_find_the_same_figures_in_our_files(held, tmp_path):
    report = report_of(held)
    write_runs(report, tmp_path)
    from ranx import Qrels, Run
    from ranx import evaluate as ranx_evaluate

    for direction in report.result:
        qrels, run = (str(tmp_path / f"{direction.name}.{end}") for end in ("qrels", "run"))
        theirs = ir_measures.calc_aggregate(
            [Success @ 1, Success @ 5, Success @ 10],
            ir_measures.read_trec_qrels(qrels), ir_measures.read_trec_run(run),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numba's remarks on ranx's casts
            also = ranx_evaluate(
                Qrels.from_file(qrels, kind="trec"), Run.from_file(run, kind="trec"),
                ["hit_rate@1", "hit_rate@5", "hit_rate@10"],
            )  # fmt: skip
        for k in (1, 5, 10):
            ours = direction.metrics.recall[k] / 100
            assert theirs[Success @ k] == pytest.approx(ours)
            assert also[f"hit_rate@{k}"] == pytest.approx(ours)


def test_run_files_have_six_fields_and_falling_scores(tmp_path):
    write_runs(report_of(tied()), tmp_path)
    last = {}
    for line in (tmp_path / "t2i.run").read_text().splitlines():
        query, _, _, _, score, _ = line.split(" ")
        assert float(score) < last.get(query, np.inf)
        last[query] = float(score)


def test_the_exported_vectors_are_those_that_were_compared(tmp_path):
    held = corpus()
    export_vectors(report_of(held), tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "image.npy"), held.images)
    np.testing.assert_array_equal(np.load(tmp_path / "text.npy"), held.captions)
    captions, images = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("captions", "images")
    )
    assert [row["image_row"] for row in captions] == held.owner.tolist()
    assert all(images[row["image_row"]]["id"] == row["image_id"] for row in captions)
    assert [row["path"] for row in images] == list(held.image_names)


def test_json_has_the_promised_keys():
    document = to_json(report_of(corpus()))
    assert {"dataset", "split", "model", "images", "captions", "t2i", "i2t"} <= set(document)
    for direction in ("t2i", "i2t"):
        wanted = {"R@1", "R@5", "R@10", "median_rank", "MRR", "queries", "index_loss"}
        assert wanted <= set(document[direction])
    json.dumps(document)


def test_the_report_says_which_recall_it_means():
    text = to_text(report_of(corpus()))
    assert "Success@k" in text
    assert "text -> image" in text


def test_the_page_shows_hits_and_misses(tmp_path, picture):
    held = corpus(images=30, spread=1.5)
    paths = {}
    for row in range(30):
        paths[row] = tmp_path / f"{row}.png"
        picture(colour=(row * 8, 0, 0)).save(paths[row])
    page = to_html(report_of(held), paths)
    assert page.count("<section>") == 16
    assert "found first: rank 1 of 30" in page

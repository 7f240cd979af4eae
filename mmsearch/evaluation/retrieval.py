"""Retrieval both ways on an index whose images have captions, and what came of it.

As a table, as JSON, as a page and as files for other tools.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import UsageError
from mmsearch.evaluation.judgments import JudgedFigures
from mmsearch.evaluation.ranking import (
    CUTOFFS,
    NOT_FOUND,
    TIE,
    Metrics,
    Ranks,
    metrics_of,
    rank_of_best,
    recall_at,
)
from mmsearch.search.page import Section, Table, Tile, render_page
from mmsearch.store.store import Contents
from mmsearch.types import Ids, Modality, OnProgress, Progress, Vectors, no_progress

ONE_ANSWER = "  equal captions as one"
_OWN_ONLY = "text -> image, judged ones"
_APPROVED = "  by judgments"
NAMES = {"t2i": "text -> image", "i2t": "image -> text"}
DEFINITION = (
    "Recall@K is the share of queries with a true answer among the first K (Success@k, hit rate). "
    "All in percent; ranking is exact; ties count against the true answer. Index loss: points of "
    "Recall that the index's own search loses against that. In brackets: 95% bootstrap interval "
    "over images."
)
#: How far down a search is followed: the TREC runs are as long.
DEPTH = 100
_BLOCK = 256  # queries compared with everything at once


Rank = Callable[[Vectors, Modality, int], list[Ids]]
"""The search that is measured: query vectors, what to find, how many; ids, best first."""


@dataclass(frozen=True)
class Corpus:
    """The labelled set as the index holds it; rows of `images` and `captions` are vectors."""

    image_ids: Ids
    images: Vectors
    image_names: tuple[str, ...]
    caption_ids: Ids
    captions: Vectors
    texts: tuple[str, ...]
    owner: NDArray[np.int64]
    """For each caption, the row of its image."""

    @cached_property
    def text_ids(self) -> NDArray[np.int64]:
        """A number for each caption, the same for equal texts."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(text, len(numbers)) for text in self.texts], np.int64)

    @cached_property
    def repeated(self) -> int:
        """How many captions say what a caption of another image says, as class names do."""
        pairs = np.unique(np.stack([self.text_ids, self.owner]), axis=1)
        images = np.bincount(pairs[0], minlength=int(self.text_ids.max(initial=-1)) + 1)
        return int((images[self.text_ids] > 1).sum())

    def says(self, images: NDArray[np.int64], texts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether images (n,) have a caption that is one of some numbered texts (t,), (n, t)."""
        place = np.full(int(self.text_ids.max(initial=-1)) + 1, -1)
        place[texts] = np.arange(len(texts))
        row = np.full(len(self.images), -1)
        row[images] = np.arange(len(images))
        found = np.zeros((len(images), len(texts)), bool)
        rows, places = row[self.owner], place[self.text_ids]
        there = (rows >= 0) & (places >= 0)
        found[rows[there], places[there]] = True
        return found

    @classmethod
    def of(cls, held: Contents) -> Corpus:
        """All that an index holds."""
        row_of = {int(number): row for row, number in enumerate(held.image_ids)}
        return cls(
            image_ids=held.image_ids,
            images=held.image_vectors,
            image_names=tuple(os.fsdecode(path) for path in held.image_paths),
            caption_ids=held.caption_ids,
            captions=held.caption_vectors,
            texts=held.caption_texts,
            owner=np.array([row_of[int(media)] for media in held.caption_media], dtype=np.int64),
        )


@dataclass(frozen=True)
class Direction:
    """One direction's result.

    `top_rows` are the rows of the gallery that the search returned for each query, in the
    order in which they count (a tie puts the false item first), and `top_scores` their scores.
    """

    name: str
    metrics: Metrics
    one_answer: Metrics | None
    """The same where equal captions are one answer; None where no two images share one."""
    loss: dict[int, float]
    """Percentage points of Recall@K that the index loses against exact ranking."""
    ranks: Ranks
    top_rows: tuple[NDArray[np.int64], ...]
    top_scores: tuple[NDArray[np.float64], ...]
    queries: NDArray[np.int64]
    """The row of each query among the corpus's captions (t2i) or images (i2t)."""


class RetrievalResult(NamedTuple):
    """Both directions: text to image, image to text."""

    t2i: Direction
    i2t: Direction


def evaluate(
    corpus: Corpus,
    rank: Rank,
    on_progress: OnProgress = no_progress,
) -> RetrievalResult:
    """Text to image and image to text.

    The figures are of exact ranking; beside them stands what the index's own search loses.
    Images without captions are in the gallery, but ask nothing.

    Raises:
        UsageError: no image has a caption.
    """
    if not len(corpus.captions):
        raise UsageError("no image here has a caption: there is nothing to measure")
    # What asks and what is found is once each text; images that say the same are one answer to it.
    texts, once = np.unique(corpus.text_ids, return_index=True)
    all_images = np.arange(len(corpus.images))
    images = _Side("image", corpus.images, corpus.image_ids, all_images)
    captions = _Side("caption", corpus.captions, corpus.caption_ids, corpus.owner)

    def images_that_say(queries: NDArray[np.int64]) -> NDArray[np.bool_]:
        numbers, which = np.unique(corpus.text_ids[queries], return_inverse=True)
        return corpus.says(all_images, numbers).T[which]

    def texts_that_say(queries: NDArray[np.int64]) -> NDArray[np.bool_]:
        return corpus.says(queries, texts)

    return RetrievalResult(
        _direction(
            "t2i", captions, images, np.arange(len(corpus.captions)),
            (all_images, images_that_say) if corpus.repeated else None, rank, on_progress,
        ),
        _direction(
            "i2t", images, captions, np.unique(corpus.owner),
            (once, texts_that_say) if corpus.repeated else None, rank, on_progress,
        ),
    )  # fmt: skip


class _Side(NamedTuple):
    """What asks, or the gallery: vectors, their ids and the image each belongs to."""

    modality: Modality
    vectors: Vectors
    ids: Ids
    image: NDArray[np.int64]


_OneAnswer = tuple[
    NDArray[np.int64],  # the rows of the gallery where equal captions are one
    Callable[[NDArray[np.int64]], NDArray[np.bool_]],  # what is true among them, for some queries
]


def _direction(
    name: str,
    asking: _Side,
    gallery: _Side,
    queries: NDArray[np.int64],
    one_answer: _OneAnswer | None,
    rank: Rank,
    on_progress: OnProgress,
) -> Direction:
    """One direction; `queries` are the rows of the side that asks which do ask."""
    exact, served, once = [], [], []
    top_rows: list[NDArray[np.int64]] = []
    top_scores: list[NDArray[np.float64]] = []
    by_id = np.argsort(gallery.ids)
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        vectors = asking.vectors[block]
        scores = (vectors @ gallery.vectors.T).astype(np.float64)
        true = asking.image[block, None] == gallery.image[None, :]
        exact.append(rank_of_best(scores, true))
        if one_answer is not None:
            rows, true_of = one_answer
            once.append(rank_of_best(scores[:, rows], true_of(block)))
        for own, ok, found in zip(
            scores, true, rank(vectors, gallery.modality, DEPTH), strict=True
        ):
            places = by_id[np.searchsorted(gallery.ids, found, sorter=by_id)]
            # A tie is counted against us: within it, the false item comes first.
            places = places[np.lexsort((~ok[places], -(own[places] + TIE * ~ok[places])))]
            hit = np.flatnonzero(ok[places])
            served.append(hit[0] + 1 if len(hit) else NOT_FOUND)
            top_rows.append(places)
            top_scores.append(own[places])
        on_progress(Progress(name, start + len(block), len(queries)))
    ranks, clusters = np.concatenate(exact), asking.image[queries]
    metrics = metrics_of(ranks, clusters)
    loss = {k: metrics.recall[k] - recall_at(np.array(served), k) for k in CUTOFFS}
    merged = metrics_of(np.concatenate(once), clusters) if once else None
    return Direction(
        name, metrics, merged, loss, ranks, tuple(top_rows), tuple(top_scores), queries
    )


# -- what is told of it ------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchReport:
    """What `mmsearch bench` measured, and on what."""

    dataset: str
    split: str
    model: str
    precision: str
    corpus: Corpus
    result: RetrievalResult
    missing: tuple[str, ...] = ()
    """Files of the labelled set that could not be indexed; their captions ask nothing."""
    judged: JudgedFigures | None = None
    """Text to image by people's judgments, where there are any."""


def to_json(report: BenchReport) -> dict[str, Any]:
    """The figures for machines: recall in percent."""
    document: dict[str, Any] = {
        "dataset": report.dataset,
        "split": report.split,
        "model": report.model,
        "precision": report.precision,
        "images": len(report.corpus.images),
        "captions": len(report.corpus.captions),
        "repeated_captions": report.corpus.repeated,
        "missing": len(report.missing),
    }
    for direction in report.result:
        figures = document[direction.name] = {
            **recall_figures(direction.metrics.recall),
            **interval_figures(direction.metrics),
            **_rank_figures(direction.metrics),
            "queries": direction.metrics.queries,
            "index_loss": recall_figures(direction.loss),
        }
        if (merged := direction.one_answer) is not None:
            figures["equal_captions_one_answer"] = {
                **recall_figures(merged.recall),
                **_rank_figures(merged),
            }
    if (judged := report.judged) is not None:
        document["t2i_judged"] = {
            "nDCG@10": round(judged.ndcg, 4),
            "nDCG@10_interval": [round(end, 2) for end in judged.ndcg_interval],
            **recall_figures(judged.approved.recall),
            **interval_figures(judged.approved),
            **_rank_figures(judged.approved),
            "queries": judged.approved.queries,
            "unknown_pairs": judged.unknown,
            "own_picture_only": {
                **recall_figures(judged.plain.recall),
                **_rank_figures(judged.plain),
            },
        }
    return document


def recall_figures(recall: dict[int, float]) -> dict[str, float]:
    """Recall@K, or what is in its unit, by names such as "R@1"."""
    return {f"R@{k}": round(recall[k], 4) for k in CUTOFFS}


def interval_figures(metrics: Metrics) -> dict[str, list[float]]:
    """The ends of the interval of each Recall@K."""
    return {f"R@{k}_interval": [round(end, 2) for end in metrics.intervals[k]] for k in CUTOFFS}


def _rank_figures(metrics: Metrics) -> dict[str, float]:
    return {"median_rank": metrics.median_rank, "MRR": round(metrics.mrr, 6)}


def table_of(report: BenchReport) -> Table:
    """The figures for people."""
    recall = (f"R@{k}" for k in CUTOFFS)
    head = ["direction", *recall, "median rank", "MRR", "queries", "index loss"]
    rows = []
    for direction in report.result:
        worst = f"{max(direction.loss.values()):.2f}"
        rows.append([NAMES[direction.name], *_cells(direction.metrics), worst])
        if direction.one_answer is not None:
            rows.append([ONE_ANSWER, *_cells(direction.one_answer), ""])
    if report.judged is not None:
        rows.append([_OWN_ONLY, *_cells(report.judged.plain), ""])
        rows.append([_APPROVED, *_cells(report.judged.approved), ""])
    note = DEFINITION
    if report.corpus.repeated:
        note += (
            f" {report.corpus.repeated} of {len(report.corpus.texts)} captions are also those of "
            "another image, which counts as a wrong answer above, as in the CLIP papers; below it, "
            "equal captions are one answer."
        )
    if report.judged is not None:
        note += f" {_told_of(report.judged)}"
    return Table(head, rows, note)


def _told_of(judged: JudgedFigures) -> str:
    low, high = judged.ndcg_interval
    told = (
        f"Judged: {judged.approved.queries} captions with judged pictures, first with their own "
        "picture as the only answer, then with every picture of a grade above 0 and their own; "
        f"nDCG@10 {judged.ndcg:.1f} [{low:.1f}, {high:.1f}], where a caption's own picture has the "
        "highest grade of the file unless it was judged."
    )
    if judged.unknown:
        told += f" {judged.unknown} judged pairs are of captions or pictures that are not here."
    return told


def _cells(metrics: Metrics) -> list[str]:
    ranks = [f"{metrics.median_rank:g}", f"{metrics.mrr:.3f}"]
    return [*recall_cells(metrics), *ranks, str(metrics.queries)]


def recall_cells(metrics: Metrics) -> list[str]:
    """Each Recall@K with its interval."""
    return [
        f"{metrics.recall[k]:.1f} [{low:.1f}, {high:.1f}]"
        for k, (low, high) in metrics.intervals.items()
    ]


def summary_of(report: BenchReport) -> str:
    """What was measured, in a line."""
    split = f" ({report.split})" if report.split else ""
    return (
        f"{report.dataset}{split}: {len(report.corpus.images)} images, "
        f"{len(report.corpus.captions)} captions, model {report.model} ({report.precision})"
    )


def to_text(report: BenchReport) -> str:
    """Summary and table as plain text."""
    return text_of(summary_of(report), table_of(report))


def text_of(summary: str, table: Table) -> str:
    """A line, a table with names to the left and figures to the right, and its note."""
    lines = [list(table.head), *map(list, table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    text = [summary]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join([*text, table.note])


def to_html(report: BenchReport, paths: dict[int, Path], examples: int = 8) -> str:
    """The table, and text queries with what they found: the best and the worst ones.

    Args:
        paths: where each image lies, by its row.
    """
    direction, corpus = report.result.t2i, report.corpus
    order = np.argsort(direction.ranks, kind="stable")
    good = order[: np.count_nonzero(direction.ranks == 1)]
    good = good[:: max(1, len(good) // examples)][:examples]
    sections = []
    for title, chosen in (("found first", good), ("missed by most", order[::-1][:examples])):
        for query in chosen:
            own = int(corpus.owner[query])
            rows = [int(row) for row in direction.top_rows[query][:5]]
            tiles = [
                Tile(paths[row], f"{place + 1}. {score:.3f}", paths[row].name, row == own)
                for place, (row, score) in enumerate(
                    zip(rows, direction.top_scores[query], strict=False)
                )
            ]
            if own not in rows:
                rank = int(direction.ranks[query])
                tiles.append(Tile(paths[own], f"{rank}.", f"the true one: {paths[own].name}", True))
            note = f"{title}: rank {int(direction.ranks[query])} of {len(corpus.images)}"
            sections.append(Section(corpus.texts[query], tiles, note))
    return render_page(
        f"Retrieval on {report.dataset}",
        sections,
        intro=summary_of(report),
        tables=[table_of(report)],
    )


def export_vectors(report: BenchReport, folder: Path) -> None:
    """The very vectors that were compared, for anybody to check the figures with.

    `image.npy` and `text.npy` are float32, of shape (n, dim); line i of `images.jsonl` and of
    `captions.jsonl` describes row i.
    """
    corpus = report.corpus
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "image.npy", corpus.images)
    np.save(folder / "text.npy", corpus.captions)
    images = (
        {"row": row, "id": int(number), "path": name}
        for row, (number, name) in enumerate(zip(corpus.image_ids, corpus.image_names, strict=True))
    )
    captions = (
        {"row": row, "id": int(number), "image_row": int(owner),
         "image_id": int(corpus.image_ids[owner]), "caption": text}
        for row, (number, owner, text) in enumerate(
            zip(corpus.caption_ids, corpus.owner, corpus.texts, strict=True)
        )
    )  # fmt: skip
    for name, rows in (("images", images), ("captions", captions)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def write_runs(report: BenchReport, folder: Path) -> None:
    """TREC runs and qrels of both directions, for ranx, ir_measures or trec_eval.

    Images are called `i7` and captions `c9`, by their ids. Scores strictly decrease in our
    order, so that no tool breaks a tie another way.
    """
    corpus = report.corpus
    folder.mkdir(parents=True, exist_ok=True)
    images = [f"i{number}" for number in corpus.image_ids]
    captions = [f"c{number}" for number in corpus.caption_ids]
    for direction in report.result:
        is_t2i = direction.name == "t2i"
        asking, found = (captions, images) if is_t2i else (images, captions)
        true: dict[int, list[int]] = {}
        for caption, image in enumerate(corpus.owner.tolist()):
            query, item = (caption, image) if is_t2i else (image, caption)
            true.setdefault(query, []).append(item)
        with (
            (folder / f"{direction.name}.run").open("w", encoding="utf-8") as run,
            (folder / f"{direction.name}.qrels").open("w", encoding="utf-8") as qrels,
        ):
            for query, rows, scores in zip(
                direction.queries.tolist(), direction.top_rows, direction.top_scores, strict=True
            ):
                name = asking[query]
                qrels.writelines(f"{name} 0 {found[row]} 1\n" for row in true[query])
                # In float32, as trec_eval keeps them: smaller steps would be ties again over there.
                last = np.float32(np.inf)
                for place, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
                    last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
                    run.write(f"{name} Q0 {found[row]} {place} {last:.9g} mmsearch\n")

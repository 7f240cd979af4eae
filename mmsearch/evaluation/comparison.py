"""Compares settings of a search by text, on captions that are held out.

A query must not meet itself: the captions that ask are taken out of the index first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmsearch.errors import UsageError
from mmsearch.evaluation.ranking import (
    CUTOFFS,
    NOT_FOUND,
    Difference,
    Metrics,
    metrics_of,
    rank_of_best,
    recall_at,
    recall_gain,
)
from mmsearch.evaluation.retrieval import interval_figures, recall_cells, recall_figures, text_of
from mmsearch.search.candidates import CandidateScores
from mmsearch.search.fusion import Scores
from mmsearch.search.page import Table
from mmsearch.search.searcher import DEPTH, Searcher
from mmsearch.store.store import Store
from mmsearch.types import Fusion, OnProgress, Progress, Query, Term, Vectors, no_progress

DEFINITION = (
    "Each query is a caption that is not in the index; what is sought is its image. Recall@K in "
    "percent, of the images that the search itself ranks; ties count against the true answer. "
    f"Ranks are followed to {DEPTH}: what lies beyond is not found. In brackets: 95% bootstrap "
    "interval over images, for the gain a paired one."
)
BARE = " Bare: the queries whose image has no caption left in the index."


@dataclass(frozen=True)
class HeldOut:
    """A caption that was taken out of an index, and the media that it describes."""

    text: str
    media: int
    is_bare: bool
    """Whether no caption of that media is left in the index."""


def hold_out(store: Store, count: int, *, captioned: float = 1.0, seed: int = 0) -> list[HeldOut]:
    """Takes the first captions of every image out of an index; returns them.

    The same text a second time on one image goes with them.

    Args:
        count: how many of each image; 0 is all of them.
        captioned: the share of the images that keep their other captions.

    Raises:
        UsageError: no image has a caption.
    """
    held = store.contents()
    if not len(held.caption_ids):
        raise UsageError("no image here has a caption: there is nothing to measure")
    of_media: dict[int, list[tuple[int, str]]] = {}
    for number, text, owner in zip(
        held.caption_ids.tolist(), held.caption_texts, held.caption_media.tolist(), strict=True
    ):
        of_media.setdefault(owner, []).append((number, text))
    order = np.random.default_rng(seed).permutation(len(of_media))
    found, gone = [], []
    for (owner, captions), place in zip(of_media.items(), order, strict=True):
        texts = list(dict.fromkeys(text for _, text in captions))
        asking = texts[: count or len(texts)]
        is_bare = bool(place >= round(captioned * len(of_media)) or len(texts) == len(asking))
        found += [HeldOut(text, owner, is_bare) for text in asking]
        gone += [number for number, text in captions if is_bare or text in asking]
    with store.writer() as writer:
        with writer.change() as change:
            change.remove_captions(gone)
        writer.compact()
    return found


@dataclass(frozen=True)
class Compared:
    """One setting's figures, and what it gains over the first that was measured."""

    fusion: Fusion
    rerank: int
    """How many of the first images were re-ranked."""
    metrics: Metrics
    gains: dict[int, Difference] | None
    """The difference of Recall@K, in points; None for the first."""
    bare: dict[int, float] | None
    """Recall@K of the queries whose image has no caption left; None where all or none are so."""

    @property
    def name(self) -> str:
        return f"{self.fusion}, rerank {self.rerank}" if self.rerank else self.fusion


@dataclass(frozen=True)
class FusionReport:
    """What `bench --fusion` or `--rerank` measured, and on what."""

    dataset: str
    split: str
    model: str
    images: int
    captions: int
    """Captions that were left in the index."""
    rows: tuple[Compared, ...]


def candidates_of(
    searcher: Searcher,
    asked: Sequence[HeldOut],
    on_progress: OnProgress = no_progress,
    depth: int = 0,
) -> Iterator[tuple[Query, Vectors, CandidateScores]]:
    """What the index holds for each of the held-out captions, with the query and its vector.

    Args:
        depth: how many images are re-ranked.
    """
    for place, one in enumerate(asked, 1):
        query = Query((Term(text=one.text),), rerank=depth)
        vector = searcher.embed(query.terms)
        yield query, vector, searcher.candidates(query, vector)
        on_progress(Progress("queries", place, len(asked)))


def rank_in(candidates: CandidateScores, scores: Scores, media: int, depth: int = DEPTH) -> int:
    """The rank of the true image; NOT_FOUND where it is not among the first `depth`.

    Further down, images are missing that only another source would have brought up.
    """
    true = candidates.media == media
    if not true.any() or not np.isfinite(scores[true]).all():
        return NOT_FOUND
    filled = np.where(np.isfinite(scores), scores, -np.inf)
    rank = int(rank_of_best(filled[None], true[None])[0])
    return rank if rank <= depth else NOT_FOUND


def compare(
    searcher: Searcher,
    asked: Sequence[HeldOut],
    settings: Sequence[tuple[Fusion, int]],
    on_progress: OnProgress = no_progress,
) -> tuple[Compared, ...]:
    """Each setting on the same queries, and how it differs from the first.

    Args:
        settings: fusions, and how many images each re-ranks.

    Raises:
        UsageError: a setting that needs what was not trained.
    """
    ranks: dict[tuple[Fusion, int], list[int]] = {setting: [] for setting in settings}
    deepest = max(depth for _, depth in settings)
    found_for = candidates_of(searcher, asked, on_progress, deepest)
    for one, (query, vector, candidates) in zip(asked, found_for, strict=True):
        for how, depth in settings:
            set_so = replace(query, rerank=depth, k=depth or query.k)  # no more than depth
            if depth:
                searcher.reranker_of(set_so, how)
            scores, _ = searcher.scores(set_so, vector, candidates, how)
            ranks[how, depth].append(rank_in(candidates, scores, one.media))
    clusters = np.array([one.media for one in asked])
    is_bare = np.array([one.is_bare for one in asked], bool)
    found = []
    first = np.array(ranks[settings[0]])
    for how, depth in settings:
        own = np.array(ranks[how, depth])
        gains = bare = None
        if (how, depth) != settings[0]:
            gains = {k: recall_gain((own, first, clusters), cutoffs=[k]) for k in CUTOFFS}
        if is_bare.any() and not is_bare.all():
            bare = {k: recall_at(own[is_bare], k) for k in CUTOFFS}
        found.append(Compared(how, depth, metrics_of(own, clusters), gains, bare))
    return tuple(found)


def table_of(report: FusionReport) -> Table:
    """The figures for people."""
    first = report.rows[0].name
    has_bare = report.rows[0].bare is not None
    head = ["setting", *(f"R@{k}" for k in CUTOFFS), "median rank", f"MRR@{DEPTH}",
            *(["bare R@1/5/10"] if has_bare else []),
            *([f"R@1 over {first}", ""] if len(report.rows) > 1 else [])]  # fmt: skip
    rows = []
    for row in report.rows:
        median = row.metrics.median_rank
        shown = f"{median:g}" if np.isfinite(median) else f"> {DEPTH}"
        line = [row.name, *recall_cells(row.metrics), shown, f"{row.metrics.mrr:.3f}"]
        if row.bare is not None:
            line.append(" / ".join(f"{row.bare[k]:.1f}" for k in CUTOFFS))
        if len(report.rows) > 1:
            gain = row.gains[1] if row.gains is not None else None
            line += (
                [f"{gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]", verdict(gain)]
                if gain is not None
                else ["", ""]
            )
        rows.append(line)
    return Table(head, rows, DEFINITION + (BARE if has_bare else ""))


def verdict(gain: Difference) -> str:
    """Whether a difference is one, in a word or two."""
    if gain.low > 0:
        return "better"
    return "worse" if gain.high < 0 else "no real difference"


def summary_of(report: FusionReport) -> str:
    """What was measured, in a line."""
    split = f" ({report.split})" if report.split else ""
    return (
        f"{report.dataset}{split}: {report.rows[0].metrics.queries} held-out captions ask for "
        f"{report.images} images with {report.captions} captions, model {report.model}"
    )


def to_text(report: FusionReport) -> str:
    """Summary and table as plain text."""
    return text_of(summary_of(report), table_of(report))


def to_json(report: FusionReport) -> dict[str, Any]:
    """The figures for machines: recall in percent, gains in points."""
    rows = []
    for row in report.rows:
        metrics = row.metrics
        figures: dict[str, Any] = {
            "fusion": row.fusion, "rerank": row.rerank, "queries": metrics.queries,
            **recall_figures(metrics.recall), **interval_figures(metrics),
            "median_rank": metrics.median_rank if np.isfinite(metrics.median_rank) else None,
            f"MRR@{DEPTH}": round(metrics.mrr, 6),
        }  # fmt: skip
        for k, gain in (row.gains or {}).items():
            figures[f"R@{k}_gain"] = [round(v, 2) for v in (gain.mean, gain.low, gain.high)]
        if row.bare is not None:
            figures["bare"] = recall_figures(row.bare)
        rows.append(figures)
    return {"dataset": report.dataset, "split": report.split, "model": report.model,
            "images": report.images, "captions": report.captions, "rows": rows}  # fmt: skip

"""People's judgments of text to image: which pictures answer a caption, and how well.

A picture of another caption may answer just as well; plain recall counts it as wrong. TREC's qrels
say so: a line for each judged pair, `QUERY 0 IMAGE GRADE`, with grades from 0 (no answer). A query
is a caption of the labelled set: `IMAGE#N`, the N-th of that image from 0. Where names of images
hold spaces, tabs stand between the fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmsearch.datasets.labelled import LabelledImage
from mmsearch.datasets.sidecar import clean_captions, read_lines
from mmsearch.errors import LabelsError
from mmsearch.evaluation.ranking import TIE, Metrics, bootstrap_interval, metrics_of, rank_of_best
from mmsearch.types import Vectors

DEPTH = 10  # how far down nDCG looks
_BLOCK = 256

Qrels = Mapping[str, Mapping[str, int]]
"""For each query the grades of the images that were judged, by name."""


def read_qrels(path: Path) -> Qrels:
    """The judgments in a TREC qrels file.

    Raises:
        LabelsError: it cannot be read, or a line is none of qrels.
    """
    found: dict[str, dict[str, int]] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            if "\t" in line:
                query, _, image, grade = line.split("\t")
            else:
                query, _, rest = line.split(None, 2)
                image, grade = rest.rsplit(None, 1)
            found.setdefault(query, {})[image] = int(grade)
        except ValueError as error:
            raise LabelsError(
                f"{path}: line {number} is not 'QUERY 0 IMAGE GRADE' with a whole number as grade"
            ) from error
    if not found:
        raise LabelsError(f"{path}: holds no judgments")
    return found


@dataclass(frozen=True)
class JudgedFigures:
    """Text to image by judgments, over the captions that have any."""

    plain: Metrics
    """With the caption's own picture as the only answer."""
    approved: Metrics
    """With every picture that has a grade above 0 as an answer, and the caption's own."""
    ndcg: float
    """nDCG@10 in percent; the gain is the grade, as trec_eval has it."""
    ndcg_interval: tuple[float, float]
    unknown: int
    """Judged pairs whose caption or picture is not measured here."""


def by_judgments(
    images: Vectors,
    captions: Vectors,
    owner: NDArray[np.int64],
    names: Sequence[Sequence[str]],
    files: Sequence[str],
    qrels: Qrels,
) -> JudgedFigures:
    """The figures of exact ranking. A tie counts against us: the lower grade comes first.

    A caption's own picture has the highest grade of the file, unless it was judged.

    Args:
        images: unit vectors, (n, dim).
        captions: unit vectors, (c, dim).
        owner: for each caption, the row of its image.
        names: for each caption, what the qrels may call it.
        files: for each image, what the qrels call it.

    Raises:
        LabelsError: no judged caption is measured.
    """
    row_of = {file: row for row, file in enumerate(files)}
    best = max(grade for grades in qrels.values() for grade in grades.values())
    queries, graded, known = [], [], 0
    for caption, its_names in enumerate(names):
        judged = {
            row_of[image]: grade
            for name in its_names
            for image, grade in qrels.get(name, {}).items()
            if image in row_of
        }
        if judged:
            known += len(judged)
            judged.setdefault(int(owner[caption]), best)
            queries.append(caption)
            graded.append(judged)
    if not queries:
        raise LabelsError(
            "the qrels judge no caption of this set: a query is called IMAGE#N, the N-th caption "
            f"of that image from 0, such as '{next((n for one in names for n in one), '')}'"
        )
    rows = np.array(queries)
    plain, approved, ndcg = [], [], []
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        scores = (captions[block] @ images.T).astype(np.float64)
        grades = np.zeros(scores.shape)
        for place, own in enumerate(graded[start : start + _BLOCK]):
            grades[place, list(own)] = list(own.values())
        plain.append(rank_of_best(scores, owner[block, None] == np.arange(len(images))))
        answers = grades > 0
        answers[np.arange(len(block)), owner[block]] = True
        approved.append(rank_of_best(scores, answers))
        ndcg.append(_ndcg(scores, np.maximum(grades, 0)))
    values, clusters = 100 * np.concatenate(ndcg), owner[rows]
    pairs = sum(map(len, qrels.values()))
    return JudgedFigures(
        metrics_of(np.concatenate(plain), clusters),
        metrics_of(np.concatenate(approved), clusters),
        float(values.mean()),
        bootstrap_interval(values, clusters),
        pairs - known,
    )


def _ndcg(scores: NDArray[np.float64], grades: NDArray[np.float64]) -> NDArray[np.float64]:
    """nDCG@10 of each query (Järvelin and Kekäläinen 2002); one without an answer counts 0."""
    # Within a tie the lower grade comes first: what has a higher one is put behind it.
    order = np.lexsort((grades, -np.round(scores / TIE)), axis=1)[:, :DEPTH]
    discount = 1 / np.log2(np.arange(2, order.shape[1] + 2))
    gained = np.take_along_axis(grades, order, axis=1) @ discount
    ideal = -np.sort(-grades, axis=1)[:, : order.shape[1]] @ discount
    return np.divide(gained, ideal, out=np.zeros_like(gained), where=ideal > 0)


def caption_names(
    images: Sequence[LabelledImage], row_of: Mapping[str, int], texts: Sequence[str],
    owner: NDArray[np.int64],
) -> list[list[str]]:  # fmt: skip
    """What qrels call each caption of an index: `IMAGE#N`, by the labelled set that it holds.

    Args:
        row_of: the row of each image that the index holds, by its name in the set.
        texts: the captions in the index.
        owner: for each of them, the row of its image.
    """
    found: list[list[str]] = [[] for _ in texts]
    place: dict[tuple[int, str], int] = {}
    for caption, text in enumerate(texts):
        place.setdefault((int(owner[caption]), text), caption)
    for image in images:
        row = row_of.get(image.file)
        for number, text in enumerate(image.captions):
            key = -1 if row is None else row, "".join(clean_captions([text]))
            if key in place:
                found[place[key]].append(f"{image.file}#{number}")
    return found

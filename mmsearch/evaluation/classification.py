"""Zero-shot classification: each picture gets the label whose text is nearest to it.

A label's vector is the mean over several sentences that name it, as in CLIP's prompt ensembles
(Radford et al. 2021). Where pictures lie in folders that are called like labels, those are the
truth.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.datasets.sidecar import read_lines
from mmsearch.errors import LabelsError, UsageError
from mmsearch.evaluation.ranking import bootstrap_interval, rank_of_best
from mmsearch.types import Vectors

#: What a label is put into; its words stand in the place of {}.
TEMPLATES = (
    "{}", "a photo of a {}", "a photo of {}", "a picture of a {}", "a close-up photo of a {}",
    "there is a {} in the picture", "a photo of the {}",
)  # fmt: skip
_LISTED = 20  # confusions that are shown; a whole table has labels squared
_UNKNOWN = -1


def read_labels(path: Path) -> list[str]:
    """The labels in a text file, one a line; empty lines and those that begin with # are none.

    Raises:
        LabelsError: it cannot be read, or has fewer than two different labels
            (`different_labels`).
    """
    named = (line.strip() for line in read_lines(path) if not line.lstrip().startswith("#"))
    try:
        return different_labels(filter(None, named))
    except LabelsError as error:
        raise LabelsError(f"{path}: {error}") from error


def different_labels(labels: Iterable[str]) -> list[str]:
    """The labels without those that differ from an earlier one in case, dashes or underscores only.

    Raises:
        LabelsError: fewer than two are left.
    """
    found: dict[str, str] = {}
    for label in labels:
        found.setdefault(_plain(label), label)
    if len(found) < 2:
        raise LabelsError("at least two different labels are needed (in a file, one a line)")
    return list(found.values())


def label_sentences(labels: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The sentences that name each label: every template with the label in its place.

    Raises:
        UsageError: a template without a place for the label.
    """
    if odd := next((one for one in templates if "{}" not in one), None):
        raise UsageError(f"the template '{odd}' has no {{}} for the label")
    return [[one.replace("{}", label) for one in templates] for label in labels]


def label_vectors(
    sentences: Iterable[list[str]], encode: Callable[[list[str]], Vectors]
) -> Vectors:
    """A unit vector for each label, (labels, dim): the mean of its sentences' vectors."""
    vectors = np.stack([encode(one).mean(axis=0) for one in sentences])
    found: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


@dataclass(frozen=True)
class Classification:
    """Pictures with their labels."""

    model: str
    labels: tuple[str, ...]
    paths: tuple[Path, ...]
    scores: NDArray[np.float32]
    """Cosines of pictures and labels, (n, labels)."""
    truth: NDArray[np.int64]
    """The row of each picture's true label, (n,); -1 where none of its folders is called so."""

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """The row of the label that each picture gets, (n,)."""
        found: NDArray[np.int64] = self.scores.argmax(axis=1).astype(np.int64)
        return found

    @cached_property
    def accuracy(self) -> Accuracy | None:
        """How often that is the true one; None where no truth is known."""
        rows = np.flatnonzero(self.truth != _UNKNOWN)
        if not len(rows):
            return None
        truth = self.truth[rows]
        true = truth[:, None] == np.arange(len(self.labels))
        ranks = rank_of_best(self.scores[rows].astype(np.float64), true)
        right = 100.0 * (ranks == 1)
        classes = np.unique(truth)
        return Accuracy(
            top1=float(right.mean()),
            interval=bootstrap_interval(right, np.arange(len(right))),
            top5=float(100 * (ranks <= 5).mean()),
            per_class=float(np.mean([right[truth == one].mean() for one in classes])),
            pictures=len(rows),
            classes=len(classes),
        )

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """How many pictures of a label (row) got which (column), (labels, labels)."""
        known = self.truth != _UNKNOWN
        found = np.zeros((len(self.labels), len(self.labels)), np.int64)
        np.add.at(found, (self.truth[known], self.predicted[known]), 1)
        return found


@dataclass(frozen=True)
class Accuracy:
    """In percent, over the pictures whose label is known; a tie counts against us."""

    top1: float
    interval: tuple[float, float]
    """Of `top1`: 95%, bootstrap over pictures."""
    top5: float
    """The true label is among the first five."""
    per_class: float
    """The mean over labels of what is right among their pictures."""
    pictures: int
    classes: int


def true_labels(paths: Sequence[Path], labels: Sequence[str]) -> NDArray[np.int64]:
    """The row of the label that the nearest folder above each picture is called like, (n,).

    Case, dashes and underscores make no difference; -1 where no folder is called like a label.
    """
    row_of = {_plain(label): row for row, label in enumerate(labels)}
    found = [
        next((row_of[name] for one in path.parents if (name := _plain(one.name)) in row_of), -1)
        for path in paths
    ]
    return np.array(found, np.int64)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def to_json(found: Classification) -> dict[str, Any]:
    """All of it for machines; figures in percent."""
    pictures = [
        {
            "path": os.fspath(path),
            "label": found.labels[label],
            "score": round(float(scores[label]), 6),
            "true": found.labels[truth] if truth != _UNKNOWN else None,
        }
        for path, label, scores, truth in zip(
            found.paths, found.predicted, found.scores, found.truth, strict=True
        )
    ]
    document: dict[str, Any] = {"model": found.model, "pictures": pictures}
    if (accuracy := found.accuracy) is not None:
        document["accuracy"] = {
            "top1": round(accuracy.top1, 4),
            "top1_interval": [round(end, 2) for end in accuracy.interval],
            "top5": round(accuracy.top5, 4),
            "mean_per_class": round(accuracy.per_class, 4),
            "pictures": accuracy.pictures,
        }
        document["confusion"] = {
            label: {found.labels[column]: int(row[column]) for column in np.flatnonzero(row)}
            for label, row in zip(found.labels, found.confusion, strict=True)
            if row.any()
        }
    return document


def to_text(found: Classification) -> str:
    """The accuracy, and which labels were taken for which, for people; "" without a truth."""
    if (accuracy := found.accuracy) is None:
        return ""
    low, high = accuracy.interval
    summary = (
        f"accuracy {accuracy.top1:.1f} [{low:.1f}, {high:.1f}], among the first five "
        f"{accuracy.top5:.1f}, mean over labels {accuracy.per_class:.1f}, in percent of "
        f"{accuracy.pictures} pictures in folders called like {accuracy.classes} of the "
        f"{len(found.labels)} labels ({found.model})"
    )
    lines = [summary]
    wrong: Counter[tuple[str, str]] = Counter()
    for row, column in np.argwhere(found.confusion > 0):
        if row != column:
            wrong[found.labels[row], found.labels[column]] = int(found.confusion[row, column])
    if wrong:
        lines.append("most often taken for another:")
    width = max((len(label) for (label, _), _ in wrong.most_common(_LISTED)), default=0)
    of = dict(zip(found.labels, found.confusion.sum(axis=1), strict=True))
    lines += [
        f"  {label:{width}}  {count} of {of[label]} as {other}"
        for (label, other), count in wrong.most_common(_LISTED)
    ]
    return "\n".join(lines)

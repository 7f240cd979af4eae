"""Named pictures: a class name each, made into captions for learning and queries for measuring."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmsearch.evaluation.ranking import TIE

_ODD_PLURALS = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "foot": "feet",
    "tooth": "teeth", "mouse": "mice", "goose": "geese", "leaf": "leaves", "knife": "knives",
    "wolf": "wolves", "fish": "fish", "sheep": "sheep", "scissors": "scissors",
}  # fmt: skip


@dataclass(frozen=True)
class NamedImage:
    """A picture and what it shows, in one or few words, lower case."""

    file: str
    name: str
    source: str
    """The collection that it comes from: the first part of its path."""


def read_named(text: str, drop: Sequence[str] = ()) -> list[NamedImage]:
    """The rows of a CSV with the columns `file` and `label`; equal names become one.

    Args:
        drop: names that say nothing.
    """
    found = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        name = " ".join(row["label"].replace("_", " ").lower().split())
        if name not in drop:
            found.append(NamedImage(row["file"], name, row["file"].split("/")[0]))
    return found


def hold_out(images: Sequence[NamedImage], every: int, of: str) -> set[str]:
    """The files of one collection that are kept for measuring: each name's every n-th picture."""
    seen: dict[str, int] = {}
    found = set()
    for image in images:
        if image.source == of:
            seen[image.name] = seen.get(image.name, 0) + 1
            if seen[image.name] % every == 2 % every:
                found.add(image.file)
    return found


def with_article(name: str) -> str:
    """The name after "a" or "an"."""
    return ("an " if name[:1] in "aeiou" else "a ") + name


def plural(name: str) -> str:
    """More than one of it; the last word changes."""
    *before, last = name.split(" ")
    if last in _ODD_PLURALS:
        last = _ODD_PLURALS[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])


def r_precision(scores: np.ndarray, true: np.ndarray) -> np.ndarray:
    """For each query the share of true items among its first R, R being how many it has.

    Args:
        scores: shape (queries, items).
        true: shape (queries, items); every row has a true item.
    """
    order = np.argsort(-(scores - TIE * true), axis=1, kind="stable")  # a tie is against us
    hits = np.take_along_axis(true, order, axis=1).cumsum(axis=1)
    relevant = true.sum(axis=1)
    found: np.ndarray = hits[np.arange(len(hits)), relevant - 1] / relevant
    return found

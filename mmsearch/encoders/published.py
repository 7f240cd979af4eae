"""The models that immich publishes as ONNX graphs, with the figures that are known of them.

`published.csv` holds them. Memory and recall are as immich's documentation has them (its page on
searching): the peak of immich's own process, and the mean of Recall@1, @5 and @10, text to image,
on Crossmodal-3600 (Thapliyal et al. 2022). Megabytes are those of the weights, computed from the
architectures, and of large tokenizers.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

#: In the order of the columns.
RECALLS = ("english", "german", "chinese", "hindi")


@dataclass(frozen=True)
class PublishedModel:
    """A model to fetch."""

    name: str
    """As `--model` takes it."""
    megabytes: int
    """To fetch."""
    memory_mib: int | None
    """What it takes in immich."""
    languages: str
    """"English", or how many languages its texts were in."""
    licence: str
    recall: dict[str, float]
    """In percent, by language, where it was published."""


def published_models() -> list[PublishedModel]:
    """All of them, the best in English first."""
    with Path(__file__).with_name("published.csv").open(encoding="utf-8", newline="") as file:
        return [
            PublishedModel(
                name=f"hf-hub:immich-app/{row['name']}",
                megabytes=int(row["megabytes"]),
                memory_mib=int(row["memory_mib"]) if row["memory_mib"] else None,
                languages=row["languages"],
                licence=row["licence"],
                recall={language: float(row[language]) for language in RECALLS if row[language]},
            )
            for row in csv.DictReader(file)
        ]

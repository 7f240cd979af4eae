"""Which precision a converted model runs in: the fastest that this machine has and that agrees.

A model that is new here is held against torch on a few probes, which says little of pictures that
lie near each other. Before a large run its faster precisions are therefore held against fp32 on
some of the user's own pictures (`mmsearch.encoders.checking`), and what was seen is kept beside the
model: `precisions.json`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mmsearch.encoders.registry import KNOWN, NOTHING_KNOWN, write_json

#: Pictures that precisions are compared on.
SAMPLE = 256
#: Reading so many pictures is worth the check: it costs about as much as embedding a thousand.
WORTH_CHECKING = 2000

#: What share of a picture's ten nearest a precision has to keep, on average, and the mean cosine
#: of its vectors with those in fp32. `tiny` tells what they mean: bf16 keeps 0.95 (cosine 0.9993)
#: and no Recall@1 on Flickr8k moves by more than 0.02 points, int8 keeps 0.90 (0.996) and loses
#: up to a point (docs/models.md).
LEAST_OVERLAP, LEAST_COSINE = 0.93, 0.998
#: The lowest cosine with torch over the probes, where nothing else is known. In fp32 both compute
#: the same; bf16 keeps 8 bits of mantissa, so that some noise is its nature.
AGREEMENT = {"fp32": 0.9999, "bf16": 0.99}

FILE_NAME = "precisions.json"
INT8_IMAGE = "image-int8.xml"


@dataclass(frozen=True)
class Verdict:
    """What one precision gave on a user's pictures, against fp32."""

    overlap: float
    """The mean share of a picture's ten nearest others that stay."""
    cosine: float
    """The mean cosine of the vectors."""
    images_per_second: float

    @property
    def is_good(self) -> bool:
        return self.overlap >= LEAST_OVERLAP and self.cosine >= LEAST_COSINE


Verdicts = Mapping[str, Verdict]


def read_verdicts(folder: Path) -> dict[str, Verdict]:
    """What was seen of a converted model's precisions; nothing where it was not checked."""
    try:
        stored = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        return {name: Verdict(**one) for name, one in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_verdicts(folder: Path, verdicts: Verdicts) -> None:
    write_json(folder / FILE_NAME, {name: asdict(one) for name, one in verdicts.items()})


def choose_precision(
    asked: str,
    model: str,
    agreement: Mapping[str, float],
    verdicts: Verdicts,
    capabilities: Collection[str],
) -> str:
    """The precision to run in.

    Args:
        asked: one by name, which is obeyed, or "auto".
        model: the model's name.
        agreement: the lowest cosine with torch over the probes, by precision.
        capabilities: what OpenVINO says that this CPU has.
    """
    if asked != "auto":
        return asked
    if measured := KNOWN.get(model, NOTHING_KNOWN).precisions:
        return next((name for name in measured if name.upper() in capabilities), "fp32")
    if verdicts:
        there = {"fp32", "int8", *(name.lower() for name in capabilities)}
        good = [
            name for name, one in verdicts.items()
            if name == "fp32" or (one.is_good and name in there)
        ]  # fmt: skip
        return max(good, key=lambda name: verdicts[name].images_per_second)
    agrees = agreement.get("bf16", 0.0) >= AGREEMENT["bf16"]
    return "bf16" if "BF16" in capabilities and agrees else "fp32"


def doubt(
    precision: str, model: str, agreement: Mapping[str, float], verdicts: Verdicts
) -> str | None:
    """Why a precision is less exact than one would take unasked; None where it is not."""
    if precision == "fp32" or precision in KNOWN.get(model, NOTHING_KNOWN).precisions:
        return None
    seen = verdicts.get(precision)
    if seen is not None:
        return None if seen.is_good else (
            f"'{model}' in {precision} keeps {seen.overlap:.0%} of a picture's ten nearest that "
            f"fp32 finds (cosine {seen.cosine:.4f}): results are less exact than in fp32"
        )  # fmt: skip
    lowest = agreement.get(precision, 0.0)
    if precision not in agreement or lowest >= AGREEMENT[precision]:
        return None
    return (
        f"'{model}' in {precision} differs from fp32 (cosine down to {lowest:.3f}): vectors are "
        "less exact"
    )

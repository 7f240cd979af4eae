"""The model card that is written beside every model that was trained here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmsearch.evaluation.ranking import CUTOFFS
from mmsearch.store.files import write_durably


@dataclass(frozen=True)
class Card:
    """What the next person must know of a model."""

    name: str
    what: str
    base: str
    data: Sequence[str]
    """A line for each set, with its split."""
    figures: Sequence[tuple[str, dict[str, float]]]
    """What was measured on, and the six recalls."""
    licence: str
    made_by: str
    use: str
    notes: Sequence[str] = field(default_factory=tuple)


def write_card(folder: Path, card: Card) -> None:
    """Writes `README.md` into a model's folder."""
    write_durably(folder / "README.md", render(card).encode())


def render(card: Card) -> str:
    """The card as Markdown."""
    head = " | ".join(f"{way} R@{k}" for way in ("t2i", "i2t") for k in CUTOFFS)
    lines = [
        f"# {card.name}",
        "",
        card.what,
        "",
        f"- **Started from**: {card.base}",
        f"- **Made by**: {card.made_by}",
        f"- **Terms**: {card.licence}",
        "",
        "## Trained on",
        "",
        *(f"- {line}" for line in card.data),
        "",
        "## Measured",
        "",
        f"| on | {head} |",
        f"|---|{'---|' * 6}",
        *(
            f"| {name} | "
            + " | ".join(f"{recall[f'{way}_R@{k}']:.1f}" for way in ("t2i", "i2t") for k in CUTOFFS)
            + " |"
            for name, recall in card.figures
        ),
        "",
        "Recall@K in percent: the share of queries with a true answer among the first K, among the",
        "pictures and captions of that split. t2i: a caption asks for its picture; i2t: a picture",
        "asks for one of its captions.",
        "",
        "## Use",
        "",
        f"    {card.use}",
        "",
        *card.notes,
    ]
    return "\n".join(lines).rstrip() + "\n"

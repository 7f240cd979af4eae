"""What is told of a run: a log for tables, a plot for eyes, and the card of the model."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsearch.evaluation.ranking import CUTOFFS
from mmsearch.store.files import write_durably

_RECALLS = tuple(f"{way}_R@{k}" for way in ("t2i", "i2t") for k in CUTOFFS)
FIELDS = ("stage", "step", "epoch", "loss", "scale", "rate", "seconds", *_RECALLS)

Entry = dict[str, float | str]
"""What was measured at a validation, by field."""


def write_log(folder: Path, entries: Sequence[Entry], *, plot: bool = True) -> None:
    """Writes `log.csv` and, unless told otherwise, `plot.png`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in entry.items()}
        for entry in entries
    )
    write_durably(folder / "log.csv", text.getvalue().encode())
    if entries and plot:
        write_durably(folder / "plot.png", _plot(entries))


def _plot(entries: Sequence[Entry]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, recalls = figure.subplots(1, 2)
    places = list(range(1, len(entries) + 1))
    shown: Any = [entry.get("loss", float("nan")) for entry in entries]
    losses.plot(places, shown, marker=".")
    losses.set(title="loss in training", xlabel="validation", ylabel="contrastive loss")
    for direction, style in (("t2i", "-"), ("i2t", "--")):
        for k, colour in ((1, "C3"), (5, "C1"), (10, "C0")):
            values: Any = [entry[f"{direction}_R@{k}"] for entry in entries]
            recalls.plot(places, values, style, color=colour, label=f"{direction} R@{k}")
    recalls.set(title="validation", xlabel="validation", ylabel="Recall@K, %", ylim=(0, None))
    recalls.legend(ncols=2, fontsize="small")
    for place, (before, after) in enumerate(itertools.pairwise(entries)):
        if before["stage"] != after["stage"]:
            for axes in (losses, recalls):
                axes.axvline(place + 1.5, color="grey", linewidth=0.8)
    for axes in (losses, recalls):
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    return image.getvalue()


def write_card(
    folder: Path,
    what: str,
    *,
    base: str,
    data: Sequence[str],
    figures: Sequence[tuple[str, dict[str, float]]],
    licence: str,
    made_by: str,
    use: str,
    notes: Sequence[str],
) -> None:
    """Writes `README.md` into a model's folder: what the next person must know of it.

    Args:
        data: a line for each set, with its split.
        figures: what was measured on, and the six recalls.
        made_by: the command.
    """
    lines = [
        f"# {folder.name}",
        "",
        what,
        "",
        f"- **Started from**: {base}",
        f"- **Made by**: `{made_by}`; its log and plot are in `training`",
        f"- **Terms**: {licence}",
        "",
        "## Trained on",
        "",
        *(f"- {line}" for line in data),
        "",
        "## Measured",
        "",
        f"| on | {' | '.join(name.replace('_', ' ') for name in _RECALLS)} |",
        f"|---|{'---|' * 6}",
        *(
            f"| {name} | {' | '.join(f'{recall[field]:.1f}' for field in _RECALLS)} |"
            for name, recall in figures
        ),
        "",
        "Recall@K in percent: the share of queries with a true answer among the first K, among the",
        "pictures and captions of that split. t2i: a caption asks for its picture; i2t: a picture",
        "asks for one of its captions.",
        "",
        "## Use",
        "",
        f"    {use}",
        "",
        *notes,
    ]
    write_durably(folder / "README.md", ("\n".join(lines).rstrip() + "\n").encode())

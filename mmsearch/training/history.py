"""The log of a run: a CSV for tables, a plot for eyes."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmsearch.store.files import write_durably

FIELDS = (
    "stage", "step", "epoch", "loss", "scale", "rate", "seconds",
    "t2i_R@1", "t2i_R@5", "t2i_R@10", "i2t_R@1", "i2t_R@5", "i2t_R@10",
)  # fmt: skip

Entry = dict[str, float | str]


class History:
    """What was measured at each validation, in order."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: list[Entry] = list(entries)

    def add(self, **values: float | str) -> None:
        self.entries.append({name: values[name] for name in FIELDS if name in values})

    def write(self, folder: Path, *, plot: bool = True) -> None:
        """Writes `log.csv` and, unless told otherwise, `plot.png`."""
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in entry.items()}
            for entry in self.entries
        )
        write_durably(folder / "log.csv", text.getvalue().encode())
        if self.entries and plot:
            write_durably(folder / "plot.png", _plot(self.entries))


def _plot(entries: list[Entry]) -> bytes:
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

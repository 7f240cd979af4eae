"""The labelled sets of a recipe, with their files found and looked through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmsearch.datasets.formats import find_images, read_labelled
from mmsearch.datasets.labelled import LabelledImage
from mmsearch.errors import LabelsError, UsageError
from mmsearch.learning.embedding import unusable
from mmsearch.learning.recipe import DataTable, HeldOutTable
from mmsearch.types import Progress

_NOT_LEARNED = ("val", "dev", "valid", "validation", "test")

OnProgress = Callable[[Progress], None]
Tokenize = Callable[[Sequence[str]], torch.Tensor]
Notify = Callable[[str], None]


@dataclass(frozen=True)
class LabelledFiles:
    """A labelled set whose files were found."""

    name: str
    table: DataTable | HeldOutTable
    files: list[Path]
    images: list[LabelledImage]
    tokens: list[torch.Tensor]


def read_set(
    table: DataTable | HeldOutTable,
    tokenize: Tokenize,
    data: Path,
    cache: Path,
    on_progress: OnProgress,
    notify: Notify,
) -> LabelledFiles:
    """The captioned pictures of a table's splits that can be used.

    Raises:
        LabelsError: a picture that is not there, or none that is usable.
        UsageError: no captioned picture in these splits.
    """
    labels = data / table.labels
    labelled = read_labelled(labels)
    if isinstance(table, HeldOutTable):
        chosen = list(labelled.of_split(table.split))
        wanted = table.split
    else:
        wanted = ", ".join(table.splits)
        chosen = [image for image in labelled.images if _is_wanted(table, image.split)]
    chosen = [image for image in chosen if image.captions]
    if not chosen:
        raise UsageError(f"{labels}: no captioned picture in the split '{wanted}'")
    images = data / table.images if table.images else find_images(labels, chosen)
    files = [images / image.file for image in chosen]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise LabelsError(f"{missing}: named in {labels}, but not there")
    name = (table.name if isinstance(table, DataTable) else "") or labelled.name
    bad = unusable(files, cache, f"looking through {name}", on_progress)
    if len(bad) == len(files):
        raise LabelsError(f"{images}: none of the {len(files)} pictures of {labels} is usable")
    if bad:
        first = ", ".join(chosen[row].file for row in sorted(bad)[:5])
        notify(f"{name}: {len(bad)} pictures are damaged and left out: {first}")
    good = [row for row in range(len(files)) if row not in bad]
    chosen = [chosen[row] for row in good]
    tokens = [tokenize(image.captions) for image in chosen]
    return LabelledFiles(name, table, [files[row] for row in good], chosen, tokens)


def _is_wanted(table: DataTable, split: str) -> bool:
    return split in table.splits if table.splits else split.lower() not in _NOT_LEARNED


def keep_apart(sets: Sequence[LabelledFiles], held_out: LabelledFiles | None) -> None:
    """Stops a recipe that learns from what it is measured on."""
    if held_out is None:
        return
    measured = {file.resolve() for file in held_out.files}
    for one in sets:
        both = sum(file.resolve() in measured for file in one.files)
        if both:
            raise UsageError(
                f"{one.name}: {both} of its pictures are in a split that is measured on; name "
                "other splits"
            )

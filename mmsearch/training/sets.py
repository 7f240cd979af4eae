"""The labelled sets of a recipe, with their files found and looked through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from mmsearch.config import available_cores
from mmsearch.datasets.formats import find_images, read_labelled
from mmsearch.datasets.labelled import LabelledImage
from mmsearch.errors import DecodeError, LabelsError, UsageError
from mmsearch.media.fingerprint import content_hash
from mmsearch.training.recipe import DataTable, HeldOutTable
from mmsearch.training.runs import State, remembered
from mmsearch.training.views import decode_picture, decoders, stamps
from mmsearch.types import Notify, OnProgress, Progress

_KNOWN = {"val": "val", "dev": "val", "valid": "val", "validation": "val", "test": "test"}
_RANK = {"train": 0, "val": 1, "test": 2}

Tokenize = Callable[[list[str]], torch.Tensor]


@dataclass(frozen=True)
class LabelledFiles:
    """A labelled set whose files were found."""

    name: str
    files: list[Path]
    images: list[LabelledImage]
    tokens: list[torch.Tensor]

    def only(self, rows: Sequence[int]) -> LabelledFiles:
        """Some of its pictures."""
        return replace(
            self,
            files=[self.files[row] for row in rows],
            images=[self.images[row] for row in rows],
            tokens=[self.tokens[row] for row in rows],
        )


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
    if told := labelled.told():
        notify(told)
    if isinstance(table, HeldOutTable):
        chosen = list(labelled.of_split(table.split))
        wanted = table.split
    else:
        wanted = ", ".join(table.splits)
        splits = [name.lower() for name in table.splits]
        chosen = [
            image for image in labelled.images
            if (image.split in splits if splits else known_split(image.split) == "train")
        ]  # fmt: skip
    chosen = [image for image in chosen if image.captions]
    if not chosen:
        raise UsageError(f"{labels}: no captioned picture in the split '{wanted}'")
    images = data / table.images if table.images else find_images(labels, chosen)
    files = [images / image.file for image in chosen]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise LabelsError(f"{missing}: named in {labels}, but not there")
    name = (table.name if isinstance(table, DataTable) else "") or labelled.name
    chosen = merge_copies(images, chosen, lambda text: notify(f"{name}: {text}"))
    files = [images / image.file for image in chosen]
    bad = unusable(files, cache, f"looking through {name}", on_progress)
    if len(bad) == len(files):
        raise LabelsError(f"{images}: none of the {len(files)} pictures of {labels} is usable")
    if bad:
        first = ", ".join(chosen[row].file for row in sorted(bad)[:5])
        notify(f"{name}: damaged pictures are left out ({len(bad)}): "
               f"{first}")  # fmt: skip
    tokens = [tokenize(list(image.captions)) for image in chosen]
    found = LabelledFiles(name, files, chosen, tokens)
    return found.only([row for row in range(len(files)) if row not in bad])


def unusable(files: Sequence[Path], cache: Path, job: str, on_progress: OnProgress) -> set[int]:
    """The places of the pictures that are damaged; `cache` remembers what was looked at.

    Raises:
        LabelsError: a picture that cannot be read.
    """
    good: list[bool] = []
    with decoders().threads(available_cores()) as pool:

        def look(part: Sequence[Path], _start: int) -> State:
            found = pool.map(lambda file: picture_of(file, 1) is not None, part)
            return {"good": torch.tensor(list(found), dtype=torch.uint8)}

        for looked in remembered(cache, "looked", files, lambda part, _: stamps(part), look):
            good += looked["good"].tolist()
            on_progress(Progress(job, len(good), len(files)))
    return {place for place, is_good in enumerate(good) if not is_good}


def picture_of(file: Path, side: int) -> Image.Image | None:
    """A labelled picture, at least twice `side` where it is that large; None: not to be used.

    Raises:
        LabelsError: it is there and cannot be read.
    """
    try:
        return decode_picture(file, side)
    except (DecodeError, FileNotFoundError):
        return None
    except OSError as error:  # permissions, a network disk: the file may be fine
        raise LabelsError(
            f"{file}: cannot be read: {error.strerror}; correct that, or leave it out of the labels"
        ) from error


def known_split(split: str) -> str:
    """What a split's name stands for: "train", "val" or "test"."""
    return _KNOWN.get(split.lower(), "train")


def merge_copies(
    folder: Path, images: Sequence[LabelledImage], notify: Notify
) -> list[LabelledImage]:
    """Makes copies of a picture one picture with all of their captions.

    Or it would be a false answer to its copy's captions, or be in two splits: it is in the one
    that is held out furthest.
    """
    together: dict[int, list[LabelledImage]] = {}
    first = first_copies([folder / image.file for image in images])
    for image, place in zip(images, first, strict=True):
        together.setdefault(place, []).append(image)
    if len(together) < len(images):
        some = next(copies for copies in together.values() if len(copies) > 1)
        notify(f"{len(images) - len(together)} pictures are listed twice or copies of others: "
               "their captions are taken for those of one picture (the first: "
               f"{some[1].file})")  # fmt: skip
    found = []
    for copies in together.values():
        captions = dict.fromkeys(text for image in copies for text in image.captions)
        held = max((image.split for image in copies), key=lambda split: _RANK[known_split(split)])
        found.append(replace(copies[0], captions=tuple(captions), split=held))
    return found


def keep_apart(
    sets: Sequence[LabelledFiles], held_out: LabelledFiles | None, notify: Notify
) -> list[LabelledFiles]:
    """Keeps what is measured on out of what is trained on.

    A file that is in both is a mistake in the recipe; another file with the same picture is
    left out of the learning, and told.

    Raises:
        UsageError: a file is in both.
    """
    if held_out is None:
        return list(sets)
    measured = {file.resolve() for file in held_out.files}
    found = []
    for one in sets:
        both = [file for file in one.files if file.resolve() in measured]
        if both:
            raise UsageError(
                f"{one.name}: {len(both)} of its pictures are in a split that is measured on "
                f"({both[0]} is the first); name other splits, or list each picture in one"
            )
        first = first_copies([*held_out.files, *one.files])[len(held_out.files) :]
        rows = [row for row, place in enumerate(first) if place >= len(held_out.files)]
        if len(rows) < len(one.files):
            gone = next(one.files[row] for row in range(len(first)) if row not in set(rows))
            notify(
                f"{one.name}: {len(one.files) - len(rows)} of its pictures are left out: a "
                f"split that is measured on holds copies of them ({gone} is the first)"
            )
        found.append(one.only(rows) if len(rows) < len(one.files) else one)
    return found


def first_copies(files: Sequence[Path]) -> list[int]:
    """For each file the place of the first with the same content: its own where there is none."""
    found = list(range(len(files)))
    of_size: dict[int, list[int]] = {}
    for place, file in enumerate(files):
        with suppress(OSError):
            of_size.setdefault(file.stat().st_size, []).append(place)
    for places in of_size.values():
        if len(places) == 1:  # nothing can be the same: need not be read
            continue
        first: dict[bytes, int] = {}
        for place in places:
            with suppress(OSError):
                found[place] = first.setdefault(content_hash(files[place].read_bytes()), place)
    return found

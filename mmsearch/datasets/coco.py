"""COCO's `captions_*.json`: images and annotations in two lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmsearch.datasets.labelled import LabelledImage, LabelledSet


def matches(document: Any) -> bool:
    """Whether a parsed JSON document has this format."""
    return (
        isinstance(document, dict)
        and isinstance(document.get("images"), list)
        and isinstance(document.get("annotations"), list)
    )


def read(document: Any, path: Path) -> LabelledSet:
    """The labelled set of a parsed document; `path` names it in errors.

    Raises:
        LabelsError: nothing in it can be used.
    """
    return LabelledSet.gathered(path.stem, _entries(document, path), path)


def _entries(document: Any, path: Path) -> Iterator[LabelledImage | str]:
    captions: dict[str, list[str]] = {}
    for place, annotation in enumerate(document["annotations"]):
        text, number = _field(annotation, "caption"), _id(_field(annotation, "image_id"))
        if isinstance(text, str) and number is not None:
            captions.setdefault(number, []).append(text)
        else:
            yield f"{path}: annotation {place} has no 'image_id' or no 'caption' text"
    names: dict[tuple[str, str], None] = {}
    for place, image in enumerate(document["images"]):
        name, number = _field(image, "file_name"), _id(_field(image, "id"))
        if isinstance(name, str) and number is not None:
            names[name, number] = None  # an image may be listed for each of its captions
        else:
            yield f"{path}: image {place} has no 'id' or no 'file_name'"
    known = {number for _, number in names}
    for number in captions:
        if number not in known:
            yield f"{path}: captions of image_id {number}, which is no image"
    for name, number in names:
        yield LabelledImage(name, tuple(captions.get(number, ())))


def _field(row: Any, name: str) -> Any:
    return row.get(name) if isinstance(row, dict) else None


def _id(value: Any) -> str | None:
    """An id as text: 1 and "1" are the same image, whichever a program wrote."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_id = isinstance(value, int | str) and not isinstance(value, bool)
    return str(value).strip() if is_id else None

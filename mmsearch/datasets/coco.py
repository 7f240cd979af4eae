"""COCO's `captions_*.json`: images and annotations in two lists."""

from __future__ import annotations

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
    remarks: list[str] = []
    captions: dict[str, list[str]] = {}
    for place, annotation in enumerate(document["annotations"]):
        text = _field(annotation, "caption")
        number = _id(_field(annotation, "image_id"))
        if not isinstance(text, str) or number is None:
            remarks.append(f"{path}: annotation {place} has no 'image_id' or no 'caption' text")
            continue
        captions.setdefault(number, []).append(text)
    names: dict[tuple[str, str], None] = {}
    for place, image in enumerate(document["images"]):
        name, number = _field(image, "file_name"), _id(_field(image, "id"))
        if not isinstance(name, str) or number is None:
            remarks.append(f"{path}: image {place} has no 'id' or no 'file_name'")
            continue
        names[name, number] = None  # an image may be listed for each of its captions
    known = {number for _, number in names}
    remarks += [
        f"{path}: captions of image_id {number}, which is no image"
        for number in captions
        if number not in known
    ]
    images = (LabelledImage(name, tuple(captions.get(number, ()))) for name, number in names)
    return LabelledSet.gathered(path.stem, images, remarks, path)


def _field(row: Any, name: str) -> Any:
    return row.get(name) if isinstance(row, dict) else None


def _id(value: Any) -> str | None:
    """An id as text: 1 and "1" are the same image, whichever a program wrote."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_id = isinstance(value, int | str) and not isinstance(value, bool)
    return str(value).strip() if is_id else None

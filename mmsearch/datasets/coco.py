"""COCO's `captions_*.json`: images and annotations in two lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.errors import LabelsError


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
        LabelsError: an image or an annotation lacks a field.
    """
    captions: dict[Any, list[str]] = {}
    place = 0
    try:
        for place, annotation in enumerate(document["annotations"]):  # noqa: B007 - for the error
            text = annotation["caption"]
            if not isinstance(text, str):
                raise TypeError
            captions.setdefault(annotation["image_id"], []).append(text)
    except (KeyError, TypeError) as error:
        raise LabelsError(
            f"{path}: annotation {place} has no 'image_id' or no 'caption' text"
        ) from error
    images = []
    try:
        for place, image in enumerate(document["images"]):  # noqa: B007 - for the error
            name = image["file_name"]
            if not isinstance(name, str):
                raise TypeError
            images.append(LabelledImage(name, tuple(captions.get(image["id"], ()))))
    except (KeyError, TypeError) as error:
        raise LabelsError(f"{path}: image {place} has no 'id' or no 'file_name'") from error
    return LabelledSet(path.stem, tuple(images))

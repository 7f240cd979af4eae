"""Karpathy's `dataset_*.json` (Flickr8k, Flickr30k, COCO): captions and splits in one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmsearch.datasets.labelled import LabelledImage, LabelledSet


def matches(document: Any) -> bool:
    """Whether a parsed JSON document has this format."""
    images = document.get("images") if isinstance(document, dict) else None
    return isinstance(images, list) and any(
        isinstance(image, dict) and "sentences" in image for image in images
    )


def read(document: Any, path: Path) -> LabelledSet:
    """The labelled set of a parsed document; `path` names it in errors.

    Raises:
        LabelsError: nothing in it can be used.
    """

    def entries() -> Iterator[LabelledImage | str]:
        for place, image in enumerate(document["images"]):
            try:
                folder, name = image.get("filepath", ""), image["filename"]
                captions = tuple(sentence["raw"] for sentence in image["sentences"])
                if not isinstance(name, str) or not all(isinstance(text, str) for text in captions):
                    raise TypeError
            except (KeyError, TypeError, AttributeError):
                yield f"{path}: image {place} has no 'filename' or no 'sentences' with 'raw' text"
            else:
                file = f"{folder}/{name}" if folder else name
                yield LabelledImage(file, captions, str(image.get("split", "")))

    name = document.get("dataset")
    return LabelledSet.gathered(
        name if isinstance(name, str) and name else path.stem, entries(), path
    )

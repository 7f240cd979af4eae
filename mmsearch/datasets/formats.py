"""Reads a labelled set, whatever its format."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mmsearch.datasets import coco, karpathy, tables
from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.datasets.sidecar import read_sidecar
from mmsearch.errors import LabelsError
from mmsearch.media.discover import is_image_name, sidecar_path

_IN_FOLDER = (
    "dataset*.json",
    "metadata.jsonl",
    "metadata.csv",
    "captions*.json",
    "captions.csv",
    "captions.txt",
    "*.token.txt",
    "*.token",
)


def read_labelled(path: Path) -> LabelledSet:
    """The labelled set in a file, or in a folder that holds such a file or sidecars.

    Formats: Karpathy's `dataset_*.json`, COCO's `captions_*.json`, Flickr token files,
    `image,caption` CSV, Hugging Face's `metadata.csv` and `metadata.jsonl`, and `name.txt`
    beside `name.jpg`.

    Raises:
        LabelsError: no such file, or none of these formats.
    """
    if path.is_dir():
        return _read_folder(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LabelsError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        raise LabelsError(f"{path}: cannot be read: {error.strerror}") from error
    if path.suffix == ".jsonl":
        return tables.read_jsonl(text, path)
    if path.suffix == ".json":
        return _read_json(text, path)
    if tables.is_token_file(text):
        return tables.read_tokens(text, path)
    return tables.read_csv(text, path)


def _read_json(text: str, path: Path) -> LabelledSet:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LabelsError(f"{path}: not valid JSON: {error}") from error
    if karpathy.matches(document):
        return karpathy.read(document, path)
    if coco.matches(document):
        return coco.read(document, path)
    raise LabelsError(f"{path}: neither Karpathy's nor COCO's caption format")


def _read_folder(folder: Path) -> LabelledSet:
    for pattern in _IN_FOLDER:
        for path in sorted(folder.glob(pattern)):
            return read_labelled(path)
    images = []
    for top, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            image = os.fsencode(os.path.join(top, name))
            if is_image_name(image) and os.path.isfile(sidecar_path(image)):
                file = Path(top, name).relative_to(folder).as_posix()
                images.append(LabelledImage(file, read_sidecar(sidecar_path(image))))
    if not images:
        raise LabelsError(
            f"{folder}: no captions there (dataset_*.json, captions_*.json, metadata.csv, "
            "captions.txt, or name.txt beside name.jpg); name the captions file itself"
        )
    return LabelledSet(folder.resolve().name, tuple(images))


def find_images(labels: Path, images: list[LabelledImage]) -> Path:
    """The folder that the file names of a labelled set are relative to.

    Tried are the folder of the labels, the usual folders in it, and those beside it.

    Raises:
        LabelsError: the first images are in none of them.
    """
    top = labels if labels.is_dir() else labels.parent
    names = ("", "images", "Images", "img", "photos", "Flicker8k_Dataset", "Flickr8k_Dataset",
             "flickr30k-images", "val2014", "val2017", "train2014", "train2017")  # fmt: skip
    sample = images[:50]
    for base in (top, top.parent):
        for name in names:
            if any((base / name / image.file).is_file() for image in sample):
                return base / name
    raise LabelsError(f"{top}: the images are not beside the captions; say where with --images DIR")

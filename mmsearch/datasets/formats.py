"""Reads a labelled set, whatever its format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mmsearch.datasets import coco, karpathy, tables
from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.datasets.matching import Files
from mmsearch.datasets.sidecar import NOT_TEXT, decode_text, read_sidecar
from mmsearch.errors import LabelsError
from mmsearch.media.discover import FoundFile, sidecar_path, walk
from mmsearch.media.media_types import is_image_name
from mmsearch.types import Notify

_IN_FOLDER = (
    "dataset*.json",
    "metadata.jsonl",
    "metadata.csv",
    "captions*.json",
    "captions.csv",
    "captions.tsv",
    "captions.txt",
    "*.token.txt",
    "*.token",
)
#: What Hugging Face's library writes beside them.
_NO_LABELS = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json")


def read_labelled(path: Path, notify: Notify = lambda text: None) -> LabelledSet:
    """The labelled set in a file, or in a folder that holds such a file or sidecars.

    Formats: Karpathy's `dataset_*.json`, COCO's `captions_*.json`, Flickr token files,
    `image,caption` CSV, Hugging Face's `metadata.csv` and `metadata.jsonl`, and `name.txt`
    beside `name.jpg`.

    Args:
        notify: is told in one line of captions that cannot be used.

    Raises:
        LabelsError: no such file, or none of these formats.
    """
    found = _read_folder(path) if path.is_dir() else _read_file(path)
    if found.remarks:
        more = f" (and {len(found.remarks) - 1} more)" if len(found.remarks) > 1 else ""
        notify(f"not all of the captions could be used: {found.remarks[0]}{more}")
    return found


def _read_file(path: Path) -> LabelledSet:
    try:
        text = decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise LabelsError(
            f"{path}: not a text file in UTF-8 (byte {error.start}: {error.reason}); correct that "
            "byte, or if all of it is in another encoding, convert it: iconv -f WINDOWS-1252 -t "
            "UTF-8 FILE > NEW"
        ) from error
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


def has_labels(folder: Path) -> bool:
    """Whether a folder holds a captions file, or captions beside pictures."""
    named = any(
        path.name not in _NO_LABELS for pattern in _IN_FOLDER for path in folder.glob(pattern)
    )
    return named or next(_sidecars(folder), None) is not None


def _read_folder(folder: Path) -> LabelledSet:
    others: list[str] = []
    found = (path for pattern in _IN_FOLDER for path in sorted(folder.glob(pattern)))
    for path in (path for path in found if path.name not in _NO_LABELS):
        try:
            labelled = _read_file(path)
        except LabelsError as error:
            if path.suffix != ".json":
                raise
            others.append(str(error))  # what else may be called captions.json
        else:
            return replace(labelled, remarks=(*others, *labelled.remarks))
    sidecars = list(_sidecars(folder))
    if sidecars:
        return LabelledSet.gathered(folder.resolve().name, [*others, *sidecars], folder)
    raise LabelsError(
        others[0]
        if others
        else f"{folder}: no captions there (dataset_*.json, captions_*.json, metadata.csv, "
        "captions.txt, or name.txt beside name.jpg); name the captions file itself"
    )


def _sidecars(folder: Path) -> Iterator[LabelledImage | str]:
    """The captions beside pictures, and remarks on those that are no text."""
    for top, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            image = os.fsencode(os.path.join(top, name))
            if is_image_name(image) and os.path.isfile(sidecar_path(image)):
                file = Path(top, name).relative_to(folder).as_posix()
                try:
                    yield LabelledImage(file, read_sidecar(sidecar_path(image)))
                except UnicodeDecodeError:
                    yield f"{os.fsdecode(sidecar_path(image))}: {NOT_TEXT}"


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
    for folder in (base / name for base in (top, top.parent) for name in names):
        if any((folder / image.file).is_file() for image in sample):
            return folder
    # Named in another way than the files are, or without their folders.
    walked = (one for one in walk(os.fsencode(top.absolute())) if isinstance(one, FoundFile))
    files = Files((one.path, one.path, one.path) for one in walked)
    if any(file is not None for file in files.of(sample, ())):
        return top
    raise LabelsError(
        f"{labels}: its images are not beside it, or several have their names; say where with "
        "--images DIR"
    )

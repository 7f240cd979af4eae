"""Labelled sets with the pictures inside: WebDataset's tars, and Parquet files with pictures.

They are unpacked once, into a folder that every other reader takes: the pictures, and a
`metadata.jsonl` with captions and splits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from mmsearch.datasets.formats import has_labels
from mmsearch.errors import LabelsError, extra, in_a_line
from mmsearch.media.media_types import is_image_name

_TAR, _PARQUET = ".tar", ".parquet"
_LABELS = "metadata.jsonl"
_TEXTS = (".txt", ".caption", ".text")
_IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png")
_CAPTION_COLUMN = re.compile(r"(caption|text|sentence|description|label|alt_text)s?(_?\d+)?")
_SPLIT_OF_FILE = re.compile(r"(train|test|val|validation|dev)(?![A-Za-z])")
_MOST = 2**30  # bytes of a member: a sparse one takes no room in the archive
_MOST_TEXT = 2**20
#: By its first bytes what a picture without a name is called.
_SUFFIXES = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"RIFF", ".webp"),
             (b"BM", ".bmp"), (b"II*\0", ".tif"), (b"MM\0*", ".tif"))  # fmt: skip


@dataclass
class _Example:
    """A picture with what is said of it."""

    name: str
    """For its file: any text."""
    content: bytes | None = None
    captions: list[str] = field(default_factory=list)
    described: list[str] = field(default_factory=list)
    """Captions in its JSON: often those that it has as a text, too."""
    split: str = ""


def shards_of(path: Path) -> list[Path]:
    """The files of a set that has its pictures inside; none where it is of another kind.

    Args:
        path: one of them, or a folder that holds them (in it, or in its folder `data`), and no
            labels beside them.
    """
    if path.is_file():
        return [path] if path.suffix in (_TAR, _PARQUET) else []
    for folder in (path, path / "data"):
        for suffix in (_TAR, _PARQUET):
            found = sorted(folder.glob(f"[!.]*{suffix}"))  # macOS leaves "._name" beside files
            if found:
                return [] if has_labels(path) else found
    return []


def unpacked(path: Path, cache: Path) -> Path:
    """The folder that a set with pictures inside was unpacked into, below `cache`.

    It is unpacked where that was not done, or its files have changed. Other sets stay where they
    are: their own path is returned.

    Raises:
        LabelsError: a file that is damaged, or without pictures that have captions.
    """
    shards = shards_of(path)
    if not shards:
        return path
    stamps = [[os.path.realpath(one), one.stat().st_size, one.stat().st_mtime_ns] for one in shards]
    key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]
    # The folder's name is the set's.
    target = cache / "sets" / key / (path.stem if path.is_file() else path.resolve().name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / "lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                draft = Path(scratch) / target.name
                draft.mkdir()
                _write(_examples(shards), draft, path)
                os.replace(draft, target)
    return target


def _write(examples: Iterable[_Example], folder: Path, source: Path) -> None:
    """Writes pictures and captions; a picture without captions is in the gallery."""
    count = 0
    with (folder / _LABELS).open("w", encoding="utf-8") as labels:
        for number, example in enumerate(examples):
            if example.content is None:
                continue
            captions = example.captions or example.described
            # Numbers before names that strangers chose: no two are one, and none leads elsewhere.
            name = re.sub(r"[^\w.-]+", "_", example.name)[-80:].lstrip(".") or "picture"
            if not is_image_name(os.fsencode(name)):
                name += _suffix(example.content)
            file = f"{number:06d}-{name}"
            (folder / file).write_bytes(example.content)
            row = {"file_name": file, "caption": captions, "split": example.split}
            labels.write(json.dumps(row) + "\n")
            count += bool(captions)
    if not count:
        raise LabelsError(f"{source}: holds no picture with a caption")


def _suffix(content: bytes) -> str:
    return next((name for first, name in _SUFFIXES if content.startswith(first)), ".jpg")


def _examples(shards: list[Path]) -> Iterator[_Example]:
    for shard in shards:
        told = _SPLIT_OF_FILE.match(shard.name)
        split = told.group() if told else ""
        yield from (_of_tar if shard.suffix == _TAR else _of_parquet)(shard, split)


def _of_tar(path: Path, split: str) -> Iterator[_Example]:
    """The examples of a tar: members that follow each other and share what is before the dot."""
    current: _Example | None = None
    key = ""
    try:
        with tarfile.open(path, "r|") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                # Others are links and folders, or what macOS keeps beside each file.
                if not member.isfile() or file.startswith("._"):
                    continue
                if member.size > _MOST:
                    raise LabelsError(f"{path}: a member of {member.size} bytes is no picture")
                stem, dot, rest = file.partition(".")
                if current is None or key != f"{folder}/{stem}":
                    if current is not None:
                        yield current
                    key, current = f"{folder}/{stem}", _Example(stem, split=split)
                content = archive.extractfile(member)
                assert content is not None  # a regular file
                _take_member(current, (dot + rest).lower(), content)
    except (tarfile.TarError, EOFError) as error:
        raise LabelsError(f"{path}: damaged, or no tar: {in_a_line(error)}") from error
    except OSError as error:
        raise LabelsError(f"{path}: cannot be read: {error.strerror or error}") from error
    if current is not None:
        yield current


def _take_member(example: _Example, suffix: str, content: IO[bytes]) -> None:
    # What follows the first picture ("seg.png", "left.png") is something else about it.
    if is_image_name(os.fsencode(f"x{suffix}")) and example.content is None:
        example.name += suffix
        example.content = content.read()
    elif suffix in _TEXTS:
        example.captions += content.read(_MOST_TEXT).decode("utf-8", "replace").splitlines()
    elif suffix == ".json":
        try:
            stored = json.loads(content.read(_MOST_TEXT))
        except (ValueError, RecursionError):
            return
        if isinstance(stored, dict):
            for name, value in stored.items():
                if _CAPTION_COLUMN.fullmatch(name.lower()):
                    example.described += _texts(value)


def _of_parquet(path: Path, split: str) -> Iterator[_Example]:
    """The rows of a Parquet file: a picture's bytes in one column, captions in one or several."""
    with extra("exchange", f"reading {path.name}"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        image = next((name for name in _IMAGE_COLUMNS if name in names), None)
        captions = [name for name in names if _CAPTION_COLUMN.fullmatch(name.lower())]
        if image is None or not captions:
            raise LabelsError(
                f"{path}: has columns {', '.join(names[:12])}; wanted are pictures in one called "
                f"{', '.join(_IMAGE_COLUMNS)}, and captions in 'caption' or 'text'"
            )
        columns = [image, *captions, *(["split"] if "split" in names else [])]
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                number += 1
                name, content = _picture(row[image])
                texts = [text for column in captions for text in _texts(row[column])]
                own = str(row.get("split") or split)
                yield _Example(name or f"{number}", content, texts, split=own)
    except (pa.ArrowException, OSError) as error:
        raise LabelsError(f"{path}: damaged, or no Parquet file: {in_a_line(error)}") from error


def _picture(value: Any) -> tuple[str, bytes | None]:
    """The name and the bytes of a picture: Hugging Face's struct of both, or the bytes alone."""
    if isinstance(value, dict):
        content = value.get("bytes")
        name = os.path.basename(str(value.get("path") or ""))
        return name, content if isinstance(content, bytes) else None
    return "", value if isinstance(value, bytes) else None


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        return [text for one in value for text in _texts(one)]
    return []

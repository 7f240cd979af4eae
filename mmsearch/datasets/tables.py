"""Captions in rows: Flickr token files, `image,caption` CSV and Hugging Face's metadata files."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.errors import LabelsError

#: `1000268201.jpg#0<TAB>A child in a pink dress .`
_TOKEN_LINE = re.compile(r"^(?P<file>.+)#\d+\t(?P<caption>.*)$")
_FILE_COLUMNS = ("file_name", "image", "image_name", "filename", "file", "path", "filepath")
_CAPTION_COLUMNS = ("caption", "text", "captions", "comment", "caption_text", "description")
_SPLIT_COLUMNS = ("split",)


def is_token_file(text: str) -> bool:
    """Whether the first line that is not empty is one of a Flickr token file."""
    first = next((line for line in lines_of(text) if line.strip()), "")
    return bool(_TOKEN_LINE.match(first))


def read_tokens(text: str, path: Path) -> LabelledSet:
    """Flickr's token file: a caption a line, numbered within its image.

    Raises:
        LabelsError: a line has another form.
    """

    def rows() -> Iterator[tuple[str, str, str]]:
        for number, line in enumerate(lines_of(text), 1):
            if line.strip():
                match = _TOKEN_LINE.match(line)
                if match is None:
                    raise LabelsError(f"{path}:{number}: not 'image.jpg#0<TAB>caption'")
                yield match["file"], match["caption"], ""

    return _gathered(rows(), path)


def read_csv(text: str, path: Path) -> LabelledSet:
    """A table with an image column and a caption column, separated by commas, tabs or bars.

    Captions with commas may be quoted; where they are not, and the caption column is the last,
    what is left of the line is the caption.

    Raises:
        LabelsError: no such columns, or a row without them.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = lines_of(text)
    if not text.strip():
        raise LabelsError(f"{path}: the file is empty")
    delimiter = max("\t|,", key=lines[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        head = [name.strip().lower() for name in next(reader)]
        file_at, caption_at = _column(head, _FILE_COLUMNS), _column(head, _CAPTION_COLUMNS)
        split_at = _column(head, _SPLIT_COLUMNS)
        if file_at is None or caption_at is None:
            raise LabelsError(
                f"{path}: the first line names no image column ({', '.join(_FILE_COLUMNS[:4])}) "
                f"or no caption column ({', '.join(_CAPTION_COLUMNS[:3])})"
            )

        def rows() -> Iterator[tuple[str, str, str]]:
            for row in reader:
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) <= max(file_at, caption_at):
                    raise LabelsError(
                        f"{path}:{reader.line_num}: fewer columns than the first line"
                    )
                last = caption_at == len(head) - 1
                caption = delimiter.join(row[caption_at:]) if last else row[caption_at]
                split = row[split_at] if split_at is not None and split_at < len(row) else ""
                yield row[file_at].strip(), caption.strip(), split.strip()

        return _gathered(rows(), path)
    except csv.Error as error:
        raise LabelsError(f"{path}:{reader.line_num}: {error}") from error


def read_jsonl(text: str, path: Path) -> LabelledSet:
    """Hugging Face's `metadata.jsonl`: an object a line with `file_name` and a caption.

    Raises:
        LabelsError: a line is no such object.
    """

    def rows() -> Iterator[tuple[str, str, str]]:
        for number, line in enumerate(lines_of(text), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                file = next(row[name] for name in _FILE_COLUMNS if name in row)
                found = next(row[name] for name in _CAPTION_COLUMNS if name in row)
                texts = found if isinstance(found, list) else [found]
                if not isinstance(file, str) or not all(isinstance(text, str) for text in texts):
                    raise TypeError
            except (ValueError, TypeError, StopIteration, RecursionError) as error:
                raise LabelsError(
                    f"{path}:{number}: not an object with 'file_name' and 'caption' or 'text'"
                ) from error
            for caption in texts:
                yield file, caption, str(row.get("split", ""))

    return _gathered(rows(), path)


def lines_of(text: str) -> list[str]:
    """The lines between newlines alone: `str.splitlines` also splits where captions may not be."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _column(head: list[str], names: Iterable[str]) -> int | None:
    return next((head.index(name) for name in names if name in head), None)


def _gathered(rows: Iterable[tuple[str, str, str]], path: Path) -> LabelledSet:
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for name, caption, split in rows:
        file = posixpath.normpath(name)  # one picture, whether it is called a.jpg or ./a.jpg
        captions.setdefault(file, []).append(caption)
        if splits.setdefault(file, split) != split:
            raise LabelsError(f"{path}: {file} is in two splits, '{splits[file]}' and '{split}'")
    images = tuple(
        LabelledImage(file, tuple(texts), splits[file]) for file, texts in captions.items()
    )
    name = path.parent.name if path.stem in ("metadata", "captions") else path.stem
    return LabelledSet(name, images)

"""Captions in rows: Flickr token files, `image,caption` CSV and Hugging Face's metadata files."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.errors import LabelsError
from mmsearch.media.media_types import is_image_name

#: `1000268201.jpg#0<TAB>A child in a pink dress .`
_TOKEN_LINE = re.compile(r"^(?P<file>.+)#\d+\t(?P<caption>.*)$")
_FILE_COLUMNS = ("file_name", "image", "image_name", "filename", "file", "path", "filepath")
_CAPTION_COLUMNS = ("caption", "text", "captions", "comment", "caption_text", "description")
_SPLIT_COLUMNS = ("split",)
_DELIMITERS = "\t|,;"
#: No caption goes over more lines.
_MOST_LINES = 100


def is_token_file(text: str) -> bool:
    """Whether the first line that is not empty is one of a Flickr token file."""
    _, first = next(_numbered(text), (0, ""))
    return bool(_TOKEN_LINE.match(first))


def read_tokens(text: str, path: Path) -> LabelledSet:
    """Flickr's token file: a caption a line, numbered within its image.

    Raises:
        LabelsError: no line has that form.
    """

    def entries() -> Iterator[LabelledImage | str]:
        for number, line in _numbered(text):
            if match := _TOKEN_LINE.match(line):
                yield LabelledImage(match["file"], (match["caption"],))
            else:
                yield f"{path}:{number}: not 'image.jpg#0<TAB>caption'"

    return LabelledSet.gathered(_name_of(path), entries(), path)


def read_csv(text: str, path: Path) -> LabelledSet:
    """A table with an image and a caption column, separated by commas, semicolons, tabs or bars.

    Where the first line is no header but begins with a picture's name, the first column names
    pictures and the next one (but for a caption's number) is the caption. Captions with commas may
    be quoted; where they are not, and the caption column is the last, what is left of the line is
    the caption. A quote that encloses no whole field is a character like any other.

    Raises:
        LabelsError: no such columns, no row that can be used, or a quote that is never closed.
    """
    _, first = next(_numbered(text), (0, ""))
    if not first:
        raise LabelsError(f"{path}: the file is empty")
    quoting = _Quoting(_delimiter_of(first))
    rows = _rows(lines_of(text), quoting, path)
    beginning = next(rows)
    head = quoting.cells(beginning[1])
    names = [name.strip().lower() for name in head]
    file_at, caption_at, split_at = (
        _column(names, known) for known in (_FILE_COLUMNS, _CAPTION_COLUMNS, _SPLIT_COLUMNS)
    )
    if file_at is None or caption_at is None:
        if len(head) < 2 or not is_image_name(os.fsencode(head[0].strip())):
            raise LabelsError(
                f"{path}: the first line names no image column ({', '.join(_FILE_COLUMNS[:4])}) "
                f"or no caption column ({', '.join(_CAPTION_COLUMNS[:3])})"
            )
        split_at, file_at = None, 0
        caption_at = 2 if len(head) > 2 and head[1].strip().isdigit() else 1
        head = head[: caption_at + 1]
        rows = itertools.chain([beginning], rows)
    most = len(head) if caption_at == len(head) - 1 else None

    def entries() -> Iterator[LabelledImage | str]:
        for number, line in rows:
            row = quoting.cells(line, most)
            if len(row) <= max(file_at, caption_at):
                yield f"{path}:{number}: fewer columns than the first line"
            elif most is None and any(cell.strip() for cell in row[len(head) :]):
                yield (
                    f"{path}:{number}: more columns than the first line (a caption with a "
                    f"'{quoting.delimiter}' has to be quoted)"
                )
            else:
                split = row[split_at] if split_at is not None and split_at < len(row) else ""
                yield LabelledImage(row[file_at].strip(), (row[caption_at].strip(),), split)

    return LabelledSet.gathered(_name_of(path), entries(), path)


def _delimiter_of(first: str) -> str:
    """What separates the columns: what makes sense of the first line, else what it has most of."""

    def sense(delimiter: str) -> tuple[bool, int]:
        cells = [cell.strip(' "').lower() for cell in first.split(delimiter)]
        is_head = _column(cells, _FILE_COLUMNS) is not None
        is_row = len(cells) > 1 and is_image_name(os.fsencode(cells[0]))
        return (is_head and _column(cells, _CAPTION_COLUMNS) is not None) or is_row, len(cells)

    return max(_DELIMITERS, key=sense)


class _Quoting:
    """How fields between a delimiter are quoted, by lines: none is looked at twice."""

    def __init__(self, delimiter: str) -> None:
        self.delimiter = delimiter
        mark, blank = re.escape(delimiter), r"[ ]*+"
        quoted = r'"(?:[^"]|"")*+'
        whole, bare = rf'{blank}{quoted}"{blank}(?={mark}|\Z)', rf'[^"{mark}][^{mark}]*+'
        field = f"(?:{whole}|{bare}|)"
        self.fields = re.compile(rf"(?:\A|{mark})(?:(?P<quoted>{whole})|(?P<plain>{bare}|))")
        self.closed = re.compile(rf"{field}(?:{mark}{field})*+")
        """A line whose quotes are all closed."""
        self.open = re.compile(rf"(?:{field}{mark})*+{blank}{quoted}")
        """A line whose last field begins with a quote and goes on."""
        rest = rf'(?:[^"]|"")*+"{blank}(?={mark}|\Z)'
        self.inner = re.compile(r'(?:[^"]|"")*+')
        """A line within such a field."""
        self.end = re.compile(rf"{rest}(?:{mark}{field})*+")
        """The line in which it ends."""
        self.next = re.compile(rf"{rest}{mark}(?:{field}{mark})*+{blank}{quoted}")
        """The same, and another begins."""

    def cells(self, row: str, most: int | None = None) -> list[str]:
        """The fields of a row; Python's own reader limits their length.

        Where there are more than `most`, the last of them is the rest of the row as it is written.
        """
        if not ('"' in row and self.closed.fullmatch(row)):
            return row.split(self.delimiter, -1 if most is None else most - 1)
        matches = list(self.fields.finditer(row))
        found = [
            match["plain"] or (match["quoted"] or "").strip(" ")[1:-1].replace('""', '"')
            for match in matches
        ]
        if most is not None and any(found[most:]):
            return [*found[: most - 1], row[matches[most - 1].start() + 1 :]]
        return found


def _rows(lines: Sequence[str], quoting: _Quoting, path: Path) -> Iterator[tuple[int, str]]:
    """The rows of a table, with the numbers of their first lines.

    Raises:
        LabelsError: a quoted field of a CSV never ends. Where the next row begins is not to be
            known then. (Between tabs and bars a lone quote is a character like any other.)
    """
    place = 0
    while place < len(lines):
        line, end = lines[place], place + 1
        if '"' in line and quoting.open.fullmatch(line) and not quoting.closed.fullmatch(line):
            end = _end_of_field(lines, end, quoting)
            if end == place + 1 and quoting.delimiter in ",;":
                raise LabelsError(
                    f"{path}:{end}: a field begins with a quote that is never closed; close it, "
                    'or write the quote twice within quotes ("")'
                )
        if line.strip():
            yield place + 1, "\n".join(lines[place:end])
        place = end


def _end_of_field(lines: Sequence[str], start: int, quoting: _Quoting) -> int:
    """Where the row ends whose quoted field goes on at `start`; `start` where it never ends."""
    for place, line in enumerate(lines[start : start + _MOST_LINES], start):
        if _is_a_row(line, quoting.delimiter):
            break
        if quoting.end.fullmatch(line):
            return place + 1
        if not (quoting.inner.fullmatch(line) or quoting.next.fullmatch(line)):
            break
    return start


def _is_a_row(line: str, delimiter: str) -> bool:
    """Whether a line looks like a row of its own rather than the rest of a caption."""
    first, *others = line.split(delimiter)
    cells = [first] if delimiter in ",;" else [first, *others]  # captions have few tabs and bars
    return bool(others) and any(is_image_name(os.fsencode(cell.strip(' "'))) for cell in cells)


def read_jsonl(text: str, path: Path) -> LabelledSet:
    """Hugging Face's `metadata.jsonl`: an object a line with `file_name` and a caption.

    Raises:
        LabelsError: no line is such an object.
    """

    def entries() -> Iterator[LabelledImage | str]:
        for number, line in _numbered(text):
            try:
                row = json.loads(line)
                file = next(row[name] for name in _FILE_COLUMNS if name in row)
                found = next(row[name] for name in _CAPTION_COLUMNS if name in row)
                texts = found if isinstance(found, list) else [found]
                if not isinstance(file, str) or not all(isinstance(text, str) for text in texts):
                    raise TypeError
            except (ValueError, TypeError, StopIteration, RecursionError):
                yield f"{path}:{number}: not an object with 'file_name' and 'caption' or 'text'"
            else:
                yield LabelledImage(file, tuple(texts), str(row.get("split", "")))

    return LabelledSet.gathered(_name_of(path), entries(), path)


def lines_of(text: str) -> list[str]:
    """The lines between newlines alone: `str.splitlines` also splits where captions may not be."""
    if "\n" not in text:  # as old Macs end lines
        text = text.replace("\r", "\n")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    return ((number, line) for number, line in enumerate(lines_of(text), 1) if line.strip())


def _column(head: list[str], names: Iterable[str]) -> int | None:
    return next((head.index(name) for name in names if name in head), None)


def _name_of(path: Path) -> str:
    return path.parent.name if path.stem in ("metadata", "captions") else path.stem

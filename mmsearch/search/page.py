"""A self-contained HTML page of queries beside the pictures they found."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from mmsearch.config import available_cores
from mmsearch.media.sandbox import Decoders
from mmsearch.types import Hit, Pixels

THUMBNAIL_SIDE = 240


@dataclass(frozen=True)
class Tile:
    """One picture with a line or two below it. `mark` is whether it is a true answer."""

    path: Path
    label: str = ""
    note: str = ""
    mark: bool | None = None

    @property
    def link(self) -> str:
        """Where the picture itself lies, as a file: URI."""
        return self.path.absolute().as_uri()


@dataclass(frozen=True)
class Section:
    """A query (words, pictures, or both) and its answers."""

    title: str
    tiles: Sequence[Tile]
    note: str = ""
    examples: Sequence[Tile] = ()
    """The pictures that were searched with."""


@dataclass(frozen=True)
class Table:
    """A table of figures; the first column is a name, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tiles_of(hits: Sequence[Hit]) -> list[Tile]:
    """Hits as tiles: rank and score above, the caption or the file's name below."""
    return [
        Tile(hit.path, f"{hit.rank}. {hit.score:.3f}", hit.caption or hit.path.name) for hit in hits
    ]


def render_page(
    title: str, sections: Sequence[Section], *, intro: str = "", tables: Sequence[Table] = ()
) -> str:
    """The page as HTML; everything that comes from files or users is escaped."""
    environment = Environment(
        loader=PackageLoader("mmsearch.search", "."),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    tiles = (tile for section in sections for tile in (*section.tiles, *section.examples))
    paths = list({tile.path for tile in tiles})
    how = {"at_least": THUMBNAIL_SIDE // 2, "within": THUMBNAIL_SIDE}
    with Decoders() as decoders:
        pixels = decoders.pixels_of(map(os.fsencode, paths), how, available_cores())
    pictures = dict(zip(paths, map(_thumbnail, pixels), strict=True))
    return template.render(
        title=title, intro=intro, sections=sections, tables=tables, pictures=pictures
    )


def _thumbnail(pixels: Pixels | None) -> str:
    """A small JPEG as a data URI; "" where the file cannot be shown any more."""
    if pixels is None:
        return ""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")

"""`mmsearch demo`: the whole of it on a gallery that is drawn on the spot, or on your photos."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli.common import engine_for, print_table, printable, progress_bar, say, shown_path
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.engine import Engine
    from mmsearch.search.page import Section
    from mmsearch.types import Hit

SCENES, SEED = 168, 1
_ON_SCENES = (
    "a yellow taxi in the desert",
    "three blue birds flying",
    "a smiling person with glasses",
    "a red bus in the snow",
    "a sailing boat below the mountains",
    "two cats",
    "the city at night",
    "six purple squares",
)
_ON_PHOTOS = (
    "a dog running on grass",
    "children playing",
    "people at the beach",
    "a man on a bicycle",
    "mountains and snow",
    "a group of people in the street",
)


def demo(
    photos: Annotated[
        Path | None,
        typer.Argument(metavar="[PHOTOS]", help="Your own folder instead of the drawn gallery."),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option("--index", metavar="DIR", help="The demo's index, if not below --out."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where everything goes.")
    ] = Path("build/demo"),
) -> None:
    """Index a gallery with the bundled model, search it both ways, measure it, show a page."""
    if photos is not None:  # make's PHOTOS=~/Pictures comes unexpanded from some shells
        photos = Path(os.path.expanduser(photos))
        if not photos.is_dir():
            raise UsageError(f"{photos}: no such folder")
    out.mkdir(parents=True, exist_ok=True)
    folder = photos if photos is not None else _draw(out / "gallery")
    # Each folder has an index of its own: a demo shows what lies in the folder that was named.
    name = hashlib.sha256(str(folder.resolve()).encode("utf-8", "replace")).hexdigest()[:8]
    index = index or out / (f"photos-{name}" if photos is not None else "index")
    with engine_for(index, model="tiny") as engine, progress_bar() as bar:
        say(f"indexing {shown_path(folder)} with the bundled model")
        report = engine.index([folder], on_progress=bar)
        held = engine.status()
        print(
            f"{held.images} images, {held.captions} captions indexed "
            f"({report.added} new, {report.failed + report.known_bad} failed)\n"
        )
        if not held.images:
            raise UsageError(f"{folder}: no images there")
        sections = _searches(engine, _ON_PHOTOS if photos is not None else _ON_SCENES)
        page = out / (f"photos-{name}.html" if photos is not None else "contact-sheet.html")
        _finish(engine, sections, page, measured=photos is None)


def _draw(folder: Path) -> Path:
    """The gallery: pictures with their captions in name.txt, drawn where they are missing."""
    from mmsearch.datasets import scene_art, scenes

    folder.mkdir(parents=True, exist_ok=True)
    say(f"drawing {SCENES} scenes into {shown_path(folder)}")
    for number, scene in enumerate(scenes.gallery(SCENES, seed=SEED)):
        path = folder / f"{number:03d}-{scene.kind}.png"
        words, draft = path.with_suffix(".txt"), path.with_suffix(".new")
        if not words.exists():
            draft.write_text("\n".join(scenes.captions(scene)) + "\n", encoding="utf-8")
            draft.replace(words)
        if not path.exists():  # written aside first, so that a kill leaves no half picture
            scene_art.render(scene).save(draft, "PNG")
            draft.replace(path)
    return folder


def _searches(engine: Engine, texts: tuple[str, ...]) -> list[Section]:
    from mmsearch.search.page import Section, Tile, tiles_of

    sections = []
    for text in texts:
        hits = engine.search(text, k=5, fusion="image")  # by the picture alone, as it says
        _print(f"text -> image: {text}", hits)
        sections.append(Section(text, tiles_of(hits), "text -> image"))
    example = engine.search(texts[0], k=1)[0].path
    others = engine.search(image=example, k=6)[1:]  # the first is the picture itself
    alike = [replace(hit, rank=place) for place, hit in enumerate(others, 1)]
    shown = [Tile(example, "query", example.name)]
    _print(f"image -> image: like {shown_path(example)}", alike)
    sections.append(Section("Pictures like this one", tiles_of(alike), "image -> image", shown))
    told = engine.search(image=example, to="caption", k=5)
    if told:
        _print(f"image -> text: {shown_path(example)}", told)
        sections.append(Section("What this picture shows", tiles_of(told), "image -> text", shown))
    return sections


def _print(title: str, hits: list[Hit]) -> None:
    print(printable(title))
    rows = [
        [
            f"  {hit.rank}",
            f"{hit.score:.3f}",
            printable(hit.path.name),
            printable(hit.caption or ""),
        ]
        for hit in hits
    ]
    print_table(["  rank", "score", "file", ""], rows, right=2)
    print()


def _finish(engine: Engine, sections: list[Section], page: Path, *, measured: bool) -> None:
    from mmsearch.evaluation import retrieval as out
    from mmsearch.search.page import render_page

    tables, intro = [], "Queries beside what the bundled model finds for them."
    if measured:
        figures = engine.bench()
        print(out.to_text(figures))
        tables, intro = [out.table_of(figures)], f"{intro} {out.summary_of(figures)}."
    html = render_page("mmsearch demo", sections, intro=intro, tables=tables)
    page.write_text(html, encoding="utf-8", errors="replace")
    print(f"\nOpen {shown_path(page.absolute())} to see the queries beside their pictures.")
    program = shown_path(Path(sys.argv[0]).absolute())
    print(f"Ask something yourself: {program} search WORDS --index {shown_path(engine.folder)}")
    own = "~/Pictures" if measured else shlex.quote(shown_path(engine.status().roots[0]))
    print(f"Keep an index of your own: {program} index {own}, then {program} search WORDS")

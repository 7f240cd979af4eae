"""`mmsearch search`."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmsearch.cli.common import (
    ComposeOption,
    DeviceOption,
    FusionOption,
    IndexOption,
    LanguageOption,
    PrecisionOption,
    engine_for,
    one_of,
    print_table,
    printable,
    say,
    shown_path,
    write_page,
)
from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.engine import Engine
    from mmsearch.types import Hit, Query, Term

#: How much a --not term counts: by benchmarks/negation.py, more costs what is wanted itself.
NOT_WEIGHT = -0.25
#: What fused scores are made of, and how they are shown.
SHARES = {"image": "{:.3f}", "rerank": "{:.3f}", "caption": "{:.3f}", "words": "{:.1f}"}
_WEIGHTED = re.compile(r"(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)):(?P<rest>\S.*)", re.DOTALL)
_TOLD = 5  # unknown words of a query
_DATES = ("%Y-%m-%d", "%Y-%m", "%Y")


def search(
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="What to look for; several words are one text."),
    ] = None,
    index: IndexOption = None,
    and_: Annotated[
        list[str] | None,
        typer.Option(
            "--and",
            metavar="[W:]TEXT",
            help="Also this text; a weight may be negative. Repeatable.",
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="[W:]FILE", help="Pictures like this one. Repeatable."),
    ] = None,
    not_: Annotated[
        list[str] | None,
        typer.Option(
            "--not", metavar="TEXT", help="Not this text: --and with a weight of -0.25. Repeatable."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", metavar="N", help="How many hits.")] = 10,
    to: Annotated[
        str, typer.Option("--to", metavar="WHAT", help="What to find: image or caption.")
    ] = "image",
    under: Annotated[
        Path | None, typer.Option("--under", metavar="DIR", help="Only files below this folder.")
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(
            "--after",
            metavar="DATE",
            help="Taken on or after 2024, 2024-05 or 2024-05-31, by EXIF, else by the file's date.",
        ),
    ] = None,
    before: Annotated[
        str | None, typer.Option("--before", metavar="DATE", help="Taken before that date.")
    ] = None,
    fusion: FusionOption = "auto",
    compose: ComposeOption = "auto",
    rerank: Annotated[
        int,
        typer.Option(
            "--rerank",
            min=0,
            metavar="N",
            help="Score the first N images (at least -k) again, more closely, for better hits; "
            "fast if 'index --patches' has kept what it needs.",
        ),
    ] = 0,
    min_score: Annotated[
        float | None,
        typer.Option(
            "--min-score",
            metavar="X",
            help="Only hits with at least this cosine; --fusion auto then means image.",
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Compare with every vector. An index of 100,000 and more is otherwise searched "
            "through inverted lists: faster, and one of the best hits is missed now and then.",
        ),
    ] = False,
    literal: Annotated[
        bool, typer.Option("--literal", help="Take '16:9 photo' as text, not as a weight of 16.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a hit.")] = False,
    paths: Annotated[bool, typer.Option("--paths", help="Print only paths.")] = False,
    null: Annotated[bool, typer.Option("-0", help="Like --paths, each ended by a NUL.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page of thumbnails.")
    ] = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    language: LanguageOption = None,
) -> None:
    """Find images or captions by text, by example, or by several weighted terms at once."""
    from mmsearch.types import COMPOSES, FUSIONS, TARGETS, Filter, Query

    if sum((json_, paths, null)) > 1:
        raise UsageError("--json, --paths and -0 exclude each other")
    terms = _terms(" ".join(text or []), and_ or [], image or [], not_ or [], literal=literal)
    where = Filter(under, _date(after), _date(before))
    query = Query(
        tuple(terms), one_of("--to", to, TARGETS), k, where, min_score,
        one_of("--fusion", fusion, FUSIONS), one_of("--compose", compose, COMPOSES), rerank, exact,
    )  # fmt: skip
    with engine_for(index, device=device, precision=precision, language=language) as engine:
        hits = engine.search(query)
        if not hits:
            say(_why_nothing(engine, query))
        for line in _word_hints(engine, terms):
            say(line)
    if html is not None:
        _write_page(html, terms, hits)
    if json_:
        for hit in hits:
            document = {
                "rank": hit.rank,
                "score": round(hit.score, 6),
                "path": str(hit.path),
                "modality": hit.modality,
                "caption": hit.caption,
                "media_id": hit.media_id,
                "scores": {name: round(score, 6) for name, score in hit.scores.items()},
            }
            print(json.dumps(document))
    elif paths or null:
        end = b"\0" if null else b"\n"
        sys.stdout.buffer.write(b"".join(os.fsencode(hit.path) + end for hit in hits))
        sys.stdout.buffer.flush()
    elif hits:
        _print(hits)


def _terms(
    text: str, more: list[str], images: list[str], against: list[str], *, literal: bool
) -> list[Term]:
    from mmsearch.types import Term

    terms = []
    if text := text.strip():
        weight, rest = _weighted(text, literal=literal)
        if rest != text:
            say(f"'{printable(rest)}' counts {weight:g} times; --literal takes it all as text")
        terms.append(Term(text=rest, weight=weight))
    for part in more:
        weight, rest = _weighted(part, literal=literal)
        terms.append(Term(text=rest, weight=weight))
    for part in images:
        weight, rest = _weighted(part, literal=literal or Path(part).exists())
        terms.append(Term(image=rest, weight=weight))
    return terms + [Term(text=part, weight=NOT_WEIGHT) for part in against]


def _weighted(part: str, *, literal: bool) -> tuple[float, str]:
    match = None if literal else _WEIGHTED.fullmatch(part)
    return (float(match["weight"]), match["rest"]) if match else (1.0, part)


def _date(text: str | None) -> datetime | None:
    if text is None:
        return None
    for form in _DATES:
        with suppress(ValueError):
            return datetime.strptime(text, form)
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"'{text}' is no date; write it as 2024, 2024-05 or 2024-05-31") from error


def _why_nothing(engine: Engine, query: Query) -> str:
    held = engine.status()
    if not held.images:
        return "nothing found: the index is empty"
    if query.to == "caption" and not held.captions:
        return "nothing found: the index holds no captions (see 'mmsearch index --captions')"
    if query.filter:
        return "nothing found that --under, --after and --before let through"
    return "nothing found"


def _word_hints(engine: Engine, terms: list[Term]) -> list[str]:
    """What to say of words that the model has learned from no caption."""
    from mmsearch.encoders.registry import KNOWN, NOTHING_KNOWN

    texts = [term.text for term in terms if term.text is not None]
    foreign = [text for text in texts if not engine.reads(text)]
    unknown: dict[str, str | None] = {}
    for text in texts:
        if text not in foreign:
            unknown |= engine.unknown_words(text)
    if not foreign and not unknown:
        return []
    languages = KNOWN.get(engine.status().model, NOTHING_KNOWN).languages
    hint = f"it reads {languages}" if languages else "it may not read this language"
    lines = [f"the model knows few words of '{printable(text)}': {hint}"
             for text in foreign]  # fmt: skip
    for word, meant in list(unknown.items())[:_TOLD]:
        suggestion = f"; did you mean '{printable(meant)}'?" if meant else ""
        lines.append(f"'{printable(word)}' is unknown to the model{suggestion}")
    if len(unknown) > _TOLD:
        lines.append(f"so are {len(unknown) - _TOLD} other words")
    return lines


def _print(hits: list[Hit]) -> None:
    captioned = any(hit.caption is not None for hit in hits)
    parts = [name for name in SHARES if any(name in hit.scores for hit in hits)]
    head = ["rank", "score", *parts, *(["caption"] if captioned else []), "path"]
    rows = [
        [
            str(hit.rank),
            f"{hit.score:.3f}",
            *(
                SHARES[part].format(hit.scores[part]) if part in hit.scores else "-"
                for part in parts
            ),
            *([printable(hit.caption or "")] if captioned else []),
            shown_path(hit.path),
        ]
        for hit in hits
    ]
    print_table(head, rows, right=2 + len(parts))


def _write_page(path: Path, terms: list[Term], hits: list[Hit]) -> None:
    from mmsearch.search.page import Section, Tile, render_page, tiles_of

    words = [
        f"{'not ' if term.weight < 0 else ''}{term.text}" for term in terms if term.text is not None
    ]
    files = [Path(term.image) for term in terms if term.image is not None]
    examples = [Tile(file, "query", file.name) for file in files]
    title = ", ".join(words) or "pictures like this one"
    note = f"{len(hits)} hits, {datetime.now().astimezone():%Y-%m-%d %H:%M}"
    section = Section(title, tiles_of(hits), note, examples)
    write_page(path, render_page(f"mmsearch: {title}", [section]))

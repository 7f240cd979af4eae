"""What the commands share: options, messages, the progress bar, text that is safe to print."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from mmsearch.engine import Engine
    from mmsearch.types import OnProgress, Progress

Choice = TypeVar("Choice", bound=str)

IndexOption = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="DIR",
        help="The index. Default: MMSEARCH_INDEX, else ./index where that is mmsearch's own, "
        "else the user's data folder.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="tiny, base, base-multilingual, ARCH/TAG, ARCH:/path/to/weights, local-dir:/path, "
        "onnx:/path or hf-hub:org/name.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="auto, cpu, or a torch device such as cuda."),
]
PrecisionOption = Annotated[
    str | None, typer.Option("--precision", metavar="P", help="auto, fp32, bf16 or int8.")
]
LanguageOption = Annotated[
    str | None,
    typer.Option(
        "--language",
        metavar="CODE",
        help="The language of texts, for models that take one (nllb-clip-...): deu_Latn, ...",
    ),
]
FusionOption = Annotated[
    str,
    typer.Option(
        "--fusion",
        metavar="HOW",
        help="How the scores of an image and of its captions are combined: image, caption, words, "
        "sum, rrf, trained; auto is trained or sum, or image with fewer than 30 captions.",
    ),
]
ComposeOption = Annotated[
    str,
    typer.Option(
        "--compose",
        metavar="HOW",
        help="How --image and a text make one query: sum, their weighted sum, or early, by the "
        "network that 'train compose' trains; auto is early if that did well on photos.",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N images.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print only JSON.")]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]


def one_of(option: str, name: str, choices: tuple[Choice, ...]) -> Choice:
    """The choice that an option names."""
    found = next((choice for choice in choices if choice == name), None)
    if found is None:
        raise UsageError(f"{option} is one of {', '.join(choices)}, not '{name}'")
    return found


def say(message: str) -> None:
    """A line for the person, on stderr: stdout is for results."""
    print(f"mmsearch: {printable(message)}", file=sys.stderr)


def engine_for(
    index: Path | None = None,
    *,
    model: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    language: str | None = None,
    workers: int | None = None,
    yes: bool = False,
) -> Engine:
    """The engine that the options name; asks before it fetches weights."""
    from mmsearch.config import load_settings
    from mmsearch.engine import Engine

    settings = load_settings(
        index=index, device=device, precision=precision, language=language, workers=workers
    )

    def confirm(question: str) -> bool:
        can_ask = sys.stdin.isatty() and sys.stderr.isatty()
        return yes or (can_ask and typer.confirm(question, default=False, err=True))

    return Engine(settings, model=model, notify=say, confirm=confirm)


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """Shows long work on a terminal: done, total, rate and time left."""
    bars: dict[str, Any] = {}

    def show(progress: Progress) -> None:
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        bar = bars.get(progress.stage)
        if bar is None:
            for other in bars.values():
                other.close()
            bar = bars[progress.stage] = tqdm(
                total=progress.total, desc=progress.stage, unit="", file=sys.stderr, leave=False
            )
        bar.update(progress.done - bar.n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def write_page(path: Path, html: str) -> None:
    """Writes an HTML page and says so.

    Raises:
        UsageError: the name is not that of a page (a slip of the hand must cost no photo), or it
            cannot be written.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path}: a page is called .html; nothing was written")
    try:
        path.write_text(html, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
    say(f"wrote {shown_path(path)}")


def printable(text: str) -> str:
    """The text without anything that could move a terminal's cursor, reorder or hide text."""
    return "".join(
        char if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else
        char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )  # fmt: skip


def shown_path(path: Path) -> str:
    """A path for a table: relative where it lies below the current folder, and printable."""
    try:
        return printable(str(path.relative_to(Path.cwd())))
    except (ValueError, FileNotFoundError):  # it lies elsewhere, or the current folder is gone
        return printable(str(path))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> None:
    """Columns of text; the first `right` of them are set to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = [
            cell.rjust(width) if place < right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())

"""Puts the commands together."""

from __future__ import annotations

import errno
import functools
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import mmsearch
from mmsearch.cli import (
    bench,
    classify,
    contents,
    demo,
    index,
    maintenance,
    quit_at_once,
    search,
    train,
)
from mmsearch.cli.common import say
from mmsearch.errors import MmsearchError

EPILOG = (
    "Exit codes: 0 done, 1 some files failed (with --strict), 2 wrong usage, 3 no such index or "
    "model, 4 index in use or unreadable, or output that cannot be written, 5 damage found, "
    "6 training stopped, 130 interrupted."
)

app = typer.Typer(
    name="mmsearch",
    help="Find pictures by text, by example or by both, and measure how well it works.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mmsearch {mmsearch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Only here for --version: a command does the work."""


def _explaining(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its errors as one line on stderr and a documented exit code."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        try:
            if signal.getsignal(signal.SIGINT) is quit_at_once:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            command(**options)
            sys.stdout.flush()
        except MmsearchError as error:
            say(str(error))
            raise typer.Exit(error.exit_code) from None
        except (KeyboardInterrupt, typer.Abort):  # Abort: Ctrl-C at a question
            say("interrupted")
            raise typer.Exit(130) from None
        except (MemoryError, SystemError):  # the second where a library's own start meets the first
            say("too little memory")
            raise typer.Exit(4) from None
        except ImportError as error:
            say(f"too little memory, or a damaged installation: {error}")
            raise typer.Exit(4) from None
        except BrokenPipeError:
            # Whoever read our output has seen enough; Python must not complain at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            say(_what_of(error))
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(4) from None

    return run


def _what_of(error: OSError) -> str:
    """What the system refused, in a line."""
    if error.filename is not None:
        name = error.filename
        path = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else name
        return f"{path}: {error.strerror}"
    if error.errno == errno.ENOENT:  # what os.getcwd says; nothing else has no name
        return "the current folder was deleted: change to another, or name paths in full"
    return f"output cannot be written: {error.strerror}"


for _name, _command in {
    "index": index.index,
    "search": search.search,
    "bench": bench.bench,
    "classify": classify.classify,
    "status": contents.status,
    "errors": contents.errors,
    "remove": contents.remove,
    "models": contents.models,
    "verify": maintenance.verify,
    "repair": maintenance.repair,
    "compact": maintenance.compact,
    "backup": maintenance.backup,
    "restore": maintenance.restore,
    "export": contents.export,
    "import": contents.import_,
    "demo": demo.demo,
}.items():
    app.command(_name)(_explaining(_command))  # type: ignore[arg-type] # of no one signature


def _train() -> None:
    """Before each of them: torch needs the current folder, and does not say so where it is gone."""
    os.getcwd()


_training = typer.Typer(
    help="Train on your own captions: models, heads, weights and re-rankers.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_training.callback()(_explaining(_train))
for _command in (train.align, train.clip, train.compose, train.rerank, train.fusion):
    _training.command(_command.__name__)(_explaining(_command))
app.add_typer(_training, name="train")


def run() -> None:
    """Runs the command that the arguments name, and ends the process."""
    for name in ("stdout", "stderr"):  # closed by whoever started us
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    if sys.argv[1:2] == ["search"]:
        # OpenVINO imports its converter with itself, which a search has no use for. None is
        # Python's own way to say that a module cannot be imported; `convert_graph` undoes it where
        # a model must be converted after all.
        sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]
    try:
        app(prog_name="mmsearch")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            code = code or 4
        # All is written and closed. What is left is to take everything apart, piece by piece; the
        # kernel does it at once.
        os._exit(code)

"""Writes docs/cli.md from `--help`: `python scripts/cli_docs.py [--check]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.update(COLUMNS="100", TERMINAL_WIDTH="100", NO_COLOR="1", TERM="dumb")

from typer.testing import CliRunner

from mmsearch.cli.app import app

DOCS = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# The commands

Made from `mmsearch COMMAND --help` by `make docs`; do not edit. Results go to stdout, everything
else to stderr.
"""


def reference() -> str:
    runner = CliRunner()

    def help_of(*command: str) -> str:
        output = runner.invoke(app, [*command, "--help"], prog_name="mmsearch").stdout
        lines = "\n".join(line.rstrip() for line in output.strip().splitlines())
        return f"## {' '.join(('mmsearch', *command))}\n\n```\n{lines}\n```\n"

    parts = [help_of()]
    parts += [help_of(command.name) for command in app.registered_commands if command.name]
    for group in app.registered_groups:
        assert group.name
        assert group.typer_instance
        parts.append(help_of(group.name))
        parts += [
            help_of(group.name, command.name)
            for command in group.typer_instance.registered_commands if command.name
        ]  # fmt: skip
    return "\n".join([HEAD, *parts])


def main() -> None:
    if "--check" in sys.argv:
        if not DOCS.exists() or DOCS.read_text(encoding="utf-8") != reference():
            sys.exit("docs/cli.md is not what --help says: run 'make docs'")
        print("docs/cli.md is up to date")
    else:
        DOCS.write_text(reference(), encoding="utf-8")
        print(f"wrote {DOCS}")


if __name__ == "__main__":
    main()

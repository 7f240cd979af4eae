"""`mmsearch models`."""

from __future__ import annotations

import dataclasses
import json

from mmsearch.cli.common import IndexOption, JsonLinesOption, engine_for, print_table


def models(index: IndexOption = None, json_: JsonLinesOption = False) -> None:
    """List the models: the built-in names, and those that were used on this machine."""
    with engine_for(index) as engine:
        found = engine.models()
    if json_:
        for model in found:
            print(json.dumps(dataclasses.asdict(model)))
        return
    rows = [
        [
            model.name,
            str(model.dim or "-"),
            f"{model.parameters / 1e6:.1f}M" if model.parameters else "-",
            "yes" if model.cached else "no",
            model.indexed or "-",
            model.licence,
        ]
        for model in found
    ]
    print_table(["name", "dim", "parameters", "cached", "index", "licence"], rows)

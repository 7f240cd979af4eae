"""`mmsearch export` and `mmsearch import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmsearch.cli.common import IndexOption, ModelOption, engine_for, progress_bar


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    index: IndexOption = None,
) -> None:
    """Write vectors and metadata as clip-retrieval does (npy and parquet)."""
    with engine_for(index) as engine:
        print(f"{engine.export_embeddings(folder)} images exported")


def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where img_emb/ lies.")],
    index: IndexOption = None,
    model: ModelOption = None,
) -> None:
    """Add images with ready-made vectors in clip-retrieval's layout (npy and parquet)."""
    with engine_for(index, model=model) as engine, progress_bar() as bar:
        print(f"{engine.import_embeddings(folder, on_progress=bar)} images imported")

"""Repair with a model, backup and restore: what `Engine` does for an index as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.encoders.loading import pick_device
from mmsearch.media.isolated import Decoders
from mmsearch.search import compose, fusion, rerank
from mmsearch.store import backup as backups
from mmsearch.store import catalog
from mmsearch.store import repair as repairs
from mmsearch.store.catalog import SpaceRow
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import Progress, Repaired

if TYPE_CHECKING:
    from mmsearch.encoders.choice import ModelChoice
    from mmsearch.engine import Engine

#: What was learned for an index lies beside its catalog.
LEARNED = (fusion.FILE_NAME, compose.FILE_NAME, rerank.FILE_NAME)


def repair(
    engine: Engine, models: ModelChoice, on_progress: Callable[[Progress], None]
) -> Repaired:
    """Repairs an index; the errors are `Engine.repair`'s."""
    engine.close()  # a new catalog may take the place of the open one
    outcome = repairs.repair(engine.folder)
    lost, embedded, store = list(outcome.lost), 0, engine.store
    space = store.active_space()
    if outcome.found and space is not None:
        with store.writer() as writer:
            if _lacks(store, space):
                from mmsearch.ingest.beside import embed_missing

                encoder = models.for_space(space.spec, pick_device(engine.settings.device))
                workers = engine.settings.workers
                with Decoders() as decoders:
                    done = embed_missing(
                        store, writer, encoder, space, decoders,
                        workers=workers, on_progress=on_progress,
                    )  # fmt: skip
                embedded = done.images + done.captions
                lost += _take_out(store, writer, space)
            writer.compact(only_if="short")
    return Repaired(outcome.found, tuple(lost), embedded, outcome.kept)


def _lacks(store: Store, space: SpaceRow) -> bool:
    with store.catalog.read() as connection:
        return any(
            catalog.count_without_vector(connection, space, modality)
            for modality in ("image", "caption")
        )


def _take_out(store: Store, writer: Writer, space: SpaceRow) -> list[str]:
    """Removes images that have no vector and whose files give none; their paths."""
    found: list[str] = []
    while True:
        with store.catalog.read() as connection:
            some = catalog.media_without_vector(connection, space, 0, 1000)
        if not some:
            return found
        with writer.change() as change:
            change.remove_media([item.id for item in some])
        found += [os.fsdecode(item.absolute) for item in some]


def backup(store: Store, path: Path) -> int:
    """Copies an index into a new file; the errors are `Engine.backup`'s."""
    return backups.backup(store, path, LEARNED)


def restore(path: Path, folder: Path, roots: Mapping[str, str]) -> None:
    """Makes an index of a backup; the errors are `Engine.restore`'s."""

    def absolute(place: str) -> bytes:
        return os.fsencode(os.path.abspath(os.path.expanduser(place)))

    moved = {absolute(old): absolute(new) for old, new in roots.items()}
    backups.restore(path, folder, LEARNED, moved)

"""Repair with a model, backup and restore: what `Engine` does for an index as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.errors import MissingExtra, ModelNotFound
from mmsearch.jobs.runner import parts
from mmsearch.search import compose, fusion, rerank
from mmsearch.store import backup as backups
from mmsearch.store import repair as repairs
from mmsearch.store.rows import SpaceRow, is_from_file
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import TEXT, OnProgress, Repaired

if TYPE_CHECKING:
    from mmsearch.engine.open_index import OpenIndex


#: What was trained for an index lies beside its catalog.
TRAINED = (fusion.FILE_NAME, compose.FILE_NAME, rerank.FILE_NAME)


def repair(opened: OpenIndex, on_progress: OnProgress) -> Repaired:
    """Repairs an index; the errors are `Engine.repair`'s."""
    opened.close()  # a new catalog may take the place of the open one
    done, store = repairs.repair(opened.folder), opened.store
    space = store.active_space()
    if not done.found or space is None:
        return done
    with store.writer() as writer:
        with store.catalog.read() as queries:
            is_missing = any(map(queries.count_without_vector, space.towers.values()))
        if is_missing:
            from mmsearch.ingest.reembed import embed_missing

            try:
                encoder = opened.encoder_for(space.spec)
            except (ModelNotFound, MissingExtra) as error:
                opened.notify(str(error))  # what is lost has to be told of all the same
                return done
            again = embed_missing(
                store, writer, encoder, space, opened.runner(), on_progress=on_progress
            )
            lost = (*done.lost, *_take_out(store, writer, space))
            done = replace(done, lost=lost, embedded=again.images + again.captions)
        writer.compact(only_if="short")
    return done


def _take_out(store: Store, writer: Writer, space: SpaceRow) -> list[str]:
    """Removes images that have no vector and whose files give none; their paths.

    Those of folders that are missing or empty stay.
    """
    from mmsearch.ingest.reembed import PORTION, missing_segments

    found: list[str] = []
    for tower in space.towers.values():
        if tower.modality == TEXT:
            continue
        # Whole portions: what goes with one is not looked up with the next.
        for some in parts(missing_segments(store, tower), PORTION):
            with store.catalog.read() as queries:
                captions = queries.captions_of([item.media_id for item in some])
                # Not where all of a folder is gone: that may be a disk that is not mounted.
                there = {root.id: _has_something(root.path) for root in queries.roots()}
            going = {item.media_id: item for item in some if there[item.root_id]}
            with writer.change() as change:
                change.remove_media(list(going))
            for number, item in going.items():
                given = sum(is_from_file(row.source) for row in captions.get(number, ()))
                shown = os.fsdecode(item.absolute)
                found.append(shown + (f" ({given} captions)" if given else ""))
    return found


def _has_something(folder: bytes) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def backup(store: Store, path: Path) -> int:
    """Copies an index into a new file; the errors are `Engine.backup`'s."""
    return backups.backup(store, path, TRAINED)


def restore(path: Path, folder: Path, roots: Mapping[str, str]) -> None:
    """Makes an index of a backup; the errors are `Engine.restore`'s."""

    def absolute(place: str) -> bytes:
        return os.fsencode(os.path.abspath(os.path.expanduser(place)))

    moved = {absolute(old): absolute(new) for old, new in roots.items()}
    backups.restore(path, folder, TRAINED, moved)

"""Which items a search may find, as conditions of the catalog."""

from __future__ import annotations

import os
import sqlite3
from datetime import datetime
from typing import Any

import numpy as np

from mmsearch.errors import SpaceError
from mmsearch.store import lookups
from mmsearch.store.lookups import SpaceRow
from mmsearch.store.paths import relative
from mmsearch.types import Filter, Ids, Modality


def require_space(connection: sqlite3.Connection, identity: str) -> SpaceRow:
    """The active space, if it is the one that a query or a new vector belongs to.

    Raises:
        SpaceError: it is another one: the two cannot be compared.
    """
    space = lookups.active_space(connection)
    if space is None or space.spec.space != identity:
        holds = f"was made with '{space.spec.model}'" if space else "is empty"
        raise SpaceError(
            f"the index {holds}, and vectors of different models cannot be compared; use that "
            "model, or another index"
        )
    return space


def matching_ids(connection: sqlite3.Connection, where: Filter, to: Modality) -> Ids:
    """The ids of the media (or of the captions of the media) that a filter lets through, sorted."""
    conditions: list[str] = []
    values: list[Any] = []
    if where.after is not None:
        conditions.append("captured >= ?")
        values.append(stored_time(where.after))
    if where.before is not None:
        conditions.append("captured < ?")
        values.append(stored_time(where.before))
    if where.under is not None:
        condition, own = _under(connection, os.fsencode(os.path.abspath(where.under)))
        conditions.append(condition)
        values += own
    query = f"SELECT id FROM media WHERE {' AND '.join(conditions) or 'TRUE'}"
    if to == "caption":
        query = f"SELECT id FROM caption WHERE media_id IN ({query})"
    rows = connection.execute(query, values)
    return np.sort(np.fromiter((number for (number,) in rows), dtype=np.int64))


def _under(connection: sqlite3.Connection, folder: bytes) -> tuple[str, list[Any]]:
    """The condition that a file lies in a folder, and its values."""
    conditions: list[str] = []
    values: list[Any] = []
    for root in lookups.roots(connection):
        prefix = relative(folder, root.path)
        if relative(root.path, folder) is not None:
            conditions.append("root_id = ?")
            values.append(root.id)
        elif prefix is not None:
            condition, own = lookups.under(prefix)
            conditions.append(f"(root_id = ? AND {condition})")
            values += [root.id, *own]
    return f"({' OR '.join(conditions) or 'FALSE'})", values


def stored_time(moment: datetime) -> str:
    """A moment as the catalog keeps it: local time, so that it sorts as text."""
    return moment.replace(tzinfo=None, microsecond=0).isoformat()


def local_time(mtime_ns: int) -> str:
    """A file's modification time as the catalog keeps it."""
    try:
        return stored_time(datetime.fromtimestamp(mtime_ns / 1e9))
    except (OverflowError, ValueError, OSError):  # a file system's nonsense
        return stored_time(datetime(1970, 1, 1))

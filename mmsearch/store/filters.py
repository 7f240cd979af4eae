"""Which items a search may find, as conditions of the catalog."""

from __future__ import annotations

import os
from datetime import datetime

import numpy as np
from sqlalchemy import ColumnElement, Connection, select

from mmsearch.errors import SpaceError
from mmsearch.store import catalog, schema
from mmsearch.store.catalog import SpaceRow
from mmsearch.store.paths import relative
from mmsearch.types import Filter, Ids, Modality


def require_space(connection: Connection, identity: str) -> SpaceRow:
    """The active space, if it is the one that a query or a new vector belongs to.

    Raises:
        SpaceError: it is another one: the two cannot be compared.
    """
    space = catalog.active_space(connection)
    if space is None or space.spec.space != identity:
        holds = f"was made with '{space.spec.model}'" if space else "is empty"
        raise SpaceError(
            f"the index {holds}, and vectors of different models cannot be compared; use that "
            "model, or another index with --index DIR"
        )
    return space


def matching_ids(connection: Connection, where: Filter, to: Modality) -> Ids:
    """The ids of the media (or of the captions of the media) that a filter lets through."""
    media = schema.media
    query = select(media.c.id)
    if where.after is not None:
        query = query.where(media.c.captured >= stored_time(where.after))
    if where.before is not None:
        query = query.where(media.c.captured < stored_time(where.before))
    if where.under is not None:
        query = query.where(_under(connection, os.fsencode(os.path.abspath(where.under))))
    if to == "caption":
        query = select(schema.caption.c.id).where(schema.caption.c.media_id.in_(query))
    return np.sort(np.fromiter(connection.execute(query).scalars(), dtype=np.int64))


def _under(connection: Connection, folder: bytes) -> ColumnElement[bool]:
    condition: ColumnElement[bool] = schema.media.c.id.is_(None)  # nothing
    for root in catalog.roots(connection):
        own = schema.media.c.root_id == root.id
        prefix = relative(folder, root.path)
        if relative(root.path, folder) is not None:
            condition = condition | own
        elif prefix is not None:
            condition = condition | (own & catalog.under(schema.media.c.path, prefix))
    return condition


def stored_time(moment: datetime) -> str:
    """A moment as the catalog keeps it: local time, so that it sorts as text."""
    return moment.replace(tzinfo=None, microsecond=0).isoformat()


def local_time(mtime_ns: int) -> str:
    """A file's modification time as the catalog keeps it."""
    try:
        return stored_time(datetime.fromtimestamp(mtime_ns / 1e9))
    except (OverflowError, ValueError, OSError):  # a file system's nonsense
        return stored_time(datetime(1970, 1, 1))

"""Which items a search may find, as conditions of the catalog."""

from __future__ import annotations

import os

from mmsearch.errors import SpaceError
from mmsearch.store.paths import canonical, join, relative
from mmsearch.store.queries import Condition, Queries
from mmsearch.store.rows import RootRow, SpaceRow, TowerRow, stored_time, under
from mmsearch.types import Filter, Ids


def require_space(queries: Queries, identity: str) -> SpaceRow:
    """The active space, if it is the one that a query or a new vector belongs to.

    Raises:
        SpaceError: it is another one: the two cannot be compared.
    """
    space = queries.active_space()
    if space is None or space.spec.space != identity:
        holds = f"was made with '{space.spec.model}'" if space else "is empty"
        raise SpaceError(
            f"the index {holds}, and vectors of different models cannot be compared; use that "
            "model, or another index"
        )
    return space


def matching_ids(queries: Queries, where: Filter, tower: TowerRow | None) -> Ids:
    """The ids of a tower's items whose media a filter lets through, sorted.

    Args:
        tower: None is for the media themselves.
    """
    conditions: list[Condition] = []
    if where.after is not None:
        conditions.append(("captured >= ?", [stored_time(where.after)]))
    if where.before is not None:
        conditions.append(("captured < ?", [stored_time(where.before)]))
    if where.under is not None:
        conditions.append(_under(queries, os.fsencode(os.path.abspath(where.under))))
    return queries.ids_where(tower, conditions)


def _under(queries: Queries, folder: bytes) -> Condition:
    """That a file lies in a folder."""
    places = [(root.id, *under(prefix)) for root, prefix in places_of(queries, folder)]
    conditions = [f"(root_id = ? AND {condition})" for _, condition, _ in places]
    values = [value for number, _, own in places for value in (number, *own)]
    return f"({' OR '.join(conditions) or 'FALSE'})", values


def places_of(queries: Queries, path: bytes) -> list[tuple[RootRow, bytes]]:
    """Where files at or below an absolute path stand, by whatever name it is called.

    Roots, each with a path relative to it; "" is all of a root.
    """
    roots, real = queries.roots(), canonical(path)
    found: list[tuple[RootRow, bytes]] = []
    for root in roots:
        for top, name in ((root.path, path), (canonical(root.path), real)):
            prefix = b"" if relative(top, name) is not None else relative(name, top)
            if prefix is not None and (root, prefix) not in found:
                found.append((root, prefix))
    # The walk of a root leaves out links that lead into another.
    if any(root.walked and relative(real, canonical(root.path)) is not None for root in roots):
        return found
    return _through_links(queries, roots, real, found)


def _through_links(
    queries: Queries,
    roots: list[RootRow],
    real: bytes,
    found: list[tuple[RootRow, bytes]],
) -> list[tuple[RootRow, bytes]]:
    """The same for a path outside all roots, which a link within one may lead to."""
    for root in roots if os.path.lexists(real) else ():
        for folder in queries.folders_of(root.id):
            known = any(own == root and relative(folder, top) is not None for own, top in found)
            if not known and relative(canonical(join(root.path, folder)), real) is not None:
                found.append((root, folder))
    return found

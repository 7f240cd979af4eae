"""What an index run would do, without doing it."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmsearch.datasets.labelled import LabelledSet
from mmsearch.ingest.plan import make_plan, scopes_of
from mmsearch.media.fingerprint import Stamp
from mmsearch.media.media_types import PICTURES, MediaTypes
from mmsearch.store.store import Store
from mmsearch.types import IngestReport


def dry_run(
    store: Store | None,
    paths: Sequence[Path],
    exclude: Sequence[str] | None,
    prune: bool | None,
    labelled: tuple[LabelledSet, Path] | None,
    reread: bool = False,
    types: MediaTypes = PICTURES,
) -> IngestReport:
    """Plans on a copy of the catalog, so that the index itself stays untouched.

    No file is opened, also not with `reread`: a new file with the size and time of one that is gone
    counts as moved, a damaged one as added.

    Args:
        store: the index, or None where there is none yet.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mmsearch-") as scratch:
        copy = Store.create(Path(scratch) / "index")
        try:
            if store is not None:
                store.copy_catalog(copy)
            with copy.writer() as writer:
                scopes = scopes_of(copy, writer, paths, exclude, types)
                plan = make_plan(
                    copy, scopes, prune=prune, labelled=labelled, reread=reread, types=types
                )
        finally:
            copy.close()
    new = [candidate for candidate in plan.read if candidate.old is None]
    # Read again on demand: whether their content differs is not known before.
    again = [one for one in plan.read if one.old is not None and plan.is_same(one)]
    gone = Counter(Stamp(row.size, row.mtime_ns) for row in plan.gone.values())
    moved = (gone & Counter(candidate.file.stamp for candidate in new)).total()
    return IngestReport(
        added=len(new) - moved,
        moved=moved,
        updated=len(plan.read) - len(new) - len(again),
        unchanged=len(plan.same) + len(again),
        removed=len(plan.gone) - moved if plan.prune else 0,
        failed=len(plan.unreadable),
        known_bad=plan.known_bad,
        seconds=time.perf_counter() - started,
        kept_roots=tuple(plan.kept_roots),
        unmatched_captions=plan.labels.unmatched,
        dry_run=True,
    )

"""Compares what lies on the disk with what the catalog knows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.datasets.matching import composed
from mmsearch.errors import UsageError
from mmsearch.ingest.labels import FileKey, Labels, match_labels
from mmsearch.media.discover import FoundFile, Unreadable, walk
from mmsearch.media.media_types import PICTURES, MediaTypes
from mmsearch.store.filters import places_of
from mmsearch.store.paths import canonical, join, relative, to_path
from mmsearch.store.rows import MediaRow, RootRow
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import IngestReport


@dataclass(frozen=True)
class Scope:
    """A part of a root that a run looks at: all of it ("") or a folder or file in it."""

    root: RootRow
    prefix: bytes

    @property
    def path(self) -> bytes:
        return os.path.join(self.root.path, self.prefix) if self.prefix else self.root.path


class Candidate(NamedTuple):
    """A file to be read: new, or changed since it was indexed as `old`."""

    root: RootRow
    file: FoundFile
    old: MediaRow | None = None
    """What the catalog has of the same path."""

    @property
    def known(self) -> MediaRow:
        """What the catalog has of a file that is not new."""
        assert self.old is not None
        return self.old

    @property
    def key(self) -> FileKey:
        return self.root.id, self.file.path

    @property
    def absolute(self) -> bytes:
        return os.path.join(self.root.path, self.file.path)


@dataclass
class Plan:
    """What a run has to do."""

    read: list[Candidate] = field(default_factory=list)
    same: list[Candidate] = field(default_factory=list)
    gone: dict[int, MediaRow] = field(default_factory=dict)
    """Media rows by id whose files are no longer there."""
    unreadable: list[tuple[RootRow, Unreadable]] = field(default_factory=list)
    prune: bool = True
    """Whether what is gone is removed; it is known either way, to tell a move from a copy."""
    reread: bool = False
    """Whether files are read whose size and time are as they were."""
    recovered: list[FileKey] = field(default_factory=list)
    """Failures whose files are gone, or are again as they were indexed."""
    known_bad: int = 0
    kept_roots: list[Path] = field(default_factory=list)
    labels: Labels = field(default_factory=lambda: Labels({}, ()))

    @staticmethod
    def is_same(candidate: Candidate) -> bool:
        """Whether size and time of a file are as they were."""
        old = candidate.old
        return old is not None and candidate.file.stamp == (old.size, old.mtime_ns)

    def may_differ(self, candidate: Candidate) -> bool:
        """Whether a file's captions may be others than those that the catalog has."""
        if candidate.key in self.labels.captions or candidate.key in self.labels.dropped:
            return True
        old, known = candidate.old, None
        if old is not None and old.sidecar_size is not None:
            known = (old.sidecar_size, old.sidecar_mtime_ns)
        return candidate.file.sidecar != known

    def touched(self) -> list[Candidate]:
        """The unchanged files whose captions have to be looked at."""
        return [candidate for candidate in self.same if self.may_differ(candidate)]

    def is_idle(self) -> bool:
        """Whether there is nothing to do: everything is as the index has it."""
        return not (self.read or self.gone or self.unreadable or self.recovered or self.touched())

    def report(self, **done: Any) -> IngestReport:
        """What the plan itself says for a report, with what was done."""
        return IngestReport(
            known_bad=self.known_bad,
            kept_roots=tuple(self.kept_roots),
            unmatched_captions=self.labels.unmatched,
            **done,
        )


def scopes_of(
    store: Store,
    writer: Writer,
    paths: Sequence[Path],
    exclude: Sequence[str] | None,
    types: MediaTypes = PICTURES,
) -> list[Scope]:
    """The parts of roots that the paths name; new paths become roots.

    Without paths: all that the index knows of.

    Raises:
        UsageError: as `check_paths`; nothing was changed.
    """
    if not paths:
        if exclude is not None:
            raise UsageError("--exclude belongs to a folder: name the PATH that it is for")
        return _known_scopes(store)
    absolute = [os.fsencode(os.path.abspath(path)) for path in paths]
    check_paths(store, absolute, types)
    found = [_scope(store, writer, path, exclude) for path in absolute]
    return _without_nested(found)


def check_paths(store: Store | None, paths: Sequence[bytes], types: MediaTypes = PICTURES) -> None:
    """Whether all of some absolute paths can be indexed, before any of them is.

    Raises:
        UsageError: one is not there and not known either, or is no image.
    """
    for path in paths:
        if os.path.isdir(path):
            continue
        if not os.path.lexists(path):
            if store is None or not _knows(store, path):
                raise UsageError(f"{os.fsdecode(path)}: no such file or folder")
        elif types.place_of(path) is None:
            raise UsageError(f"{os.fsdecode(path)}: not an image by its name, nor a folder")


def _known_scopes(store: Store) -> list[Scope]:
    found = []
    with store.catalog.read() as queries:
        for root in queries.roots():
            paths = {b""}
            if not root.walked:
                paths = {row.path for row in queries.media_under(root.id, b"")}
                paths |= {row.path for row in queries.failures_under(root.id, b"")}
            found += [Scope(root, path) for path in sorted(paths)]
    return found


def _scope(store: Store, writer: Writer, path: bytes, exclude: Sequence[str] | None) -> Scope:
    folder = os.path.isdir(path)
    with store.catalog.read() as queries:
        roots = queries.roots()
    real = canonical(path)
    # The deepest root that holds the path: one that is not walked holds files, but no folders.
    # By its real place first; what a link within a root leads to lies nowhere else.
    for root in sorted(roots, key=lambda root: len(root.path), reverse=True):
        prefix = relative(real, canonical(root.path))
        if prefix is not None and (root.walked or (prefix and not folder)):
            return Scope(_with_exclude(writer, root, exclude), prefix)
    if not folder:
        parent, name = os.path.split(real)
        with store.catalog.read() as queries:  # a link within a root may lead there
            known = places_of(queries, parent)
        for root, prefix in known:
            if root.walked and canonical(join(root.path, prefix)) == parent:
                return Scope(_with_exclude(writer, root, exclude), os.path.join(prefix, name))
        with writer.change() as change:
            return Scope(change.add_root(parent, walked=False), name)
    return Scope(_with_exclude(writer, _new_root(writer, real, roots), exclude), b"")


def _knows(store: Store, path: bytes) -> bool:
    with store.catalog.read() as queries:
        return any(
            queries.media_under(root.id, prefix) for root, prefix in places_of(queries, path)
        )


def _new_root(writer: Writer, path: bytes, roots: list[RootRow]) -> RootRow:
    """Makes a folder a root; what other roots hold of it becomes part of it.

    Args:
        path: without symbolic links.
    """
    with writer.change() as change:
        root = next((root for root in roots if canonical(root.path) == path), None)
        if root is None:
            root = change.add_root(path, walked=True)
        else:  # so far, only single files of it were indexed
            change.set_root(root.id, walked=True, exclude=root.exclude)
            root = replace(root, walked=True)
        for other in roots:
            if other.id != root.id:
                change.take_over(other, root)
    return root


def _with_exclude(writer: Writer, root: RootRow, exclude: Sequence[str] | None) -> RootRow:
    """The root with new globs, which it keeps for later runs; None changes nothing."""
    if exclude is None or tuple(exclude) == root.exclude:
        return root
    with writer.change() as change:
        change.set_root(root.id, walked=root.walked, exclude=exclude)
    return replace(root, exclude=tuple(exclude))


def _without_nested(scopes: list[Scope]) -> list[Scope]:
    """Leaves out what lies within another scope, so that no file is looked at twice."""
    kept: list[Scope] = []
    # By their parts, a folder comes right before all that lies in it.
    for scope in sorted(scopes, key=lambda scope: scope.path.split(b"/")):
        if not kept or relative(scope.path, kept[-1].path) is None:
            kept.append(scope)
    return kept


def make_plan(
    store: Store,
    scopes: Sequence[Scope],
    *,
    prune: bool | None,
    labelled: tuple[LabelledSet, Path] | None = None,
    reread: bool = False,
    types: MediaTypes = PICTURES,
) -> Plan:
    """Looks at every file of the scopes.

    Args:
        reread: read all files, also those whose size and time are as they were.
        prune: None removes what is gone, but not from a folder that is missing or empty.
        labelled: captions, and the folder of the file they came from.
    """
    plan = Plan(prune=prune is not False, reread=reread)
    for scope in scopes:
        _plan_scope(store, scope, plan, prune, types)
    if labelled is not None:
        candidates = plan.read + plan.same
        files = [(candidate.key, candidate.absolute) for candidate in candidates]
        bases = [os.fsencode(os.path.abspath(labelled[1])), *(scope.path for scope in scopes)]
        labels = _of_others(match_labels(labelled[0], files, bases), labelled[0], files)
        with store.catalog.read() as queries:
            had = queries.media_with_captions_of(labels.source)
        plan.labels = replace(labels, dropped=_dropped(labelled[0], labels, candidates, had))
    return plan


def _of_others(
    labels: Labels, labelled: LabelledSet, files: Sequence[tuple[FileKey, bytes]]
) -> Labels:
    """Without what a labelled folder has of each picture's own sidecar, which is read anyway."""
    if not os.path.isdir(labelled.source):
        return labels
    own = {
        composed(os.path.join(os.fsencode(labelled.source), os.fsencode(image.file)))
        for image in labelled.images
    }
    others = {
        key: labels.captions[key]
        for key, absolute in files
        if key in labels.captions and composed(os.path.realpath(absolute)) not in own
    }
    return replace(labels, captions=others)


def _dropped(
    labelled: LabelledSet, labels: Labels, candidates: Sequence[Candidate], had: set[int]
) -> frozenset[FileKey]:
    """The files whose captions their captions file no longer has.

    Not where it could not be read in full, and not those that it may mean by a name that more than
    one file has.
    """
    if labelled.remarks:
        return frozenset()
    unclear = {composed(os.path.basename(os.fsencode(name))) for name in labels.unmatched}
    return frozenset(
        item.key
        for item in candidates
        if item.old is not None
        and item.old.id in had
        and item.key not in labels.captions
        and composed(os.path.basename(item.file.path)) not in unclear
    )


def _plan_scope(
    store: Store, scope: Scope, plan: Plan, prune: bool | None, types: MediaTypes
) -> None:
    root = scope.root
    with store.catalog.read() as queries:
        known = {row.path: row for row in queries.media_under(root.id, scope.prefix)}
        bad = {row.path: row for row in queries.failures_under(root.id, scope.prefix)}
        is_pending = queries.pending_space() is not None
        roots = queries.roots()
    others = [canonical(other.path) for other in roots if other.walked and other.id != root.id]
    seen: set[bytes] = set()
    shut: list[bytes] = []
    there = os.path.lexists(scope.path)
    for found in walk(root.path, scope.prefix, root.exclude, others, types) if there else ():
        if isinstance(found, Unreadable):
            shut.append(found.path)
            plan.unreadable.append((root, found))
            continue
        seen.add(found.path)
        candidate, failed = Candidate(root, found, known.get(found.path)), bad.get(found.path)
        is_same = plan.is_same(candidate)
        has_failed_so = failed is not None and (failed.size, failed.mtime_ns) == found.stamp
        if plan.reread or not (is_same or has_failed_so):
            plan.read.append(candidate)
        elif not is_same:
            plan.known_bad += 1
        else:
            plan.same.append(candidate)
            # A failure of the same stamp is of the pending model, which waits for this file.
            if failed is not None and not (is_pending and has_failed_so):
                plan.recovered.append(candidate.key)
    if prune is None and known and not seen and _may_be_unmounted(scope, known):
        plan.kept_roots.append(to_path(scope.path))
        return
    plan.gone |= {
        row.id: row
        for path, row in known.items()
        # What is of a type that is not looked for now is not gone.
        if path not in seen
        and row.kind in types.kinds
        and all(folder and relative(path, folder) is None for folder in shut)
    }
    plan.recovered.extend((root.id, path) for path in bad if path not in seen and path not in shut)


def _may_be_unmounted(scope: Scope, known: Mapping[bytes, MediaRow]) -> bool:
    """An unmounted disk looks like a folder that is gone or empty: nothing is removed for it."""
    folder = os.path.dirname(scope.path) if scope.prefix in known else scope.path
    try:
        return all(name.startswith(b".") for name in os.listdir(folder))
    except OSError:
        return True


def plan_of_files(
    writer: Writer,
    folder: bytes,
    labelled: LabelledSet,
    among: Sequence[LabelledImage] | None = None,
) -> Plan:
    """A plan for just the files that a labelled set names, below `folder`.

    They are found as `make_plan` finds them, so that both see the same set.

    Args:
        among: all images of the labels, where the set has some of them.
    """
    with writer.change() as change:
        root = change.add_root(folder, walked=False)
    found: dict[bytes, FoundFile] = {}
    for image in labelled.images:
        path = os.path.normpath(os.fsencode(image.file))
        if isinstance(one := next(walk(folder, path), None), FoundFile):
            found[path] = FoundFile(path, one.stamp)
    if len(found) < len(labelled.images):  # some may be called otherwise, or lie elsewhere
        for one in walk(folder):
            if isinstance(one, FoundFile):
                found.setdefault(one.path, FoundFile(one.path, one.stamp))
    files = [((root.id, path), os.path.join(folder, path)) for path in found]
    labels = match_labels(labelled, files, [folder], among)
    read = [Candidate(root, found[path]) for _, path in labels.captions]
    return Plan(read=read, labels=labels)

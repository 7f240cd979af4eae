"""One call of `Engine.index`, from the look at the disk to the last commit."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.encoders.precision import SAMPLE
from mmsearch.errors import Interrupted, UsageError
from mmsearch.ingest.plan import Plan, check_paths, make_plan, scopes_of
from mmsearch.ingest.tally import Tally
from mmsearch.jobs.runner import Runner
from mmsearch.media.fingerprint import Stamp
from mmsearch.store.rows import SpaceRow
from mmsearch.store.writer import Writer
from mmsearch.types import IMAGE, IngestReport, OnProgress, Pixels

if TYPE_CHECKING:
    from mmsearch.datasets.labelled import LabelledSet
    from mmsearch.encoders.base import Encoder
    from mmsearch.engine.open_index import OpenIndex


@dataclass(frozen=True)
class Request:
    """What `Engine.index` was asked for."""

    paths: Sequence[Path]
    labelled: tuple[LabelledSet, Path] | None
    """Captions, and the folder of the file they came from."""
    prune: bool | None
    exclude: Sequence[str] | None
    patches: bool | None
    reread: bool
    on_progress: OnProgress


def index(opened: OpenIndex, request: Request) -> IngestReport:
    """Brings an index in step with the disk; the arguments and errors are `Engine.index`'s."""
    started = time.perf_counter()
    run = _Run(opened, request, opened.runner())
    with run.tally.timed("load"):
        existing = opened.store if opened.exists() else None
        absolute = [os.fsencode(os.path.abspath(path)) for path in request.paths]
        check_paths(existing, absolute, opened.media_types)
        # A model that cannot be had is told of before the work. That of an index is opened only
        # when there is work: a rescan that finds nothing new is over before it would be there.
        is_new = existing is None or existing.active_space() is None
        if is_new or opened.names_model() or request.patches:
            run.open_encoder()
    try:
        with opened.make().writer() as writer:
            report = run.go(writer)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted: everything committed so far is kept; run the same command again to resume"
        ) from None
    opened.search_encoder = None  # its precision may be another now
    return replace(
        report,
        seconds=time.perf_counter() - started,
        stages=dict(run.tally.stages),
        captions_remarks=request.labelled[0].remarks if request.labelled else (),
    )


def dry_run(opened: OpenIndex, request: Request) -> IngestReport:
    """What `index` would do, planned on a copy of the catalog: the index itself stays untouched.

    No file is opened, also not with `reread`: a new file with the size and time of one that is gone
    counts as moved, a damaged one as added.
    """
    started = time.perf_counter()
    space = opened.active_space()
    if space is not None and not opened.may_use(space.spec):
        opened.notify(
            f"the index is in '{space.spec.model}': all of it would be embedded with "
            f"'{opened.asked_model}' too, which would then take its place"
        )
    with opened.scratch() as other:
        if opened.exists():
            opened.store.copy_catalog(other.make())
        with other.make().writer() as writer:
            plan = _plan(other, request, writer)
    new = [candidate for candidate in plan.read if candidate.old is None]
    # Read again on demand: whether their content differs is not known before.
    again = [one for one in plan.read if one.old is not None and plan.is_same(one)]
    gone = Counter(Stamp(row.size, row.mtime_ns) for row in plan.gone.values())
    moved = (gone & Counter(candidate.file.stamp for candidate in new)).total()
    return plan.report(
        added=len(new) - moved,
        moved=moved,
        updated=len(plan.read) - len(new) - len(again),
        unchanged=len(plan.same) + len(again),
        removed=len(plan.gone) - moved if plan.prune else 0,
        failed=len(plan.unreadable),
        seconds=time.perf_counter() - started,
        dry_run=True,
    )


def _plan(opened: OpenIndex, request: Request, writer: Writer) -> Plan:
    types, store = opened.media_types, opened.store
    scopes = scopes_of(store, writer, request.paths, request.exclude, types)
    return make_plan(
        store, scopes, prune=request.prune, labelled=request.labelled, reread=request.reread,
        types=types,
    )  # fmt: skip


@dataclass
class _Run:
    opened: OpenIndex
    request: Request
    runner: Runner
    encoder: Encoder | None = None
    other: Encoder | None = None
    """The model that the index is to migrate to, if it is another than it has."""
    tally: Tally = field(default_factory=Tally)

    def open_encoder(self) -> Encoder:
        """The index's own model, or the other that was asked for."""
        encoder, is_other = self.opened.encoder_to_index()
        if self.request.patches:  # a model that has none
            self.opened.provider.patch_encoder_of(encoder.spec)
        if is_other:
            self.other = encoder
        else:
            self.encoder = encoder
        return encoder

    def go(self, writer: Writer) -> IngestReport:
        store = self.opened.store
        with self.tally.timed("scan"):
            plan = _plan(self.opened, self.request, writer)
        active, other = store.active_space(), self.other
        if other is not None and active is not None:
            with store.catalog.read() as queries:
                is_empty = not queries.has_media()
            if is_empty:  # nothing that searches would have to go on with
                active = writer.space_of(other.spec, other.precision, beside=True)
                writer.switch_to(active)
            if active.spec.space == other.spec.space:
                self.encoder, other = other, None
        if active is not None and plan.is_idle():
            writer.compact(only_if="short")
            report = plan.report(
                unchanged=len(plan.same), model=active.spec.model, precision=active.precision
            )
        else:
            report = self._embed(writer, plan, active if other is not None else None)
        if active is not None and other is not None:
            with self.tally.timed("again"):
                return self._migrate(writer, report, active, other)
        self._settle_pending(writer)
        return replace(report, patches=self._keep_patches(writer))

    def _embed(self, writer: Writer, plan: Plan, own: SpaceRow | None) -> IngestReport:
        """Does what the plan says, in the index's own space.

        Args:
            own: that space, where another model was opened.
        """
        from mmsearch.ingest.pipeline import Pipeline

        encoder = None
        with self.tally.timed("load"):
            if plan.read or plan.touched() or self.opened.store.active_space() is None:
                if own is not None:
                    encoder = self.opened.encoder_for(own.spec)
                else:
                    encoder = self.encoder or self.open_encoder()
                paths = [candidate.absolute for candidate in plan.read]
                encoder = self._checked(encoder, len(paths), paths)
        return Pipeline(
            self.opened.store, writer, encoder, self.runner, self.request.on_progress, self.tally
        ).run(plan)

    def _checked(self, encoder: Encoder, count: int, paths: Sequence[bytes]) -> Encoder:
        """The encoder in the precision for so many pictures, which is tried on some of them."""
        from mmsearch.ingest.sample import sample_of

        def sample() -> Pixels:
            how = encoder.spec.inputs[IMAGE]
            return sample_of(paths, how, self.runner.workers, self.runner.decoders)

        return self.opened.provider.checked(encoder, count, sample)

    def _migrate(
        self, writer: Writer, report: IngestReport, active: SpaceRow, encoder: Encoder
    ) -> IngestReport:
        """Embeds the index with another model, beside its own, and changes to it when all is done.

        What a search needs is in the index's own space first, so that nothing is lost to it
        whatever becomes of the other.
        """
        from mmsearch.ingest.reembed import embed_missing

        store = self.opened.store
        if self.request.patches is False:
            self._drop_patches(writer)
        with store.catalog.read() as queries:
            count, paths = queries.count("media"), queries.some_paths(SAMPLE)
            has_patches = queries.has_patches(active)
        encoder = self._checked(encoder, count, paths)
        pending = writer.space_of(encoder.spec, encoder.precision, beside=True)
        with store.catalog.read() as queries:
            missing = queries.count_without_vector(pending.towers[IMAGE])
        done_before = f", {count - missing} of {count} images are done" if missing < count else ""
        self.opened.notify(
            f"embedding the index with '{pending.spec.model}' beside '{active.spec.model}', which "
            f"answers searches until all is done{done_before}"
        )
        done = embed_missing(
            store, writer, encoder, pending, self.runner, on_progress=self.request.on_progress
        )
        patches = 0
        if done.missing:
            patches = self._keep_patches(writer)
        else:
            if has_patches or self.request.patches:
                patches = self._add_patches(writer, pending, is_new=True)
            writer.switch_to(pending)
        return replace(
            report,
            model=encoder.spec.model,
            precision=encoder.precision,
            embedded_again=done.images,
            failed=report.failed + done.failed,
            missing=done.missing,
            patches=patches,
            replaced="" if done.missing else active.spec.model,
        )

    def _settle_pending(self, writer: Writer) -> None:
        """Gives a migration up where the index's own model was asked for; else tells of it."""
        if self.opened.names_model():
            if (pending := writer.drop_pending()) is not None:
                self.opened.notify(
                    f"the index keeps its model: what was embedded with '{pending.spec.model}', to "
                    "take its place, is deleted"
                )
            return
        with self.opened.store.catalog.read() as queries:
            pending = queries.pending_space()
            missing = queries.count_without_vector(pending.towers[IMAGE]) if pending else 0
        if pending is not None:
            self.opened.notify(
                f"the move to '{pending.spec.model}' is not done, {missing} images lack it: "
                f"'mmsearch index --model {pending.spec.model}' resumes"
            )

    def _keep_patches(self, writer: Writer) -> int:
        """Adds what patches are missing where they are kept; how many."""
        if self.request.patches is False:
            self._drop_patches(writer)
        with self.opened.store.catalog.read() as queries:
            space = queries.active_space()
            if space is None or not (self.request.patches or queries.has_patches(space)):
                return 0
        return self._add_patches(writer, space)

    def _drop_patches(self, writer: Writer) -> None:
        with self.opened.store.catalog.read() as queries:
            has_some = queries.has_patches()
        if has_some:
            with writer.change() as change:
                change.remove_patches()

    def _add_patches(self, writer: Writer, space: SpaceRow, *, is_new: bool = False) -> int:
        store = self.opened.store
        with store.catalog.read() as queries:
            if not queries.is_missing_patches(space):
                return 0
        from mmsearch.ingest.patches import add_patches

        with self.tally.timed("patches"):
            try:
                encoder = self.opened.provider.patch_encoder_of(space.spec)
            except UsageError as error:
                if not is_new or self.request.patches:
                    raise
                self.opened.notify(f"patches are no longer kept: {error}")
                return 0
            return add_patches(
                store, writer, encoder, space, self.runner, on_progress=self.request.on_progress
            )

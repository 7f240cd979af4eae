"""One call of `Engine.index`, from the look at the disk to the last commit."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.encoders.loading import pick_device
from mmsearch.encoders.precision import SAMPLE
from mmsearch.errors import Interrupted, UsageError
from mmsearch.ingest.plan import Plan, check_paths, make_plan, scopes_of
from mmsearch.jobs.runner import Runner
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
    existing = opened.store if opened.exists() else None
    absolute = [os.fsencode(os.path.abspath(path)) for path in request.paths]
    check_paths(existing, absolute, opened.media_types)
    run = _Run(opened, request, opened.runner())
    # A model that cannot be had is told of before the work. That of an index is opened only
    # when there is work: a rescan that finds nothing new is over before it would be there.
    is_new = existing is None or existing.active_space() is None
    if is_new or opened.names_model() or request.patches:
        run.open_encoder()
    loaded = time.perf_counter()
    try:
        with opened.make().writer() as writer:
            report = run.go(writer)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted: everything committed so far is kept; run the same command again to resume"
        ) from None
    opened.choose_encoder_again()  # its precision may be another now
    stages = {**report.stages, "load": report.stages.get("load", 0.0) + loaded - started}
    return dataclasses.replace(
        report,
        seconds=time.perf_counter() - started,
        stages=stages,
        captions_remarks=request.labelled[0].remarks if request.labelled else (),
    )


def dry_run(opened: OpenIndex, request: Request) -> IngestReport:
    """What `index` would do."""
    from mmsearch.ingest.dry_run import dry_run as count_only

    existing = opened.store if opened.exists() else None
    space = existing.active_space() if existing else None
    if space is not None and not opened.may_use(space.spec):
        opened.notify(
            f"the index is in '{space.spec.model}': all of it would be embedded with "
            f"'{opened.asked_model}' too, which would then take its place"
        )
    return count_only(
        existing, request.paths, request.exclude, request.prune, request.labelled,
        request.reread, opened.media_types,
    )  # fmt: skip


class _Run:
    def __init__(self, opened: OpenIndex, request: Request, runner: Runner) -> None:
        self._opened = opened
        self._provider = opened.provider
        self._request = request
        self._runner = runner
        self._encoder: Encoder | None = None
        self._other: Encoder | None = None
        """The model that the index is to migrate to, if it is another than it has."""

    def open_encoder(self) -> Encoder:
        """The index's own model; that of a new index is the one that was asked for."""
        if self._encoder is None:
            encoder, is_other = self._opened.encoder_to_index()
            if self._request.patches:  # a model that has none
                self._provider.patch_encoder_of(encoder.spec)
            if is_other:
                self._other = encoder
                return encoder
            self._encoder = encoder
        return self._encoder

    def go(self, writer: Writer) -> IngestReport:
        store, request = self._opened.store, self._request
        begun = time.perf_counter()
        scopes = scopes_of(store, writer, request.paths, request.exclude, self._opened.media_types)
        plan = make_plan(store, scopes, prune=request.prune, labelled=request.labelled,
                         reread=request.reread, types=self._opened.media_types)  # fmt: skip
        scan = time.perf_counter() - begun
        active = store.active_space()
        other = self._other
        if other is not None and active is not None:
            with store.catalog.read() as queries:
                is_empty = not queries.has_media()
            if is_empty:  # nothing that searches would have to go on with
                writer.switch_to(writer.space_of(other.spec, other.precision, beside=True))
                active = store.active_space()
            if active is not None and active.spec.space == other.spec.space:
                self._encoder, other = other, None
        if active is not None and plan.is_idle():
            writer.compact(only_if="short")
            report = _idle(plan, active)
        else:
            report = self._embed(writer, plan, active if other is not None else None)
        if active is not None and other is not None:
            report = self._migrate(writer, report, active, other)
        else:
            if self._opened.names_model():
                self._cancel_migration(writer)
            else:
                self._tell_of_pending()
            report = self._keep_patches(writer, report)
        return dataclasses.replace(report, stages={**report.stages, "scan": scan})

    def _embed(self, writer: Writer, plan: Plan, own: SpaceRow | None) -> IngestReport:
        """Does what the plan says, in the index's own space.

        Args:
            own: that space, where another model was opened.
        """
        from mmsearch.ingest.pipeline import Pipeline

        begun = time.perf_counter()
        encoder = None
        if plan.needs_encoder() or self._opened.store.active_space() is None:
            if own is not None:
                device = pick_device(self._opened.settings.device)
                encoder = self._provider.for_space(own.spec, device)
            else:
                encoder = self.open_encoder()
            paths = [candidate.absolute for candidate in plan.read]
            encoder = self._checked(encoder, len(paths), lambda: paths)
        load = time.perf_counter() - begun
        report = Pipeline(
            self._opened.store,
            writer,
            encoder,
            self._runner,
            on_progress=self._request.on_progress,
        ).run(plan)
        stages = {**report.stages, "load": report.stages["load"] + load}
        return dataclasses.replace(report, stages=stages)

    def _checked(
        self, encoder: Encoder, count: int, paths: Callable[[], Sequence[bytes]]
    ) -> Encoder:
        from mmsearch.ingest.sample import sample_of

        def sample() -> Pixels:
            how = encoder.spec.inputs[IMAGE]
            return sample_of(paths(), how, self._runner.workers, self._runner.decoders)

        return self._provider.checked(encoder, count, sample)

    def _migrate(
        self, writer: Writer, report: IngestReport, active: SpaceRow, encoder: Encoder
    ) -> IngestReport:
        """Embeds the index with another model, beside its own, and changes to it when all is done.

        What a search needs is in the index's own space first, so that nothing is lost to it
        whatever becomes of the other.
        """
        from mmsearch.ingest.reembed import embed_missing

        started = time.perf_counter()
        store, progress = self._opened.store, self._request.on_progress
        if self._request.patches is False:
            self._drop_patches(writer)
        with store.catalog.read() as queries:
            count = queries.count("media")
            has_patches = queries.has_patches(active)

        def paths() -> list[bytes]:
            with store.catalog.read() as queries:
                return queries.some_paths(SAMPLE)

        encoder = self._checked(encoder, count, paths)
        pending = writer.space_of(encoder.spec, encoder.precision, beside=True)
        with store.catalog.read() as queries:
            missing = queries.count_without_vector(pending.towers[IMAGE])
        done_before = f", {count - missing} of {count} images are done" if missing < count else ""
        self._opened.notify(
            f"embedding the index with '{pending.spec.model}' beside '{active.spec.model}', which "
            f"answers searches until all is done{done_before}"
        )
        done = embed_missing(store, writer, encoder, pending, self._runner, on_progress=progress)
        report = dataclasses.replace(
            report,
            model=encoder.spec.model,
            precision=encoder.precision,
            embedded_again=done.images,
            failed=report.failed + done.failed,
            missing=done.missing,
        )
        if done.missing:
            report = self._keep_patches(writer, report)
        else:
            if has_patches or self._request.patches:
                report = self._add_patches(writer, report, pending, is_new=True)
            writer.switch_to(pending)
            report = dataclasses.replace(report, replaced=active.spec.model)
        stages = {**report.stages, "again": time.perf_counter() - started}
        return dataclasses.replace(report, stages=stages)

    def _cancel_migration(self, writer: Writer) -> None:
        pending = writer.drop_pending()
        if pending is not None:
            self._opened.notify(
                f"the index keeps its model: what was embedded with '{pending.spec.model}', to "
                "take its place, is deleted"
            )

    def _tell_of_pending(self) -> None:
        with self._opened.store.catalog.read() as queries:
            pending = queries.pending_space()
            if pending is None:
                return
            missing = queries.count_without_vector(pending.towers[IMAGE])
        self._opened.notify(
            f"the move to '{pending.spec.model}' is not done, {missing} images lack it: 'mmsearch "
            f"index --model {pending.spec.model}' resumes"
        )

    def _keep_patches(self, writer: Writer, report: IngestReport) -> IngestReport:
        if self._request.patches is False:
            self._drop_patches(writer)
        with self._opened.store.catalog.read() as queries:
            space = queries.active_space()
            has_patches = space is not None and queries.has_patches(space)
        if space is not None and (has_patches or self._request.patches):
            report = self._add_patches(writer, report, space)
        return report

    def _drop_patches(self, writer: Writer) -> None:
        with self._opened.store.catalog.read() as queries:
            has_some = queries.has_patches()
        if has_some:
            with writer.change() as change:
                change.remove_patches()

    def _add_patches(
        self, writer: Writer, report: IngestReport, space: SpaceRow, *, is_new: bool = False
    ) -> IngestReport:
        store = self._opened.store
        started = time.perf_counter()
        with store.catalog.read() as queries:
            if not queries.is_missing_patches(space):
                return report
        from mmsearch.ingest.patches import add_patches

        try:
            local = self._provider.patch_encoder_of(space.spec)
        except UsageError as error:
            if not is_new or self._request.patches:
                raise
            self._opened.notify(f"patches are no longer kept: {error}")
            return report
        progress = self._request.on_progress
        added = add_patches(store, writer, local, space, self._runner, on_progress=progress)
        stages = {**report.stages, "patches": time.perf_counter() - started}
        return dataclasses.replace(report, patches=added, stages=stages)


def _idle(plan: Plan, space: SpaceRow) -> IngestReport:
    """The report of a run that found everything as the index has it."""
    return IngestReport(
        unchanged=len(plan.same),
        known_bad=plan.known_bad,
        model=space.spec.model,
        precision=space.precision,
        kept_roots=tuple(plan.kept_roots),
        unmatched_captions=plan.labels.unmatched,
    )

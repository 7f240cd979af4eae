"""One call of `Engine.index`, from the look at the disk to the last commit."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.errors import Interrupted, UsageError
from mmsearch.ingest.plan import Plan, check_paths, make_plan, scopes_of
from mmsearch.store import catalog
from mmsearch.store.catalog import SpaceRow
from mmsearch.store.store import Writer
from mmsearch.types import IngestReport, Progress

if TYPE_CHECKING:
    from mmsearch.datasets.labelled import LabelledSet
    from mmsearch.encoders.base import Encoder
    from mmsearch.encoders.choice import ModelChoice
    from mmsearch.engine import Engine


@dataclass(frozen=True)
class Request:
    """What `Engine.index` was asked for."""

    paths: Sequence[Path]
    labelled: tuple[LabelledSet, Path] | None
    """Captions, and the folder of the file they came from."""
    prune: bool | None
    exclude: Sequence[str] | None
    patches: bool | None
    on_progress: Callable[[Progress], None]


def index(engine: Engine, models: ModelChoice, request: Request) -> IngestReport:
    """Brings an index in step with the disk; the arguments and errors are `Engine.index`'s."""
    started = time.perf_counter()
    existing = engine.store if engine.has_index() else None
    absolute = [os.fsencode(os.path.abspath(path)) for path in request.paths]
    check_paths(existing, absolute)
    run = _Run(engine, models, request)
    # A model that cannot be had is told of before the work. That of an index is opened only when
    # there is work: a rescan that finds nothing new is over before it would be there.
    is_new = existing is None or existing.active_space() is None
    if is_new or engine.names_model() or request.patches:
        run.open_encoder()
    loaded = time.perf_counter()
    try:
        with engine.made_store().writer() as writer:
            report = run.go(writer)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted: everything committed so far is kept; run the same command again to go on"
        ) from None
    stages = {**report.stages, "load": report.stages.get("load", 0.0) + loaded - started}
    return dataclasses.replace(report, seconds=time.perf_counter() - started, stages=stages)


class _Run:
    def __init__(self, engine: Engine, models: ModelChoice, request: Request) -> None:
        self._engine = engine
        self._models = models
        self._request = request
        self._workers = engine.settings.workers
        self._encoder: Encoder | None = None
        self._is_other = False
        """Whether the index is to go over to another model than it has."""

    def open_encoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder, self._is_other = self._engine.encoder_for_index()
            if self._request.patches:  # a model that has none
                self._models.local_of(self._encoder.spec)
            if self._is_other:
                self._engine.notify(
                    f"embedding the index with '{self._encoder.spec.model}' beside its own model, "
                    "which answers searches until all is done"
                )
        return self._encoder

    def go(self, writer: Writer) -> IngestReport:
        store, request = self._engine.store, self._request
        if self._engine.names_model() and not self._is_other:
            writer.give_up_coming()
        begun = time.perf_counter()
        scopes = scopes_of(store, writer, request.paths, request.exclude, everything=self._is_other)
        plan = make_plan(store, scopes, prune=request.prune, labelled=request.labelled)
        scan = time.perf_counter() - begun
        with store.catalog.read() as connection:
            active = catalog.active_space(connection)
            coming = catalog.coming_space(connection)
            has_looks = catalog.has_looks(connection)
        if active is not None and coming is None and not self._is_other and plan.is_idle():
            writer.compact(only_if="short")
            report = _idle(plan, active)
        else:
            report = self._embed(writer, plan)
        wants_patches = has_looks if request.patches is None else request.patches
        report = self._keep_patches(writer, report, wants_patches)
        return dataclasses.replace(report, stages={**report.stages, "scan": scan})

    def _embed(self, writer: Writer, plan: Plan) -> IngestReport:
        from mmsearch.ingest.pipeline import Pipeline
        from mmsearch.ingest.sample import sample_of

        begun = time.perf_counter()
        encoder = self.open_encoder()
        count = len(plan.read) + (len(plan.same) if self._is_other else 0)
        how = encoder.spec.preprocess
        encoder = self._models.checked(encoder, count, lambda: sample_of(plan, how, self._workers))
        load = time.perf_counter() - begun
        beside = None
        if self._is_other:
            beside = writer.space_of(encoder.spec, encoder.precision, beside=True)
        report = Pipeline(
            self._engine.store,
            writer,
            encoder,
            workers=self._workers,
            beside=beside,
            on_progress=self._request.on_progress,
        ).run(plan)
        report = self._complete(writer, report, encoder, beside)
        stages = {**report.stages, "load": report.stages["load"] + load}
        return dataclasses.replace(report, stages=stages)

    def _complete(
        self, writer: Writer, report: IngestReport, encoder: Encoder, beside: SpaceRow | None
    ) -> IngestReport:
        """Embeds what has no vector yet, and goes over to another model when nothing lacks any."""
        from mmsearch.ingest.beside import embed_missing

        started = time.perf_counter()
        store = self._engine.store
        with store.catalog.read() as connection:
            active = catalog.active_space(connection)
            coming = catalog.coming_space(connection)
        if active is None or coming is None:  # all that there is was embedded by the run itself
            return report
        done = embed_missing(
            store,
            writer,
            encoder,
            beside or active,
            workers=self._workers,
            on_progress=self._request.on_progress,
        )
        report = dataclasses.replace(report, embedded_again=done.images)
        if beside is not None and done.lacking:
            report = dataclasses.replace(report, lacking=done.lacking)
        elif beside is not None:
            writer.switch_to(beside)
            report = dataclasses.replace(report, replaced=active.spec.model)
        stages = {**report.stages, "again": time.perf_counter() - started}
        return dataclasses.replace(report, stages=stages)

    def _keep_patches(self, writer: Writer, report: IngestReport, wanted: bool) -> IngestReport:
        store = self._engine.store
        started = time.perf_counter()
        with store.catalog.read() as connection:
            space = catalog.active_space(connection)
            has_looks = catalog.has_looks(connection)
            lacks_some = space is not None and wanted and catalog.lacks_looks(connection, space)
        if has_looks and not wanted:
            with writer.change() as change:
                change.remove_looks()
        if not lacks_some:
            return report
        from mmsearch.ingest.looks import add_looks

        try:
            local = self._engine.local_encoder()
        except UsageError as error:
            if not report.replaced:
                raise
            self._engine.notify(f"patches are no longer kept: {error}")
            return report
        looks = add_looks(
            store, writer, local, workers=self._workers, on_progress=self._request.on_progress
        )
        stages = {**report.stages, "patches": time.perf_counter() - started}
        return dataclasses.replace(report, looks=looks, stages=stages)


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

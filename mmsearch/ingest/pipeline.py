"""Brings an index in step with what lies on the disk: read, decode, encode, commit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mmsearch.encoders.base import Encoder
from mmsearch.ingest.files import FilesJob, PlanJob
from mmsearch.ingest.labels import CaptionChange, caption_change
from mmsearch.ingest.plan import Candidate, Plan
from mmsearch.ingest.reading import sidecar_of
from mmsearch.ingest.tally import Tally
from mmsearch.jobs.runner import BATCH, Runner, parts
from mmsearch.media.fingerprint import NEVER
from mmsearch.store.rows import Vector
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import TEXT, IngestReport, OnProgress, no_progress

#: For fewer files it takes longer to get ready for many at once than to embed them.
_FEW = 16
#: A report has these also where they took no time.
_STAGES = ("scan", "decode", "encode", "write", "load")


@dataclass
class Pipeline:
    """One run over one plan."""

    store: Store
    writer: Writer
    encoder: Encoder | None
    """Only for a plan with something to embed, or a new index."""
    runner: Runner
    on_progress: OnProgress = no_progress
    tally: Tally = field(default_factory=Tally)

    def run(self, plan: Plan) -> IngestReport:
        """Does what the plan says and reports it. An interrupt keeps what was committed."""
        tally, encoder, seconds = self.tally, self.encoder, 0.0
        touched, lost = plan.touched(), list[int]()
        for stage in _STAGES:
            tally.stages[stage] += 0.0
        self._settle_the_unread(plan)
        space = self.store.active_space()
        if space is None or plan.read or touched:
            assert encoder is not None, "a plan with something to embed"
            if len(plan.read) + len(touched) >= _FEW:
                encoder = encoder.with_streams(self.runner.workers)
            space = self.writer.space_of(encoder.spec, encoder.precision)
            with tally.timed("load"):
                self._warm_up(encoder, plan, touched)
            what = (self.store, self.writer, encoder, space, plan, tally)
            if touched:
                captions = _CaptionsJob(*what, touched)
                self.runner.run(captions, len(touched))
            if plan.read:
                started = time.perf_counter()
                files = FilesJob(*what, self.runner.decoders, self.on_progress)
                self.runner.run(files, len(plan.read))
                seconds = time.perf_counter() - started
                # Folders that are gone and whose every file was found elsewhere or removed.
                lost = [number for number, is_gone in files.is_root_gone.items() if is_gone]
        with tally.timed("write"):
            self._remove_gone(plan, lost)
            self.writer.compact(only_if="short")
        counts = tally.counts
        return plan.report(
            added=counts["added"],
            updated=counts["updated"],
            unchanged=len(plan.same) + counts["unchanged"],
            moved=counts["moved"],
            removed=counts["removed"],
            failed=counts["failed"],
            captions=counts["captions"],
            captions_removed=counts["captions_removed"],
            images_per_second=counts["embedded"] / seconds if seconds else 0.0,
            stages=dict(tally.stages),
            model=space.spec.model,
            precision=encoder.precision if encoder else space.precision,
            unread_sidecars=tuple(tally.unread_sidecars),
        )

    def _settle_the_unread(self, plan: Plan) -> None:
        """Records what the walk could not look at as failed, and forgets failures that are gone."""
        if not (plan.unreadable or plan.recovered):
            return
        with self.writer.change() as change:
            for root, found in plan.unreadable:
                reason = f"cannot be read: {found.reason}"
                change.record_failure(root.id, found.path, NEVER.size, NEVER.mtime_ns, reason)
            change.clear_failures(plan.recovered)
        self.tally.counts["failed"] += len(plan.unreadable)

    @staticmethod
    def _warm_up(encoder: Encoder, plan: Plan, touched: Sequence[Candidate]) -> None:
        """Compiles what the run will need, which is loading rather than encoding."""
        needs_text = bool(touched) or any(map(plan.may_differ, plan.read))
        for modality in encoder.spec.inputs:
            if needs_text if modality == TEXT else plan.read:
                encoder.warm_up(modality)

    def _remove_gone(self, plan: Plan, lost: Sequence[int]) -> None:
        for chunk in parts(list(plan.gone) if plan.prune else (), BATCH * 16):
            with self.writer.change() as change:
                change.remove_media(chunk)
            self.tally.counts["removed"] += len(chunk)
        if lost:
            with self.writer.change() as change:
                change.drop_empty_roots(lost)


@dataclass(frozen=True)
class _Captions:
    """What has to change of some files' captions, and the vectors of new ones."""

    changes: Sequence[tuple[Candidate, CaptionChange]]
    texts: Mapping[str, Vector]
    unread: Sequence[bytes]


@dataclass
class _CaptionsJob(PlanJob):
    """Brings the captions of unchanged files in step with captions file and sidecars."""

    touched: Sequence[Candidate]
    size: int = 16

    def missing(self) -> Iterator[Candidate]:
        return iter(self.touched)

    def read(self, item: Candidate) -> tuple[Candidate, tuple[str, ...], bytes]:
        return (item, *sidecar_of(item))

    def compute(self, reads: Sequence[tuple[Candidate, tuple[str, ...], bytes]]) -> _Captions:
        with self.store.catalog.read() as queries:
            present = queries.captions_of([item.known.id for item, _, _ in reads])
        changes = []
        for item, sidecar, _ in reads:
            rows = [(row.id, row.text, row.source) for row in present.get(item.known.id, ())]
            wanted = {"sidecar": sidecar, **self.plan.labels.wanted(item.key)}
            changes.append((item, caption_change(rows, wanted)))
        with self.tally.timed("encode"):
            vectors = self.encode(text for _, change in changes for text, _ in change.add)
        return _Captions(changes, vectors, [path for _, _, path in reads if path])

    def commit(self, outcomes: Sequence[_Captions]) -> None:
        with self.tally.timed("write"), self.writer.change() as change:
            for some in outcomes:
                self.tally.unread_sidecars += map(os.fsdecode, some.unread)
                for item, captions in some.changes:
                    self.apply(change, item.known.id, captions, some.texts)
                    change.set_sidecar(item.known.id, item.file.sidecar)

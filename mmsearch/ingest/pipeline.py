"""Brings an index in step with what lies on the disk: read, decode, encode, commit."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mmsearch.encoders.base import Encoder
from mmsearch.ingest.files import FilesJob, apply_captions, encode_texts
from mmsearch.ingest.labels import CaptionChange, caption_change
from mmsearch.ingest.plan import Candidate, Plan
from mmsearch.ingest.reading import sidecar_of
from mmsearch.jobs.runner import BATCH, Runner, parts
from mmsearch.media.fingerprint import NEVER
from mmsearch.store.rows import SpaceRow, Vector
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import TEXT, IngestReport, OnProgress, Progress, no_progress

#: For fewer files it takes longer to get ready for many at once than to embed them.
_FEW = 16
_STAGES = ("scan", "decode", "encode", "write", "load")


class Pipeline:
    """One run over one plan."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        encoder: Encoder | None,
        runner: Runner,
        *,
        on_progress: OnProgress = no_progress,
    ) -> None:
        """Takes what a run needs; an encoder only for a plan that `needs_encoder`."""
        self._store = store
        self._writer = writer
        self._bulk = encoder
        self._runner = runner
        self._on_progress = on_progress
        self._counts: Counter[str] = Counter()
        self._unread_sidecars: list[str] = []
        self._stages = dict.fromkeys(_STAGES, 0.0)
        self._lost: list[int] = []

    @property
    def _encoder(self) -> Encoder:
        assert self._bulk is not None, "a plan with something to embed"
        return self._bulk

    def run(self, plan: Plan) -> IngestReport:
        """Does what the plan says and reports it. An interrupt keeps what was committed."""
        touched = plan.touched()
        if self._bulk is not None and len(plan.read) + len(touched) >= _FEW:
            self._bulk = self._bulk.with_streams(self._runner.workers)
        space = self._store.active_space()
        if space is None or plan.read or touched:
            space = self._writer.space_of(self._encoder.spec, self._encoder.precision)
        self._warm_up(plan, touched)
        self._settle_the_unread(plan)
        if touched:
            captions = _CaptionsJob(self._store, self._writer, self._encoder, space, plan, touched)
            self._runner.run(captions, len(touched))
            self._count(captions.counts, captions.stages, captions.unread_sidecars)
        seconds = self._read(plan, space) if plan.read else 0.0
        started = time.perf_counter()
        self._remove_gone(plan)
        self._writer.compact(only_if="short")
        self._stages["write"] += time.perf_counter() - started
        return self._report(plan, space, seconds)

    def _read(self, plan: Plan, space: SpaceRow) -> float:
        """Reads the plan's files; how many seconds that took."""
        started = time.perf_counter()
        files = FilesJob(
            self._store, self._writer, self._encoder, space, self._runner.decoders, plan,
            lambda done: self._on_progress(Progress("index", done, len(plan.read))),
        )  # fmt: skip
        self._runner.run(files, len(plan.read))
        self._count(files.counts, files.stages, files.unread_sidecars)
        # Folders that are gone and whose every file was found elsewhere or removed.
        self._lost = [number for number, is_lost in files.is_lost.items() if is_lost]
        return time.perf_counter() - started

    def _count(
        self, counts: Counter[str], stages: Mapping[str, float], unread: Sequence[str]
    ) -> None:
        self._counts += counts
        self._unread_sidecars += unread
        for name, seconds in stages.items():
            self._stages[name] += seconds

    def _report(self, plan: Plan, space: SpaceRow, seconds: float) -> IngestReport:
        counts = self._counts
        embedded = counts["embedded"]
        return IngestReport(
            added=counts["added"],
            updated=counts["updated"],
            unchanged=len(plan.same) + counts["unchanged"],
            moved=counts["moved"],
            removed=counts["removed"],
            failed=counts["failed"],
            captions=counts["captions"],
            captions_removed=counts["captions_removed"],
            known_bad=plan.known_bad,
            images_per_second=embedded / seconds if embedded else 0.0,
            stages=dict(self._stages),
            model=space.spec.model,
            precision=self._bulk.precision if self._bulk else space.precision,
            kept_roots=tuple(plan.kept_roots),
            unmatched_captions=plan.labels.unmatched,
            unread_sidecars=tuple(self._unread_sidecars),
        )

    def _warm_up(self, plan: Plan, touched: Sequence[Candidate]) -> None:
        """Compiles what the run will need, which is loading rather than encoding."""
        started = time.perf_counter()
        if plan.read:
            for modality in self._encoder.spec.inputs:
                if modality != TEXT:
                    self._encoder.warm_up(modality)
        if touched or any(plan.may_differ(item) for item in plan.read):
            self._encoder.warm_up(TEXT)
        self._stages["load"] += time.perf_counter() - started

    def _settle_the_unread(self, plan: Plan) -> None:
        """Enters what the walk could not look at, and strikes what is gone, off the ledger."""
        if not (plan.unreadable or plan.healed):
            return
        with self._writer.change() as change:
            for root, found in plan.unreadable:
                reason = f"cannot be read: {found.reason}"
                change.record_failure(root.id, found.path, NEVER.size, NEVER.mtime_ns, reason)
                self._counts["failed"] += 1
            change.clear_failures(plan.healed)

    def _remove_gone(self, plan: Plan) -> None:
        for chunk in parts(list(plan.gone) if plan.prune else (), BATCH * 16):
            with self._writer.change() as change:
                change.remove_media(chunk)
            self._counts["removed"] += len(chunk)
        if self._lost:
            with self._writer.change() as change:
                change.drop_empty_roots(self._lost)


@dataclass(frozen=True)
class _Captions:
    """What has to change of some files' captions, and the vectors of new ones."""

    changes: Sequence[tuple[Candidate, CaptionChange]]
    texts: Mapping[str, Vector]
    unread: Sequence[bytes]
    seconds: float


@dataclass
class _CaptionsJob:
    """Brings the captions of unchanged files in step with captions file and sidecars."""

    store: Store
    writer: Writer
    encoder: Encoder
    space: SpaceRow
    plan: Plan
    touched: Sequence[Candidate]
    size: int = 16
    counts: Counter[str] = field(default_factory=Counter)
    stages: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "write": 0.0})
    unread_sidecars: list[str] = field(default_factory=list)

    def missing(self) -> Iterator[Candidate]:
        return iter(self.touched)

    def read(self, item: Candidate) -> tuple[Candidate, tuple[str, ...], bytes]:
        return (item, *sidecar_of(item))

    def compute(self, reads: Sequence[tuple[Candidate, tuple[str, ...], bytes]]) -> _Captions:
        with self.store.catalog.read() as queries:
            present = queries.captions_of([item.known.id for item, _, _ in reads])
        changes, unread = [], []
        for item, sidecar, unreadable in reads:
            rows = [(row.id, row.text, row.source) for row in present.get(item.known.id, ())]
            if unreadable:
                unread.append(unreadable)
            wanted = {"sidecar": sidecar, **self.plan.labels.wanted(item.key)}
            changes.append((item, caption_change(rows, wanted)))
        texts = dict.fromkeys(text for _, change in changes for text, _ in change.add)
        started = time.perf_counter()
        vectors = encode_texts(self.encoder, list(texts))
        return _Captions(changes, vectors, unread, time.perf_counter() - started)

    def commit(self, outcomes: Sequence[_Captions]) -> None:
        started = time.perf_counter()
        with self.writer.change() as change:
            for some in outcomes:
                self.unread_sidecars += map(os.fsdecode, some.unread)
                for item, captions in some.changes:
                    apply_captions(
                        change, self.space, item.known.id, captions, some.texts, self.counts
                    )
                    change.set_sidecar(item.known.id, item.sidecar)
        self.stages["encode"] += sum(some.seconds for some in outcomes)
        self.stages["write"] += time.perf_counter() - started

"""Brings an index in step with what lies on the disk: read, decode, encode, commit.

Worker threads read, decode and encode; the calling thread commits, a batch at a time and in the
plan's order, while the workers are at the next ones. There are as many workers as cores, and the
runtime computes a worker's pictures on one core: decoding and encoding never fight over cores, and
none waits while there is anything left to do. What a batch committed stays, whatever happens
after it.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.encoders.base import Encoder
from mmsearch.ingest.labels import CaptionChange, caption_change
from mmsearch.ingest.plan import Candidate, Plan
from mmsearch.ingest.reading import Reading, read, sidecar_of
from mmsearch.media.fingerprint import NEVER
from mmsearch.media.isolated import Decoders, Picture
from mmsearch.store import lookups
from mmsearch.store.changes import Change, NewCaption, NewMedia
from mmsearch.store.filters import local_time, stored_time
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import IngestReport, Progress

#: Files that are committed together, and texts that are encoded together.
BATCH, TEXTS = 64, 64
_AHEAD = 2  # batches that are read, and batches that are encoded, before they are committed

OnProgress = Callable[[Progress], None]
Vector = NDArray[np.float32] | bytes


_STAGES = ("scan", "decode", "encode", "write", "load")


class Pipeline:
    """One run over one plan."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        encoder: Encoder | None,
        decoders: Decoders,
        *,
        workers: int,
        on_progress: OnProgress = lambda progress: None,
    ) -> None:
        """Takes what a run needs; an encoder only for a plan that `needs_encoder`."""
        self._store = store
        self._writer = writer
        self._bulk = encoder.bulk(workers) if encoder is not None else None
        self._decoders = decoders
        self._workers = workers
        self._on_progress = on_progress
        self._counts: Counter[str] = Counter()
        self._unread_sidecars: list[str] = []
        self._embedded = 0
        self._stages = dict.fromkeys(_STAGES, 0.0)
        self._done = 0

    @property
    def _encoder(self) -> Encoder:
        assert self._bulk is not None, "a plan with something to embed"
        return self._bulk

    def run(self, plan: Plan) -> IngestReport:
        """Does what the plan says and reports it. An interrupt keeps what was committed."""
        self._plan = plan
        self._touched = plan.touched()
        present = self._store.active_space()
        if present is None or plan.read or self._touched:
            present = self._writer.space_of(self._encoder.spec, self._encoder.precision)
        self._space = present
        with self._store.catalog.read() as connection:
            self._roots = {root.id: root for root in lookups.roots(connection)}
            self._is_first = not lookups.has_media(connection)
        self._read_roots = {item.root.id for item in plan.read}
        self._is_lost: dict[int, bool] = {}
        self._left: dict[bytes, deque[int]] = {}
        self._changing = defaultdict[bytes, list[int]](list)
        for item in plan.read:
            if item.old is not None:
                self._changing[item.old.content_hash].append(item.old.id)
        self._left_behind: dict[bytes, list[NewCaption]] = {}
        self._warm_up()
        self._settle_the_unread()
        self._refresh_captions()
        started = time.perf_counter()
        with self._decoders.threads(self._workers) as pool:
            for batch in self._batches(pool):
                self._take_in(batch)
        seconds = time.perf_counter() - started
        self._remove_gone()
        self._forget_lost_roots()
        with self._timed("write"):
            self._writer.compact(only_if="short")
        return self._report(seconds)

    def _report(self, seconds: float) -> IngestReport:
        plan, counts = self._plan, self._counts
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
            images_per_second=self._embedded / seconds if self._embedded else 0.0,
            stages=dict(self._stages),
            model=self._space.spec.model,
            precision=self._bulk.precision if self._bulk else self._space.precision,
            kept_roots=tuple(plan.kept_roots),
            unmatched_captions=plan.labels.unmatched,
            unread_sidecars=tuple(self._unread_sidecars),
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._stages[stage] += time.perf_counter() - started

    def _warm_up(self) -> None:
        """Compiles what the run will need, which is loading rather than encoding."""
        plan = self._plan
        with self._timed("load"):
            if plan.read:
                self._encoder.warm_up("image")
            if self._touched or any(plan.may_differ(item) for item in plan.read):
                self._encoder.warm_up("caption")

    # -- what needs no decoding ------------------------------------------------------------

    def _settle_the_unread(self) -> None:
        """Enters what the walk could not look at, and strikes what is gone, off the ledger."""
        plan = self._plan
        if not (plan.unreadable or plan.healed):
            return
        with self._timed("write"), self._writer.change() as change:
            for root, found in plan.unreadable:
                reason = f"cannot be read: {found.reason}"
                change.record_failure(root.id, found.path, NEVER.size, NEVER.mtime_ns, reason)
                self._counts["failed"] += 1
            change.clear_failures(plan.healed)

    def _refresh_captions(self) -> None:
        """Brings the captions of unchanged files in step with captions file and sidecars."""
        for start in range(0, len(self._touched), BATCH):
            batch = self._touched[start : start + BATCH]
            with self._store.catalog.read() as connection:
                present = lookups.captions_of(connection, [item.old.id for item in batch])
            changes = []
            for item in batch:
                rows = [(row.id, row.text, row.source) for row in present.get(item.old.id, ())]
                sidecar, unread = sidecar_of(item)
                self._note_sidecar(unread)
                changes.append(caption_change(rows, self._wanted(item, sidecar)))
            unique = dict.fromkeys(text for change in changes for text, _ in change.add)
            with self._decoders.threads(self._workers) as pool:
                vectors = self._collect(self._submit_texts(pool, list(unique)))
            with self._timed("write"), self._writer.change() as change:
                for item, captions in zip(batch, changes, strict=True):
                    self._apply_captions(change, item.old.id, captions, vectors)
                    change.set_sidecar(item.old.id, item.sidecar)

    def _note_sidecar(self, unread: bytes) -> None:
        if unread:
            self._unread_sidecars.append(os.fsdecode(unread))

    def _wanted(self, candidate: Candidate, sidecar: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """The captions that each source has for a file; a source that says nothing is absent."""
        return {"sidecar": sidecar, **self._plan.labels.wanted(candidate.key)}

    def _apply_captions(
        self, change: Change, media_id: int, captions: CaptionChange, vectors: dict[str, Vector]
    ) -> None:
        change.remove_captions(captions.remove)
        self._counts["captions_removed"] += len(captions.remove)
        for source, numbers in captions.keep.items():
            change.set_source(numbers, source)
        new = [NewCaption(text, source, vectors[text]) for text, source in captions.add]
        change.add_captions(media_id, new, self._space)
        self._counts["captions"] += len(new)

    def _remove_gone(self) -> None:
        ids = list(self._plan.gone) if self._plan.prune else []
        for start in range(0, len(ids), BATCH * 16):
            chunk = ids[start : start + BATCH * 16]
            with self._timed("write"), self._writer.change() as change:
                change.remove_media(chunk)
            self._counts["removed"] += len(chunk)

    def _forget_lost_roots(self) -> None:
        """Drops folders that are gone and whose every file was found elsewhere or removed."""
        lost = [number for number, is_lost in self._is_lost.items() if is_lost]
        if lost:
            with self._writer.change() as change:
                change.drop_empty_roots(lost)

    # -- reading and encoding, by workers ----------------------------------------------------

    def _batches(self, pool: ThreadPoolExecutor) -> Iterator[_Batch]:
        """Batches in the plan's order, their vectors on the way; only a few are held at a time."""
        reading: deque[Future[Reading]] = deque()
        encoding: deque[_Batch] = deque()
        files = iter(self._plan.read)
        while True:
            while len(reading) < _AHEAD * BATCH and (candidate := next(files, None)):
                reading.append(pool.submit(self._read, candidate))
            is_behind = not encoding or (len(encoding) < _AHEAD and not encoding[0].is_done())
            if reading and is_behind:
                count = min(BATCH, len(reading))
                readings = [reading.popleft().result() for _ in range(count)]
                self._stages["decode"] += sum(one.seconds for one in readings)
                encoding.append(self._begin(pool, readings))
            elif encoding:
                yield encoding.popleft()
            else:
                return

    def _read(self, candidate: Candidate) -> Reading:
        return read(candidate, self._encoder.spec.preprocess, self._is_known, self._decoders)

    def _is_known(self, digest: bytes) -> bool:
        if self._is_first:  # nothing is known, and asking for each file would cost its share
            return False
        with self._store.catalog.read() as connection:
            return lookups.has_content(connection, digest)

    def _begin(self, pool: ThreadPoolExecutor, readings: Sequence[Reading]) -> _Batch:
        """Hands what must be encoded to the workers."""
        good = [reading for reading in readings if not reading.reason]
        sources: dict[bytes, _Source] = {}
        digests = dict.fromkeys(reading.digest for reading in good)
        with self._store.catalog.read() as connection:
            embedded = lookups.embedded_contents(connection, self._space, digests)
        for digest, (row, vector) in embedded.items():
            sources[digest] = _Source(row=row, vector=vector)
        for reading in good:
            if reading.digest not in sources:
                picture = reading.picture
                if picture is None:  # known when it was read, removed since: decode after all
                    how = self._encoder.spec.preprocess
                    again = read(reading.candidate, how, lambda digest: False, self._decoders)
                    picture = again.picture if again.digest == reading.digest else None
                if picture is not None:
                    sources[reading.digest] = _Source(picture=picture)
        new = [digest for digest, source in sources.items() if source.vector is None]
        size = self._encoder.batch
        pictures = [
            pool.submit(self._encode_pictures, {digest: sources[digest].pixels for digest in some})
            for some in (new[start : start + size] for start in range(0, len(new), size))
        ]
        unique = dict.fromkeys(
            text
            for reading in good
            for part in self._wanted(reading.candidate, reading.sidecar_captions).values()
            for text in part
        )
        return _Batch(readings, sources, pictures, self._submit_texts(pool, list(unique)))

    def _encode_pictures(self, pixels: dict[bytes, NDArray[np.uint8]]) -> _Encoded:
        started = time.perf_counter()
        rows = self._encoder.encode_images(np.stack(list(pixels.values())))
        vectors: dict[Any, Vector] = dict(zip(pixels, rows, strict=True))
        return _Encoded(vectors, time.perf_counter() - started)

    def _encode_texts(self, texts: Sequence[str]) -> _Encoded:
        started = time.perf_counter()
        vectors: dict[Any, Vector] = dict(
            zip(texts, self._encoder.encode_texts(texts), strict=True)
        )
        return _Encoded(vectors, time.perf_counter() - started)

    def _submit_texts(
        self, pool: ThreadPoolExecutor, texts: Sequence[str]
    ) -> list[Future[_Encoded]]:
        # In portions: one sidecar may hold thousands of lines.
        return [
            pool.submit(self._encode_texts, texts[start : start + TEXTS])
            for start in range(0, len(texts), TEXTS)
        ]

    def _collect(self, encoded: Iterable[Future[_Encoded]]) -> dict[Any, Vector]:
        """The vectors that workers made, by content hash or by text."""
        found: dict[Any, Vector] = {}
        for future in encoded:
            one = future.result()
            found.update(one.vectors)
            self._stages["encode"] += one.seconds
        return found

    # -- committing --------------------------------------------------------------------------

    def _take_in(self, batch: _Batch) -> None:
        sources = batch.sources
        vectors = self._collect(batch.pictures)
        self._embedded += len(vectors)
        vectors.update((d, one.vector) for d, one in sources.items() if one.vector is not None)
        texts = self._collect(batch.texts)
        self._look_for_the_left(sources)
        with self._timed("write"), self._writer.change() as change:
            for reading in batch.readings:
                if reading.reason:
                    self._note_failure(change, reading)
            # Of those that are not, the file has changed again: the next run takes it.
            good = [one for one in batch.readings if not one.reason and one.digest in sources]
            change.clear_failures(one.candidate.key for one in good)
            for reading in good:
                self._note_sidecar(reading.unread_sidecar)
                self._enter(change, reading, sources[reading.digest], vectors, texts)
        self._done += len(batch.readings)
        with self._timed("write"):
            self._writer.compact(only_if="long")
        self._on_progress(Progress("index", self._done, len(self._plan.read)))

    def _note_failure(self, change: Change, reading: Reading) -> None:
        candidate, stamp = reading.candidate, reading.stamp
        change.record_failure(
            candidate.root.id, candidate.file.path, stamp.size, stamp.mtime_ns, reading.reason
        )
        self._counts["failed"] += 1
        # A file that cannot be read just now keeps what was indexed of it; a damaged one does not.
        if candidate.old is not None and stamp != NEVER:
            self._remove_old(change, candidate.old)

    def _enter(
        self,
        change: Change,
        reading: Reading,
        source: _Source,
        vectors: dict[bytes, Vector],
        texts: dict[str, Vector],
    ) -> None:
        """Writes one good file: as new, changed, moved, or only touched."""
        old = reading.candidate.old
        if old is not None and old.content_hash == reading.digest:
            self._keep(change, old.id, reading, texts)
            self._counts["unchanged"] += 1
            return
        inherited = self._inherited(change, reading)
        if old is not None:
            self._remove_old(change, old)
        if left := self._left.get(reading.digest):
            moved = left.popleft()
            self._plan.gone.pop(moved, None)
            self._keep(change, moved, reading, texts)
            self._counts["moved"] += 1
            return
        self._add(change, reading, source, vectors[reading.digest], texts, inherited)
        if old is None:
            self._counts["added"] += 1
        else:
            self._counts["updated"] += 1

    def _look_for_the_left(self, contents: Iterable[bytes]) -> None:
        """Finds the media of some contents whose files are gone.

        Once a run for each content, which may have any number of copies.
        """
        with self._store.catalog.read() as connection:
            for digest in contents:
                if digest in self._left:
                    continue
                if rows := lookups.media_with_content(connection, digest):
                    left = (number for number, root in rows if self._has_left(number, root))
                    self._left[digest] = deque(left)

    def _has_left(self, media_id: int, root_id: int) -> bool:
        """Whether the file of a medium is gone: by this run's scan, or with its whole root."""
        if media_id in self._plan.gone:
            return True
        if root_id not in self._is_lost:
            root = self._roots.get(root_id)
            self._is_lost[root_id] = (
                root is not None
                and root_id not in self._read_roots
                and not os.path.lexists(root.path)
            )
        return self._is_lost[root_id]

    def _inherited(self, change: Change, reading: Reading) -> list[NewCaption]:
        """The captions that a new or changed file takes over, as a captions file gave them once.

        They belong to the content where that had a name that now has another, and else to the
        name: an edited picture keeps its captions. A run without the captions file must not lose
        them.
        """
        old = reading.candidate.old
        wanted = self._plan.labels.wanted(reading.candidate.key)
        if any(wanted.values()):
            return []
        if reading.digest in self._changing:
            found = self._captions_left_behind(change, reading.digest)
        else:
            found = change.given_captions(old.id, self._space) if old is not None else []
        return [one for one in found if one.source not in wanted]

    def _captions_left_behind(self, change: Change, digest: bytes) -> list[NewCaption]:
        """What the files that had a content before this run, and are read anew, had of captions."""
        if digest not in self._left_behind:
            given = (
                change.given_captions(one, self._space) for one in sorted(self._changing[digest])
            )
            self._left_behind[digest] = next(filter(None, given), [])
        return self._left_behind[digest]

    def _remove_old(self, change: Change, old: Any) -> None:
        self._captions_left_behind(change, old.content_hash)  # before they are gone
        change.remove_media([old.id])

    def _keep(
        self, change: Change, media_id: int, reading: Reading, texts: dict[str, Vector]
    ) -> None:
        candidate, stamp = reading.candidate, reading.stamp
        change.set_file(
            media_id,
            root_id=candidate.root.id,
            path=candidate.file.path,
            size=stamp.size,
            mtime_ns=stamp.mtime_ns,
            modified=local_time(stamp.mtime_ns),
        )
        rows = change.captions_of(media_id)
        wanted = self._wanted(candidate, reading.sidecar_captions)
        self._apply_captions(change, media_id, caption_change(rows, wanted), texts)
        change.set_sidecar(media_id, candidate.sidecar)

    def _add(
        self,
        change: Change,
        reading: Reading,
        source: _Source,
        vector: Vector,
        texts: dict[str, Vector],
        inherited: Sequence[NewCaption],
    ) -> None:
        candidate, stamp = reading.candidate, reading.stamp
        width, height, captured, captured_from = source.facts(stamp.mtime_ns)
        captions = caption_change((), self._wanted(candidate, reading.sidecar_captions)).add
        change.add_media(
            NewMedia(
                root_id=candidate.root.id,
                path=candidate.file.path,
                size=stamp.size,
                mtime_ns=stamp.mtime_ns,
                content_hash=reading.digest,
                width=width,
                height=height,
                captured=captured,
                captured_from=captured_from,
                vector=vector,
                captions=(
                    *inherited,
                    *(NewCaption(text, origin, texts[text]) for text, origin in captions),
                ),
                sidecar=candidate.sidecar,
            ),
            self._space,
        )
        self._counts["captions"] += len(captions)


@dataclass(frozen=True)
class _Encoded:
    """What a worker encoded, and how long it took."""

    vectors: dict[Any, Vector]
    seconds: float


@dataclass
class _Source:
    """Where one content's vector comes from: a media row that has it, or a picture."""

    row: Any = None
    vector: bytes | None = None
    picture: Picture | None = None

    @property
    def pixels(self) -> NDArray[np.uint8]:
        assert self.picture is not None
        return self.picture.pixels

    def facts(self, mtime_ns: int) -> tuple[int, int, str, str]:
        """Width, height, capture time, and where that comes from."""
        if self.picture is not None:
            width, height, captured = (
                self.picture.width, self.picture.height, self.picture.captured,
            )  # fmt: skip
        else:
            row = self.row
            width, height = row.width, row.height
            known = row.captured_from == "exif"
            captured = datetime.fromisoformat(row.captured) if known else None
        if captured is not None:
            return width, height, stored_time(captured), "exif"
        return width, height, local_time(mtime_ns), "mtime"


@dataclass(frozen=True)
class _Batch:
    """Files that were read, and what workers encode of them."""

    readings: Sequence[Reading]
    sources: dict[bytes, _Source]
    pictures: list[Future[_Encoded]]
    texts: list[Future[_Encoded]]

    def is_done(self) -> bool:
        return all(future.done() for future in (*self.pictures, *self.texts))

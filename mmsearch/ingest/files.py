"""The job of indexing: files that are new or changed become media, segments and captions."""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from mmsearch.encoders.base import Encoder
from mmsearch.ingest.labels import CaptionChange, caption_change
from mmsearch.ingest.plan import Candidate, Plan
from mmsearch.ingest.reading import Decoded, decode, sidecar_of
from mmsearch.ingest.tally import Tally
from mmsearch.jobs.runner import parts
from mmsearch.media.fingerprint import NEVER
from mmsearch.media.sandbox import Decoders
from mmsearch.store.mutations import Change
from mmsearch.store.rows import (
    EMBEDDED,
    CaptionRecord,
    MediaRecord,
    MediaRow,
    SegmentRecord,
    SpaceRow,
    Vector,
)
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import TEXT, Facts, Modality, OnProgress, Progress

_TEXTS = 64  # that are encoded together


#: A file of the plan, and what was read of it.
Read = tuple[Candidate, Decoded]
#: The same with where its record will be, for a file that is embedded for all with its content.
Claimed = tuple[Future[MediaRecord], Candidate, Decoded]


@dataclass(frozen=True)
class Outcome:
    """What goes into the catalog of some files."""

    good: Sequence[tuple[Read, Future[MediaRecord]]]
    """Each with a record of its content, as it, a copy or the index has it."""
    bad: Sequence[Read]
    texts: Mapping[str, Vector]
    """The vectors of their captions."""
    embedded: int


@dataclass
class PlanJob:
    """What the jobs of one run over a plan have in common."""

    store: Store
    writer: Writer
    encoder: Encoder
    space: SpaceRow
    plan: Plan
    tally: Tally

    def encode(self, texts: Iterable[str]) -> dict[str, Vector]:
        """The vectors of texts, in portions: one sidecar may hold thousands of lines."""
        found: dict[str, Vector] = {}
        for some in parts(dict.fromkeys(texts), _TEXTS):
            found.update(zip(some, self.encoder.encode(TEXT, some), strict=True))
        return found

    def apply(
        self, change: Change, media_id: int, captions: CaptionChange, texts: Mapping[str, Vector]
    ) -> None:
        """Brings the captions of a file in step with what they should be, and counts it."""
        change.remove_captions(captions.remove)
        self.tally.counts["captions_removed"] += len(captions.remove)
        for source, numbers in captions.keep.items():
            change.set_source(numbers, source)
        new = [CaptionRecord(text, source, texts[text]) for text, source in captions.add]
        change.add_captions(media_id, new, self.space)
        self.tally.counts["captions"] += len(new)


@dataclass
class FilesJob(PlanJob):
    """One run over a plan's files. A `mmsearch.jobs.runner.Job`."""

    decoders: Decoders
    on_progress: OnProgress

    def __post_init__(self) -> None:
        self.counts = self.tally.counts
        self._inputs = {
            modality: spec
            for modality, spec in self.encoder.spec.inputs.items()
            if modality != TEXT
        }
        self._claims: dict[bytes, Future[MediaRecord]] = {}
        self._lock = threading.Lock()
        with self.store.catalog.read() as queries:
            self._roots = {root.id: root for root in queries.roots()}
            self._is_first = not queries.has_media()  # then to ask for each file is of no use
        self._read_roots = {item.root.id for item in self.plan.read}
        self.is_root_gone: dict[int, bool] = {}
        """For roots that were looked at because of a move: whether they are gone as a whole."""
        self._moved: dict[bytes, deque[int]] = {}
        self._changing = defaultdict[bytes, list[int]](list)
        for item in self.plan.read:
            if item.old is not None:
                self._changing[item.old.content_hash].append(item.old.id)
        self._replaced: dict[bytes, list[CaptionRecord]] = {}

    @property
    def size(self) -> int:
        return max(16, self.encoder.batch)

    def missing(self) -> Iterator[Candidate]:
        return iter(self.plan.read)

    # -- by workers --------------------------------------------------------------------------

    def read(self, item: Candidate) -> Read:
        """Reads a file once: hashes it, and decodes it only where its content is not known.

        Never raises for what is wrong with the file: that is the outcome's `reason`.
        """
        stored = None
        with self.tally.timed("decode"), self.decoders.open(item.absolute) as file:
            if not (file.reason or self._is_first):
                stored = self._stored([file.digest]).get(file.digest)
            found = Decoded(file.stamp, file.digest) if stored else decode(file, self._inputs)
        if stored is None and not (found.reason or found.segments):
            found = replace(found, reason="holds nothing that the index's model embeds")
        if TEXT not in self.space.towers:
            found = replace(found, captions=())
        if found.reason:
            return item, found
        sidecar, unread = sidecar_of(item)
        return item, replace(found, stored=stored, sidecar=sidecar, unread_sidecar=unread)

    def compute(self, reads: Sequence[Read]) -> Outcome:
        good = [(item, file) for item, file in reads if not file.reason]
        # What was committed since they were read, too.
        stored = self._stored({file.digest for _, file in good if file.stored is None})
        own: list[Claimed] = []
        claims = [
            ((item, file), self._claim(item, file, file.stored or stored.get(file.digest), own))
            for item, file in good
        ]
        try:
            wanted = (part for one in good for part in self._wanted(*one).values())
            texts = [text for part in wanted for text in part]
            texts += [caption.text for _, _, file in own for caption in file.captions]
            with self.tally.timed("encode"):
                vectors = self.encode(texts)
                self._embed(own, vectors)
        except BaseException as error:
            for claim, _, _ in own:  # others may wait for it
                if not claim.done():
                    claim.set_exception(error)
            raise
        bad = [(item, file) for item, file in reads if file.reason]
        return Outcome(claims, bad, vectors, len(own))

    def _claim(
        self, item: Candidate, file: Decoded, stored: MediaRecord | None, own: list[Claimed]
    ) -> Future[MediaRecord]:
        """Where a content's record will be: of several files with the same, one is embedded."""
        if stored is not None:
            found: Future[MediaRecord] = Future()
            found.set_result(stored)
            return found
        with self._lock:
            if file.digest in self._claims:
                return self._claims[file.digest]
            claim = self._claims[file.digest] = Future()
        own.append((claim, item, file))
        return claim

    def _stored(self, digests: Iterable[bytes]) -> dict[bytes, MediaRecord]:
        """What the index has of some contents already."""
        with self.store.catalog.read() as queries:
            return queries.records_with(self.space, digests, EMBEDDED.__eq__)

    def _embed(self, own: Sequence[Claimed], texts: Mapping[str, Vector]) -> None:
        places: dict[Modality, list[tuple[int, int]]] = {}
        for number, (_, _, file) in enumerate(own):
            for place, segment in enumerate(file.segments):
                places.setdefault(segment.modality, []).append((number, place))
        vectors: dict[tuple[int, int], Vector] = {}
        for modality, those in places.items():
            for some in parts(those, self.encoder.batch):
                batch = [own[number][2].segments[place].data for number, place in some]
                vectors.update(zip(some, self.encoder.encode(modality, batch), strict=True))
        for number, (claim, item, file) in enumerate(own):
            segments = [
                SegmentRecord(part.modality, vectors[number, place], part.start_ms, part.end_ms)
                for place, part in enumerate(file.segments)
            ]
            captions = [
                CaptionRecord(c.text, EMBEDDED, texts[c.text], c.segment, c.language)
                for c in file.captions
            ]
            claim.set_result(_record(item, file, file.facts, segments, captions))

    def _wanted(self, item: Candidate, file: Decoded) -> dict[str, tuple[str, ...]]:
        """The captions that each source has for a file; a source that says nothing is absent."""
        if TEXT not in self.space.towers:
            return {}
        return {"sidecar": file.sidecar, **self.plan.labels.wanted(item.key)}

    # -- committing --------------------------------------------------------------------------

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        with self.tally.timed("write"):
            good = [(one, claim.result()) for some in outcomes for one, claim in some.good]
            bad = [one for some in outcomes for one in some.bad]
            texts = {text: vector for some in outcomes for text, vector in some.texts.items()}
            self._look_for_moved(file.digest for (_, file), _ in good)
            with self.writer.change() as change:
                for item, file in bad:
                    self._note_failure(change, item, file)
                change.clear_failures(item.key for (item, _), _ in good)
                for (item, file), record in good:
                    self._enter(change, item, file, record, texts)
            with self._lock:  # from now on the catalog tells
                for (_, file), _ in good:
                    self._claims.pop(file.digest, None)
            self.writer.compact(only_if="long")
        unread = [file.unread_sidecar for (_, file), _ in good if file.unread_sidecar]
        self.tally.unread_sidecars += map(os.fsdecode, unread)
        self.counts["embedded"] += sum(one.embedded for one in outcomes)
        self.counts["done"] += len(good) + len(bad)
        self.on_progress(Progress("index", self.counts["done"], len(self.plan.read)))

    def _note_failure(self, change: Change, item: Candidate, file: Decoded) -> None:
        size, mtime_ns = file.stamp
        change.record_failure(item.root.id, item.file.path, size, mtime_ns, file.reason)
        self.counts["failed"] += 1
        # A file that cannot be read just now keeps what was indexed of it; a damaged one does not.
        if item.old is not None and file.stamp != NEVER:
            self._remove_old(change, item.old)

    def _enter(
        self,
        change: Change,
        item: Candidate,
        file: Decoded,
        record: MediaRecord,
        texts: Mapping[str, Vector],
    ) -> None:
        """Writes one good file: as new, changed, moved, or only touched."""
        old = item.old
        if old is not None and old.content_hash == file.digest:
            self._keep(change, old.id, item, file, texts)
            self.counts["unchanged"] += 1
            return
        inherited = self._inherited(change, item, file.digest)
        if old is not None:
            self._remove_old(change, old)
        if gone := self._moved.get(file.digest):
            moved = gone.popleft()
            self.plan.gone.pop(moved, None)
            self._keep(change, moved, item, file, texts)
            self.counts["moved"] += 1
            return
        self._add(change, item, file, record, texts, inherited)
        self.counts["added" if old is None else "updated"] += 1

    def _look_for_moved(self, contents: Iterable[bytes]) -> None:
        """Finds the media of some contents whose files are gone.

        Once a run for each content, which may have any number of copies.
        """
        with self.store.catalog.read() as queries:
            for digest in contents:
                if digest not in self._moved and (rows := queries.media_with_content(digest)):
                    gone = (number for number, root in rows if self._is_gone(number, root))
                    self._moved[digest] = deque(gone)

    def _is_gone(self, media_id: int, root_id: int) -> bool:
        """Whether the file of a medium is gone: by this run's scan, or with its whole root."""
        if media_id in self.plan.gone:
            return True
        if root_id not in self.is_root_gone:
            root = self._roots.get(root_id)
            self.is_root_gone[root_id] = (
                root is not None
                and root_id not in self._read_roots
                and not os.path.lexists(root.path)
            )
        return self.is_root_gone[root_id]

    def _inherited(self, change: Change, item: Candidate, digest: bytes) -> list[CaptionRecord]:
        """The captions that a new or changed file takes over, as a captions file gave them once.

        They belong to the content where that had a name that now has another, and else to the
        name: an edited picture keeps its captions. A run without the captions file must not lose
        them.
        """
        old = item.old
        wanted = self.plan.labels.wanted(item.key)
        if any(wanted.values()):
            return []
        if digest in self._changing:
            found = self._captions_of_replaced(change, digest)
        else:
            found = change.given_captions(old.id, self.space) if old is not None else []
        return [caption for caption in found if caption.source not in wanted]

    def _captions_of_replaced(self, change: Change, digest: bytes) -> list[CaptionRecord]:
        """The captions of the files that had a content before this run and are read again."""
        if digest not in self._replaced:
            given = (
                change.given_captions(one, self.space) for one in sorted(self._changing[digest])
            )
            self._replaced[digest] = next(filter(None, given), [])
        return self._replaced[digest]

    def _remove_old(self, change: Change, old: MediaRow) -> None:
        self._captions_of_replaced(change, old.content_hash)  # before they are gone
        change.remove_media([old.id])

    def _keep(
        self,
        change: Change,
        media_id: int,
        item: Candidate,
        file: Decoded,
        texts: Mapping[str, Vector],
    ) -> None:
        size, mtime_ns = file.stamp
        change.set_file(
            media_id, root_id=item.root.id, path=item.file.path, size=size, mtime_ns=mtime_ns
        )
        rows = change.captions_of(media_id)
        captions = caption_change(rows, self._wanted(item, file))
        self.apply(change, media_id, captions, texts)
        change.set_sidecar(media_id, item.file.sidecar)

    def _add(
        self,
        change: Change,
        item: Candidate,
        file: Decoded,
        record: MediaRecord,
        texts: Mapping[str, Vector],
        inherited: Sequence[CaptionRecord],
    ) -> None:
        facts = record.facts
        if facts.captured_from == "mtime":  # of the file whose record it was
            facts = replace(facts, captured=None)
        given = caption_change((), self._wanted(item, file)).add
        captions = [CaptionRecord(text, source, texts[text]) for text, source in given]
        captions = [*record.captions, *captions]
        self.counts["captions"] += len(captions)
        new = _record(item, file, facts, record.segments, [*inherited, *captions])
        change.add_media(new, self.space)


def _record(
    item: Candidate,
    file: Decoded,
    facts: Facts,
    segments: Sequence[SegmentRecord],
    captions: Sequence[CaptionRecord],
) -> MediaRecord:
    return MediaRecord(
        item.root.id, item.file.path, *file.stamp, file.digest, facts, segments, captions,
        item.file.sidecar,
    )  # fmt: skip

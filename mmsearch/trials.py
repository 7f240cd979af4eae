"""Measures and learns with an engine, on labels: in an index of its own where it changes one.

`Engine.bench`, `compare_fusions` and the `train_...` are these functions.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmsearch.datasets.formats import find_images, read_labelled
from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.errors import IndexNotFound, UsageError
from mmsearch.evaluation import comparison
from mmsearch.evaluation.comparison import FusionReport
from mmsearch.evaluation.report import BenchReport
from mmsearch.evaluation.retrieval import Corpus, evaluate
from mmsearch.ingest.patches import add_patches
from mmsearch.ingest.pipeline import Pipeline
from mmsearch.ingest.plan import plan_of_files
from mmsearch.jobs.runner import Runner
from mmsearch.search.compose import write_composer
from mmsearch.search.fusion import NOT_LEARNED, read_weights, write_weights
from mmsearch.search.matchers import Kind, matcher_of
from mmsearch.search.rerank import NOT_LEARNED as NOTHING_TO_RERANK_WITH
from mmsearch.search.rerank import (
    Mix,
    Reranker,
    read_reranker,
    write_reranker,
)
from mmsearch.search.searcher import Learned
from mmsearch.store.rows import SpaceRow
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import FUSIONS, Fusion, Progress, Query, Term, expanded

if TYPE_CHECKING:
    from mmsearch.engine import Engine, OnProgress, PathLike
    from mmsearch.learning.compose import ComposeLearned
    from mmsearch.learning.fusion import FusionLearned
    from mmsearch.learning.rerank import Candidates, RerankLearned

_QUERIES = 4000  # held-out captions that three weights are learned from: more tell nothing new


@dataclass(frozen=True)
class Labels:
    """What is measured on or learned from."""

    dataset: PathLike | LabelledSet | None = None
    """A labelled set or its file; None is the engine's own index with its captions."""
    images: PathLike | None = None
    """The folder of the images, where it is not beside the labels."""
    split: str | None = None
    """Which split; None is "test" where there is one, else all."""
    limit: int | None = None
    """Only so many images."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit is a whole number from 1, not {self.limit}")

    def read(self, notify: Callable[[str], None]) -> LabelledSet:
        """The set that is named; what of it cannot be used is told."""
        assert self.dataset is not None
        if isinstance(self.dataset, LabelledSet):
            return self.dataset
        found = read_labelled(expanded(self.dataset))
        if told := found.told():
            notify(told)
        return found

    def folder_of(self, images: list[LabelledImage]) -> Path:
        """Where the set's images are."""
        if self.images is None and not isinstance(self.dataset, LabelledSet):
            assert self.dataset is not None
            return find_images(expanded(self.dataset), images).absolute()
        return expanded(self.images or ".").absolute()


@dataclass(frozen=True)
class Trial:
    """An index to measure in, and to change at will."""

    engine: Engine
    name: str
    split: str
    missing: tuple[str, ...] = ()
    """Images of the set that could not be indexed."""


def bench(engine: Engine, labels: Labels, on_progress: OnProgress) -> BenchReport:
    """`Engine.bench`."""
    if labels.dataset is None:
        return _measure(Trial(engine, _name_of(engine), ""), on_progress)
    with _indexed(engine, labels, on_progress, _own_model(engine)) as trial:
        return _measure(trial, on_progress)


def _own_model(engine: Engine) -> str | None:
    """The model of an engine's index, where there is one and no other was asked for."""
    space = engine.store.active_space() if engine.has_index() else None
    if space is None or engine.names_model():
        return None
    return engine.encoder_of_index().spec.model


def _measure(trial: Trial, on_progress: OnProgress) -> BenchReport:
    corpus = Corpus.of(trial.engine.store.contents())
    with trial.engine.searcher() as searcher:
        result = evaluate(
            corpus,
            lambda queries, to, k: [
                np.array(answer.ids, dtype=np.int64) for answer in searcher.rank(queries, to, k)
            ],
            on_progress,
        )
    space = _space_of(trial.engine)
    return BenchReport(
        trial.name, trial.split, space.spec.model, space.precision, corpus, result, trial.missing
    )


def compare_fusions(
    engine: Engine,
    labels: Labels,
    fusions: Sequence[Fusion],
    *,
    rerank: int,
    hold_out: int,
    captioned: float,
    on_progress: OnProgress,
) -> FusionReport:
    """`Engine.compare_fusions`."""
    if strange := [how for how in fusions if how not in FUSIONS or how == "auto"]:
        raise UsageError(
            f"a fusion to measure is one of {', '.join(FUSIONS[1:])}, not '{strange[0]}'"
        )
    if hold_out < 0 or rerank < 0 or not 0 <= captioned <= 1:
        raise UsageError("hold_out and rerank are whole numbers from 0, captioned is from 0 to 1")
    own = engine.store.active_space() if engine.has_index() else None
    if own is not None and not engine.may_use(own.spec):
        own = None  # what was learned for the index's model is of no use for the one asked for
    learned, model = Learned(), _own_model(engine)
    if own is not None and ("learned" in fusions or rerank):
        space = own.spec.space
        learned = Learned(
            weights=lambda: read_weights(engine.folder, space),
            reranker=lambda: read_reranker(engine.folder, space),
        )
    if "learned" in fusions and learned.weights() is None:
        raise UsageError(NOT_LEARNED)
    if rerank and (useless := {"caption", "words"} & set(fusions)):
        raise UsageError(f"--rerank looks at images, and --fusion {min(useless)} does not")
    if rerank and own is not None and learned.reranker() is None:
        raise UsageError(NOTHING_TO_RERANK_WITH)
    settings = [(how, depth) for how in fusions for depth in dict.fromkeys((0, rerank))]
    with _scratch(engine, labels, on_progress, model, patches=rerank > 0) as trial:
        status = trial.engine.status()
        if own is not None and status.space != own.spec.space:
            raise UsageError(
                "what was learned is for the model as it was when the index was made; its weights "
                "have changed since"
            )
        asked = comparison.hold_out(trial.engine.store, hold_out, captioned=captioned)
        status = trial.engine.status()
        with trial.engine.searcher(learned if own is not None else None) as searcher:
            rows = comparison.compare(searcher, asked, settings, on_progress)
        return FusionReport(
            trial.name, trial.split, status.model, status.images, status.captions, rows
        )


def train_fusion(
    engine: Engine,
    labels: Labels,
    *,
    hold_out: int,
    keep: bool,
    seed: int,
    on_progress: OnProgress,
) -> tuple[FusionLearned, bool]:
    """`Engine.train_fusion`."""
    from mmsearch.learning.fusion import learn_fusion

    own = _space_of(engine)
    with _scratch(engine, labels, on_progress, engine.encoder_of_index().spec.model) as trial:
        asked = comparison.hold_out(trial.engine.store, hold_out)
        if len(asked) > _QUERIES:
            rows = np.random.default_rng(seed).permutation(len(asked))[:_QUERIES]
            asked = [asked[row] for row in rows]
        with trial.engine.searcher() as searcher:
            found_for = comparison.candidates_of(searcher, asked, on_progress)
            candidates = [replace(one, items=()) for _, _, one in found_for]
        found = learn_fusion(candidates, asked, seed)
    is_kept = keep or found.overall.is_gain
    if is_kept:
        with _keeping(engine, own):
            write_weights(engine.folder, found.weights, own.spec.space)
    return found, is_kept


def train_compose(
    engine: Engine, labels: Labels, *, keep: bool, seed: int, on_progress: OnProgress
) -> tuple[ComposeLearned, bool]:
    """`Engine.train_compose`."""
    from mmsearch.learning.compose import learn_compose
    from mmsearch.learning.features import embed_set

    own = _space_of(engine)
    with _keeping(engine, own):  # what cannot be kept is not learned first
        pass
    encoder = engine.encoder_for_writing()
    photos = None
    if labels.dataset is not None:
        images = labels.read(engine.notify).images
        folder, cache = labels.folder_of(list(images)), engine.settings.cache_folder() / "views"
        photos = embed_set(encoder, folder, images, cache, seed, on_progress, engine.notify)
    found = learn_compose(encoder, photos, seed, on_progress)
    is_kept = keep or found.is_gain
    if is_kept:
        with _keeping(engine, own):
            write_composer(
                engine.folder, found.weights, own.spec.space, is_for_photos=found.is_for_photos
            )
    return found, is_kept


def train_rerank(
    engine: Engine, labels: Labels, *, kind: Kind, keep: bool, seed: int, on_progress: OnProgress
) -> tuple[RerankLearned, bool]:
    """`Engine.train_rerank`."""
    from mmsearch.learning import rerank as learning
    from mmsearch.learning.embedding import embed_texts
    from mmsearch.learning.features import splits_of
    from mmsearch.learning.sets import merge_copies

    own = _space_of(engine)
    with _keeping(engine, own):  # what cannot be kept is not learned first
        pass
    labelled = labels.read(engine.notify)
    folder = labels.folder_of(list(labelled.images))
    captioned = [image for image in labelled.images if image.captions]
    images = merge_copies(folder, captioned, engine.notify)
    splits = splits_of([image.split for image in images], seed)
    parts = {
        split: [image for image, name in zip(images, splits, strict=True) if name == split]
        for split in ("train", "val", "test")
    }
    encoder, local = engine.encoder_for_writing(), engine.local_encoder()
    cache = engine.settings.cache_folder() / "views"
    photos = learning.embed_photos(
        encoder, local, [folder / image.file for image in parts["train"]],
        [image.captions for image in parts["train"]], cache, seed, on_progress,
    )  # fmt: skip
    network = learning.fit_network(photos, kind, seed, on_progress=on_progress)
    weights = {name: v.detach().half().numpy() for name, v in network.state_dict().items()}
    chosen = np.random.default_rng(seed).permutation(len(photos.captions))[: learning.CAPTIONS]
    captions = photos.captions[np.sort(chosen)].astype(np.float16).astype(np.float32)
    # What is measured is what is kept: half precision.
    matcher = matcher_of(kind, weights, learning.HEADS)
    asked = [text for image in parts["val"] for text in image.captions]
    queries = embed_texts(encoder, asked, cache, "embedding captions", on_progress)
    familiar = learning.familiar_from(queries, captions)
    reranker = Reranker(matcher, captions, Mix(0.0, 0.0), familiar)
    val, test = (
        candidates_of(engine, folder, LabelledSet(labelled.name, tuple(parts[split])), reranker,
                      on_progress) for split in ("val", "test")
    )  # fmt: skip
    reranker = replace(reranker, mix=learning.choose_mix(val))
    recalls, gain = learning.measure(test, reranker.mix)
    found = learning.RerankLearned(kind, weights, reranker, len(test), recalls, gain)
    is_kept = keep or found.gain.is_gain
    if is_kept:
        with _keeping(engine, own):
            write_reranker(engine.folder, kind, weights, learning.HEADS, reranker, own.spec.space)
    return found, is_kept


def candidates_of(
    engine: Engine,
    folder: Path,
    labelled: LabelledSet,
    reranker: Reranker,
    on_progress: OnProgress,
    depth: int = 50,
) -> list[Candidates]:
    """What a search finds for each caption of a labelled set, and what a second look says of it.

    Args:
        depth: how many of the first images.
    """
    from mmsearch.learning.rerank import Candidates

    model = engine.encoder_of_index().spec.model
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="mmsearch-bench-") as scratch,
        engine.beside(Path(scratch) / "index", model) as other,
    ):
        _index_listed(other, folder, labelled, on_progress, patches=True)
        held = other.store.contents()
        with other.searcher(Learned(reranker=lambda: reranker)) as searcher:
            for place, (text, media) in enumerate(
                zip(held.caption_texts, held.caption_media.tolist(), strict=True), 1
            ):
                query = Query((Term(text=text),), k=depth, rerank=depth)
                vector = searcher.embed(query.terms)
                answer = searcher.rank(vector[None], "image", depth)[0]
                seen, parts = searcher.second_looks(query).parts(vector, query.terms, answer.items)
                ids, cosines = np.array(answer.ids), np.array(answer.scores)
                found.append(Candidates(media, ids[seen], cosines[seen], parts))
                on_progress(Progress("queries", place, len(held.caption_texts)))
    return found


@contextmanager
def _keeping(engine: Engine, own: SpaceRow) -> Iterator[None]:
    """The one writer of an index, whose space is still the one that was learned for."""
    with engine.store.writer():
        if _space_of(engine).spec.space != own.spec.space:
            raise UsageError(
                f"{engine.folder}: was made anew with another model meanwhile; learn again"
            )
        yield


@contextmanager
def _scratch(
    engine: Engine,
    labels: Labels,
    on_progress: OnProgress,
    model: str | None,
    *,
    patches: bool = False,
) -> Iterator[Trial]:
    """An index of a labelled set, or a copy of the engine's own."""
    if labels.dataset is not None:
        with _indexed(engine, labels, on_progress, model, patches=patches) as trial:
            yield trial
        return
    with tempfile.TemporaryDirectory(prefix="mmsearch-bench-") as folder:
        index = Path(folder) / "index"
        copy = Store.create(index)
        engine.store.copy_catalog(copy)
        copy.close()
        with engine.beside(index) as other:
            if patches:  # once, and not for every query
                with other.store.writer() as writer:
                    _add_patches(other, writer, on_progress)
            yield Trial(other, _name_of(engine), "")


@contextmanager
def _indexed(
    engine: Engine,
    labels: Labels,
    on_progress: OnProgress,
    model: str | None = None,
    *,
    patches: bool = False,
) -> Iterator[Trial]:
    """An index of a labelled set."""
    labelled = labels.read(engine.notify)
    split, chosen = labelled.choose(labels.split, labels.limit)
    folder = labels.folder_of(chosen)
    with (
        tempfile.TemporaryDirectory(prefix="mmsearch-bench-") as scratch,
        engine.beside(Path(scratch) / "index", model) as other,
    ):
        some = LabelledSet(labelled.name, tuple(chosen))
        missing = _index_listed(
            other, folder, some, on_progress, patches=patches, among=labelled.images
        )
        if model is not None and _space_of(other).spec.space != _space_of(engine).spec.space:
            raise UsageError(
                f"the weights of '{model}' are not those that {engine.folder} was made with: name "
                "the model to measure with --model, or put those back"
            )
        yield Trial(other, labelled.name, split, missing)


def _index_listed(
    engine: Engine,
    folder: Path,
    labelled: LabelledSet,
    on_progress: OnProgress,
    *,
    patches: bool = False,
    among: Sequence[LabelledImage] | None = None,
) -> tuple[str, ...]:
    """Indexes just the images of a set with their captions; returns those that failed."""
    encoder = engine.encoder_for_writing()
    Store.create(engine.folder).close()
    with engine.store.writer() as writer:
        plan = plan_of_files(writer, os.fsencode(folder), labelled, among)
        with engine.new_decoders() as decoders:
            runner = Runner(decoders, engine.settings.workers)
            Pipeline(engine.store, writer, encoder, runner, on_progress=on_progress).run(plan)
        if patches:
            _add_patches(engine, writer, on_progress)
    bad = {os.path.relpath(failure.path, folder) for failure in engine.errors()}
    return (*plan.labels.unmatched, *sorted(bad))


def _add_patches(engine: Engine, writer: Writer, on_progress: OnProgress) -> None:
    local, space = engine.local_encoder(), _space_of(engine)
    with engine.new_decoders() as decoders:
        runner = Runner(decoders, engine.settings.workers)
        add_patches(engine.store, writer, local, space, runner, on_progress=on_progress)


def _space_of(engine: Engine) -> SpaceRow:
    found = engine.store.active_space()
    if found is None:
        raise IndexNotFound(f"{engine.folder}: the index is empty; run 'mmsearch index PATH'")
    return found


def _name_of(engine: Engine) -> str:
    """The folder that was indexed, where there is one only; else the index's own name."""
    roots = engine.status().roots
    return roots[0].name if len(roots) == 1 else engine.folder.resolve().name

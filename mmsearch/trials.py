"""Measures and learns with an engine, on labels: in an index of its own where it changes one.

`Engine.bench`, `compare_fusions`, `train_fusion` and `train_compose` are these functions.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from mmsearch.ingest.pipeline import Pipeline
from mmsearch.ingest.plan import plan_of_files
from mmsearch.search.compose import write_composer
from mmsearch.search.fusion import NOT_LEARNED, read_weights, write_weights
from mmsearch.store.catalog import SpaceRow
from mmsearch.store.store import Store
from mmsearch.types import Fusion

if TYPE_CHECKING:
    from mmsearch.engine import Engine, OnProgress, PathLike
    from mmsearch.learning.compose import ComposeLearned
    from mmsearch.learning.fusion import FusionLearned

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

    def read(self) -> LabelledSet:
        """The set that is named."""
        assert self.dataset is not None
        if isinstance(self.dataset, LabelledSet):
            return self.dataset
        return read_labelled(Path(self.dataset))

    def folder_of(self, images: list[LabelledImage]) -> Path:
        """Where the set's images are."""
        if self.images is None and not isinstance(self.dataset, LabelledSet):
            assert self.dataset is not None
            return find_images(Path(self.dataset), images).absolute()
        return Path(self.images or ".").absolute()


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
    with _indexed(engine, labels, on_progress) as trial:
        return _measure(trial, on_progress)


def _measure(trial: Trial, on_progress: OnProgress) -> BenchReport:
    corpus = Corpus.of(trial.engine.store.contents())
    searcher = trial.engine.searcher()
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
    hold_out: int,
    captioned: float,
    on_progress: OnProgress,
) -> FusionReport:
    """`Engine.compare_fusions`."""
    own = engine.store.active_space() if engine.has_index() else None
    weights, model = None, None
    if "learned" in fusions:
        weights = read_weights(engine.folder, own.spec.space) if own else None
        if own is None or weights is None:
            raise UsageError(NOT_LEARNED)
        model = own.spec.model
    with _scratch(engine, labels, on_progress, model) as trial:
        status = trial.engine.status()
        if model is not None and own is not None and status.space != own.spec.space:
            raise UsageError(
                "the weights that were learned are for the model as it was when the index was "
                "made; its weights have changed since"
            )
        asked = comparison.hold_out(trial.engine.store, hold_out, captioned=captioned)
        searcher, status = trial.engine.searcher(), trial.engine.status()
        rows = comparison.compare(searcher, asked, fusions, weights, status.images, on_progress)
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
    with _scratch(engine, labels, on_progress, own.spec.model) as trial:
        asked = comparison.hold_out(trial.engine.store, hold_out)
        if len(asked) > _QUERIES:
            rows = np.random.default_rng(seed).permutation(len(asked))[:_QUERIES]
            asked = [asked[row] for row in rows]
        evidences = list(comparison.evidence_of(trial.engine.searcher(), asked, on_progress))
        found = learn_fusion(evidences, asked, trial.engine.status().images, seed)
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
        images = labels.read().images
        folder, cache = labels.folder_of(list(images)), engine.settings.cache / "views"
        photos = embed_set(encoder, folder, images, cache, seed, on_progress, engine.notify)
    found = learn_compose(encoder, photos, seed, on_progress)
    is_kept = keep or found.is_gain
    if is_kept:
        with _keeping(engine, own):
            write_composer(
                engine.folder, found.weights, own.spec.space, is_for_photos=found.is_for_photos
            )
    return found, is_kept


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
    engine: Engine, labels: Labels, on_progress: OnProgress, model: str | None
) -> Iterator[Trial]:
    """An index of a labelled set, or a copy of the engine's own."""
    if labels.dataset is not None:
        with _indexed(engine, labels, on_progress, model) as trial:
            yield trial
        return
    with tempfile.TemporaryDirectory(prefix="mmsearch-bench-") as folder:
        index = Path(folder) / "index"
        copy = Store.create(index)
        engine.store.copy_catalog(copy)
        copy.close()
        with engine.beside(index) as other:
            yield Trial(other, _name_of(engine), "")


@contextmanager
def _indexed(
    engine: Engine, labels: Labels, on_progress: OnProgress, model: str | None = None
) -> Iterator[Trial]:
    """An index of a labelled set."""
    labelled = labels.read()
    split, chosen = labelled.choose(labels.split, labels.limit)
    folder = labels.folder_of(chosen)
    with (
        tempfile.TemporaryDirectory(prefix="mmsearch-bench-") as scratch,
        engine.beside(Path(scratch) / "index", model) as other,
    ):
        some = LabelledSet(labelled.name, tuple(chosen))
        missing = _index_listed(other, folder, some, on_progress)
        yield Trial(other, labelled.name, split, missing)


def _index_listed(
    engine: Engine, folder: Path, labelled: LabelledSet, on_progress: OnProgress
) -> tuple[str, ...]:
    """Indexes just the images of a set with their captions; returns those that failed."""
    encoder = engine.encoder_for_writing()
    Store.create(engine.folder).close()
    with engine.store.writer() as writer:
        plan = plan_of_files(writer, os.fsencode(folder), labelled)
        Pipeline(
            engine.store, writer, encoder, workers=engine.settings.workers, on_progress=on_progress
        ).run(plan)
    bad = {os.path.relpath(failure.path, folder) for failure in engine.errors()}
    return (*plan.labels.unmatched, *sorted(bad))


def _space_of(engine: Engine) -> SpaceRow:
    found = engine.store.active_space()
    if found is None:
        raise IndexNotFound(f"{engine.folder}: the index is empty; run 'mmsearch index PATH'")
    return found


def _name_of(engine: Engine) -> str:
    """The folder that was indexed, where there is one only; else the index's own name."""
    roots = engine.status().roots
    return roots[0].name if len(roots) == 1 else engine.folder.resolve().name

"""Measures an index, or a labelled set in an index of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmsearch.datasets.formats import find_images, read_labelled
from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.errors import UsageError
from mmsearch.evaluation import comparison
from mmsearch.evaluation.classification import (
    Classification,
    different_labels,
    label_sentences,
    label_vectors,
    true_labels,
)
from mmsearch.evaluation.comparison import FusionReport
from mmsearch.evaluation.judgments import (
    JudgedFigures,
    Qrels,
    by_judgments,
    caption_names,
    read_qrels,
)
from mmsearch.evaluation.retrieval import BenchReport, Corpus, evaluate
from mmsearch.ingest.patches import add_patches
from mmsearch.ingest.pipeline import Pipeline
from mmsearch.ingest.plan import plan_of_files
from mmsearch.media.discover import FoundFile, walk
from mmsearch.search.fusion import NOT_TRAINED
from mmsearch.search.rerank import NOT_TRAINED as NOTHING_TO_RERANK_WITH
from mmsearch.search.searcher import Trained, trained_for
from mmsearch.store.writer import Writer
from mmsearch.types import FUSIONS, TEXT, Fusion, Notify, OnProgress, PathLike, expanded

if TYPE_CHECKING:
    from mmsearch.engine.open_index import OpenIndex


@dataclass(frozen=True)
class Labels:
    """What is measured on or trained on."""

    dataset: PathLike | LabelledSet | None = None
    """A labelled set or its file; None is the engine's own index with its captions."""
    images: PathLike | None = None
    """The folder of the images, where it is not beside the labels."""
    split: str | None = None
    """Which split; None is "test" where there is one, else all."""
    limit: int | None = None
    """Only so many images."""
    qrels: PathLike | None = None
    """A file of judgments in TREC's form."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit is a whole number from 1, not {self.limit}")
        if self.qrels is not None and self.dataset is None:
            raise UsageError("judgments are of a labelled set: name that too")

    def read(self, notify: Notify) -> LabelledSet:
        """The set that is named; what of it cannot be used is told."""
        assert self.dataset is not None
        if isinstance(self.dataset, LabelledSet):
            return self.dataset
        return read_labelled(expanded(self.dataset), notify)

    def folder_of(self, images: list[LabelledImage]) -> Path:
        """Where the set's images are."""
        if self.images is None and not isinstance(self.dataset, LabelledSet):
            assert self.dataset is not None
            return find_images(expanded(self.dataset), images).absolute()
        return expanded(self.images or ".").absolute()


@dataclass(frozen=True)
class Trial:
    """An index to measure in, and to change at will."""

    opened: OpenIndex
    name: str
    split: str
    missing: tuple[str, ...] = ()
    """Images of the set that could not be indexed."""
    images: Sequence[LabelledImage] = ()
    """Those of the set that were to be indexed."""
    folder: Path = Path()
    """Where they lie."""


def bench(opened: OpenIndex, labels: Labels, on_progress: OnProgress) -> BenchReport:
    """`Engine.bench`."""
    qrels = None if labels.qrels is None else read_qrels(expanded(labels.qrels))
    measured = (
        nullcontext(Trial(opened, _name_of(opened), ""))
        if labels.dataset is None
        else indexed(opened, labels, on_progress, _own_model(opened))
    )
    with measured as trial:
        corpus, space = Corpus.of(trial.opened.store.contents()), trial.opened.space
        with trial.opened.searcher() as searcher:
            result = evaluate(
                corpus,
                lambda queries, to, k: [
                    np.array(answer.ids, dtype=np.int64) for answer in searcher.rank(queries, to, k)
                ],
                on_progress,
            )
    judged = None if qrels is None else _judged(corpus, trial, qrels)
    return BenchReport(
        trial.name, trial.split, space.spec.model, space.precision, corpus, result, trial.missing,
        judged,
    )  # fmt: skip


def _judged(corpus: Corpus, trial: Trial, qrels: Qrels) -> JudgedFigures:
    files = [
        os.path.relpath(name, trial.folder).replace(os.sep, "/") for name in corpus.image_names
    ]
    row_of = {file: row for row, file in enumerate(files)}
    names = caption_names(trial.images, row_of, corpus.texts, corpus.owner)
    return by_judgments(corpus.images, corpus.captions, corpus.owner, names, files, qrels)


def _own_model(opened: OpenIndex) -> str | None:
    """The model of an engine's index, where there is one and no other was asked for."""
    space = opened.active_space()
    return None if space is None or opened.names_model() else space.spec.model


def compare_fusions(
    opened: OpenIndex,
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
    own = opened.active_space()
    if own is not None and not opened.may_use(own.spec):
        own = None  # what was trained for the index's model is of no use for the one asked for
    trained = trained_for(opened.folder, own.spec) if own is not None else Trained()
    if "trained" in fusions and trained.weights() is None:
        raise UsageError(NOT_TRAINED)
    if rerank and (useless := {"caption", "words"} & set(fusions)):
        raise UsageError(f"--rerank scores images, and --fusion {min(useless)} does not")
    if rerank and own is not None and trained.reranker() is None:
        raise UsageError(NOTHING_TO_RERANK_WITH)
    settings = [(how, depth) for how in fusions for depth in dict.fromkeys((0, rerank))]
    with scratch_index(
        opened, labels, on_progress, _own_model(opened), patches=rerank > 0
    ) as trial:
        if own is not None and trial.opened.store.status().space != own.spec.space:
            raise UsageError(
                "what was trained is for the model as it was when the index was made; its weights "
                "have changed since"
            )
        asked = comparison.hold_out(trial.opened.store, hold_out, captioned=captioned)
        status = trial.opened.store.status()
        with trial.opened.searcher(trained if own is not None else None) as searcher:
            rows = comparison.compare(searcher, asked, settings, on_progress)
        return FusionReport(
            trial.name, trial.split, status.model, status.images, status.captions, rows
        )


@contextmanager
def scratch_index(
    opened: OpenIndex,
    labels: Labels,
    on_progress: OnProgress,
    model: str | None,
    *,
    patches: bool = False,
) -> Iterator[Trial]:
    """An index of a labelled set, or a copy of the engine's own."""
    if labels.dataset is not None:
        with indexed(opened, labels, on_progress, model, patches=patches) as trial:
            yield trial
        return
    with opened.scratch() as other:
        opened.store.copy_catalog(other.make())
        if patches:  # once, and not for every query
            with other.store.writer() as writer:
                add_missing_patches(other, writer, on_progress)
        yield Trial(other, _name_of(opened), "")


@contextmanager
def indexed(
    opened: OpenIndex,
    labels: Labels,
    on_progress: OnProgress,
    model: str | None = None,
    *,
    patches: bool = False,
) -> Iterator[Trial]:
    """An index of a labelled set."""
    labelled = labels.read(opened.notify)
    split, chosen = labelled.choose(labels.split, labels.limit)
    folder = labels.folder_of(chosen)
    with opened.scratch(model) as other:
        some = LabelledSet(labelled.name, tuple(chosen))
        missing = index_listed(
            other, folder, some, on_progress, patches=patches, among=labelled.images
        )
        if model is not None and other.space.spec.space != opened.space.spec.space:
            raise UsageError(
                f"the weights of '{model}' are not those that {opened.folder} was made with: name "
                "the model to measure with --model, or put those back"
            )
        yield Trial(other, labelled.name, split, missing, chosen, folder)


def index_listed(
    opened: OpenIndex,
    folder: Path,
    labelled: LabelledSet,
    on_progress: OnProgress,
    *,
    patches: bool = False,
    among: Sequence[LabelledImage] | None = None,
) -> tuple[str, ...]:
    """Indexes just the images of a set with their captions; returns those that failed."""
    encoder = opened.encoder_to_add()
    with opened.make().writer() as writer:
        plan = plan_of_files(writer, os.fsencode(folder), labelled, among)
        run = Pipeline(opened.store, writer, encoder, opened.runner(), on_progress=on_progress)
        run.run(plan)
        if patches:
            add_missing_patches(opened, writer, on_progress)
    with opened.store.catalog.read() as queries:
        bad = {os.path.relpath(failure.path, folder) for failure in queries.failures()}
    return (*plan.labels.unmatched, *sorted(bad))


def add_missing_patches(opened: OpenIndex, writer: Writer, on_progress: OnProgress) -> None:
    encoder, space = opened.patch_encoder(), opened.space
    add_patches(opened.store, writer, encoder, space, opened.runner(), on_progress=on_progress)


def classify(
    opened: OpenIndex,
    labels: Sequence[str],
    folder: Path | None,
    templates: Sequence[str],
    on_progress: OnProgress,
) -> Classification:
    """`Engine.classify`."""
    labels = different_labels(labels)
    sentences = label_sentences(labels, templates)
    with nullcontext(opened) if folder is None else _read(opened, folder, on_progress) as held:
        spec, contents = held.space.spec, held.store.contents()
        encoder = held.encoder_of(spec)
        vectors = label_vectors(sentences, lambda texts: encoder.encode(TEXT, texts))
        roots = held.store.status().roots
    paths = [Path(os.fsdecode(path)) for path in contents.image_paths]
    # A folder above those that were indexed may be called like a label, too.
    below = [
        next((path.relative_to(top.parent) for top in roots if path.is_relative_to(top)), path)
        for path in paths
    ]
    return Classification(
        spec.model, tuple(labels), tuple(paths), contents.image_vectors @ vectors.T,
        true_labels(below, labels),
    )  # fmt: skip


@contextmanager
def _read(opened: OpenIndex, folder: Path, on_progress: OnProgress) -> Iterator[OpenIndex]:
    """An index of a folder's pictures, with the model of the own one, where there is one."""
    folder = folder.absolute()
    found = walk(os.fsencode(folder), types=opened.media_types)
    files = [os.fsdecode(one.path) for one in found if isinstance(one, FoundFile)]
    images = LabelledSet(folder.name, tuple(LabelledImage(file, ()) for file in files))
    with opened.scratch(_own_model(opened)) as other:
        failed = index_listed(other, folder, images, on_progress) if files else ()
        if len(failed) == len(files):
            raise UsageError(f"{folder}: holds no picture that can be read")
        if failed:
            opened.notify(f"{len(failed)} pictures could not be read and have no label")
        yield other


def _name_of(opened: OpenIndex) -> str:
    """The folder that was indexed, where there is one only; else the index's own name."""
    roots = opened.store.status().roots
    return roots[0].name if len(roots) == 1 else opened.folder.resolve().name

"""The facade: what people and programs call."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mmsearch.config import Settings, load_settings
from mmsearch.encoders.encoder_provider import EncoderProvider, Provider
from mmsearch.encoders.loading import ModelCache, ModelRow, list_models
from mmsearch.encoders.registry import parse_model
from mmsearch.engine.open_index import OpenIndex
from mmsearch.errors import LabelsError, ModelNotFound, UsageError, extra
from mmsearch.media.media_types import PICTURES, MediaTypes
from mmsearch.store.store import Store
from mmsearch.types import (
    Compose,
    Failure,
    Filter,
    Fusion,
    Hit,
    IngestReport,
    Notify,
    OnProgress,
    PathLike,
    Query,
    Repaired,
    Status,
    Term,
    Verified,
    expanded,
    no_progress,
    several,
)

if TYPE_CHECKING:
    from mmsearch.datasets.labelled import LabelledSet
    from mmsearch.engine.benchmark import Labels
    from mmsearch.evaluation.classification import Classification
    from mmsearch.evaluation.comparison import FusionReport
    from mmsearch.evaluation.retrieval import BenchReport
    from mmsearch.search.known_words import KnownWords
    from mmsearch.search.rerank import Kind
    from mmsearch.search.searcher import Searcher, Trained
    from mmsearch.training import compose as composing
    from mmsearch.training import rerank as reranking
    from mmsearch.training.fusion import TrainedFusion

log = logging.getLogger(__name__)


class Engine:
    """An index and the model that serves it. Threads may share one engine for searching."""

    def __init__(
        self,
        settings: Settings,
        *,
        model: str | None = None,
        notify: Notify = log.warning,
        confirm: Callable[[str], bool] | None = None,
        provider: Provider | None = None,
        media_types: MediaTypes = PICTURES,
    ) -> None:
        """Does no work yet; `Engine.open` is the usual way in.

        Args:
            settings: which index, device and precision, and the model of a new index.
            model: overrules the settings' model; an existing index migrates to it when it is
                indexed (`index`), and until then searches use the index's own.
            notify: told, a line at a time, what a user should know.
            confirm: asked whether weights may be fetched; None is "no".
            provider: gives the index its encoder; None opens models as the settings say.
            media_types: which files are indexed.
        """
        self.opened = OpenIndex(
            settings,
            provider or EncoderProvider(settings, notify, confirm),
            model=model,
            notify=notify,
            media_types=media_types,
        )
        """The index and what serves it, for what this class does not offer."""

    @classmethod
    def open(
        cls,
        path: PathLike | None = None,
        *,
        model: str | None = None,
        device: str | None = None,
        precision: str | None = None,
        notify: Notify = log.warning,
        provider: Provider | None = None,
        media_types: MediaTypes = PICTURES,
    ) -> Self:
        """The engine for the index in folder `path`, which `index` makes if it is not there.

        Args:
            path: None is the index that the command line would use.
            model: the model of a new index, or one that `index` migrates an existing one to.
                None takes an existing index's own, or for a new one what the settings say.
            provider: gives the index its encoder, as `GivenEncoder` does; None opens models by
                their names.
            media_types: which files are indexed.
        """
        index = expanded(path) if path is not None else None
        settings = load_settings(index=index, device=device, precision=precision)
        return cls(settings, model=model, notify=notify, provider=provider, media_types=media_types)

    @property
    def settings(self) -> Settings:
        """What it was opened with."""
        return self.opened.settings

    @property
    def folder(self) -> Path:
        """Where the index lies, or will lie."""
        return self.opened.folder

    @property
    def store(self) -> Store:
        """The open store.

        Raises:
            IndexNotFound: there is no index yet.
        """
        return self.opened.store

    def close(self) -> None:
        """Lets go of the files; the engine opens them again when it is used again."""
        self.opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- indexing --------------------------------------------------------------------------

    def index(
        self,
        paths: PathLike | Iterable[PathLike] = (),
        *,
        captions: PathLike | LabelledSet | None = None,
        prune: bool | None = None,
        exclude: str | Sequence[str] | None = None,
        patches: bool | None = None,
        reread: bool = False,
        dry_run: bool = False,
        on_progress: OnProgress = no_progress,
    ) -> IngestReport:
        """Brings the index in step with folders and files; makes the index if there is none.

        An engine that was opened with another model than the index has first does that, and then
        embeds everything that the index holds with the other model, beside its own, which answers
        searches until all is done. The next run resumes one that was interrupted. An engine
        that was opened with the index's own model by its name gives the migration up.

        Args:
            paths: folders and image files; none of them rescans all that the index knows.
            captions: a labelled set or the file of one.
            prune: whether to remove what is gone. None removes it, but not from a folder that
                is missing or empty, as an unmounted disk would be.
            exclude: globs of names or relative paths to leave out, now and in later runs.
            patches: keep the patch embeddings of every image for re-ranking, now and in later
                runs; False drops them. None changes nothing.
            reread: read every file again. Without, one whose size and modification time are as they
                were is taken for unchanged.
            dry_run: only count what would be done; a new index is not made.

        Raises:
            Interrupted: by Ctrl-C; what was committed is kept.
            UsageError: a path or a captions file that cannot be used.
        """
        from mmsearch.engine import indexing

        request = indexing.Request(
            [expanded(path) for path in several(paths)],
            self._labelled(captions),
            prune,
            None if exclude is None else several(exclude),
            patches,
            reread,
            on_progress,
        )
        if not request.paths:
            self.store  # noqa: B018 - raises where there is no index to rescan
        return (indexing.dry_run if dry_run else indexing.index)(self.opened, request)

    def _labels(self, dataset: PathLike | LabelledSet | None, *rest: Any) -> Labels:
        """What is measured on or trained on; a set with its pictures inside is unpacked first."""
        from mmsearch.datasets.archives import unpacked
        from mmsearch.datasets.labelled import LabelledSet
        from mmsearch.engine.benchmark import Labels

        if dataset is not None and not isinstance(dataset, LabelledSet):
            dataset = unpacked(expanded(dataset), self.opened.settings.cache_folder())
        return Labels(dataset, *rest)

    def _labelled(self, captions: PathLike | LabelledSet | None) -> tuple[LabelledSet, Path] | None:
        if captions is None:
            return None
        from mmsearch.datasets.archives import shards_of
        from mmsearch.datasets.formats import read_labelled
        from mmsearch.datasets.labelled import LabelledSet

        if isinstance(captions, LabelledSet):
            return captions, Path()
        path = expanded(captions)
        if shards_of(path):
            raise LabelsError(f"{path}: holds pictures itself: 'bench' and 'train' take such sets")
        return read_labelled(path, self.opened.notify), path if path.is_dir() else path.parent

    def remove(self, paths: PathLike | Iterable[PathLike]) -> int:
        """Takes files and folders out of the index (not off the disk); returns how many files.

        A folder that was indexed as a whole is forgotten: a rescan does not bring it back.

        Raises:
            UsageError: nothing in the index lies at one of the paths.
        """
        absolute = [os.fsencode(os.path.abspath(expanded(path))) for path in several(paths)]
        with self.store.writer() as writer:
            return writer.remove(absolute)

    # -- searching -------------------------------------------------------------------------

    def search(
        self,
        query: str | Query | None = None,
        *,
        image: PathLike | None = None,
        k: int = 10,
        to: str = "image",
        under: PathLike | None = None,
        min_score: float | None = None,
        fusion: Fusion = "auto",
        compose: Compose = "auto",
        rerank: int = 0,
        exact: bool = False,
    ) -> list[Hit]:
        """The best hits for a text, an example picture, both, or a whole `Query`.

        Args:
            fusion: how an image's own score and its captions' make one (`Query.fusion`).
            compose: how a picture and a text make one vector (`Query.compose`).
            rerank: how many of the first images are re-ranked (`Query.rerank`).
            exact: compare with every vector, also where the index is large (`Query.exact`).

        Raises:
            IndexNotFound: there is no index yet.
            UsageError: nothing to search for, or an example that is not a usable image.
        """
        if not isinstance(query, Query):
            terms = [Term(text=query)] if query is not None else []
            terms += [Term(image=image)] if image is not None else []
            where = Filter(under=under)
            query = Query(tuple(terms), to, k, where, min_score, fusion, compose, rerank, exact)
        return self.opened.search(query)

    def unknown_words(self, text: str) -> dict[str, str | None]:
        """The words of a text that the index's model has learned from no caption.

        Each with a known one that may have been meant, or None. Nothing where the model does not
        name its words (`tiny` does, and what `train clip` makes of it or from nothing), or there
        is no index.
        """
        known = self._known_words()
        return {} if known is None else known.unknown(text)

    def reads(self, text: str) -> bool:
        """Whether a text is in a language that the index's model learned from, by its words.

        True where the model does not name its words.
        """
        known = self._known_words()
        return known is None or known.reads(text)

    def _known_words(self) -> KnownWords | None:
        from mmsearch.search.known_words import words_of_model

        space = self.opened.active_space()
        if space is None:
            return None
        try:
            return words_of_model(parse_model(space.spec.model))
        except (ModelNotFound, UsageError):
            # Heads whose base is gone, or an encoder that was given and has a name of its own.
            return None

    def searcher(self, trained: Trained | None = None) -> AbstractContextManager[Searcher]:
        """What answers queries: one view of the index with the encoder of its space.

        Args:
            trained: the networks and weights for that space; None takes those that lie with the
                index and with the model.

        Raises:
            IndexNotFound: the index is empty, or there is none.
        """
        return self.opened.searcher(trained)

    # -- measuring -------------------------------------------------------------------------

    def bench(
        self,
        dataset: PathLike | LabelledSet | None = None,
        *,
        images: PathLike | None = None,
        split: str | None = None,
        limit: int | None = None,
        qrels: PathLike | None = None,
        on_progress: OnProgress = no_progress,
    ) -> BenchReport:
        """Recall@1/5/10 both ways, on a labelled set or on the index's own captions.

        A labelled set is indexed into a temporary index with this engine's model settings;
        the searches are those that `search` runs.

        Args:
            dataset: a labelled set or its file; None measures this index.
            images: the folder of the images, where it is not beside the labels.
            split: which split; None is "test" where there is one, else all of it.
            limit: only so many images.
            qrels: people's judgments of the set's captions, a TREC file with grades
                (`mmsearch.evaluation.judgments`).
        """
        from mmsearch.engine import benchmark

        labels = self._labels(dataset, images, split, limit, qrels)
        return benchmark.bench(self.opened, labels, on_progress)

    def classify(
        self,
        labels: Sequence[str],
        folder: PathLike | None = None,
        *,
        templates: Sequence[str] | None = None,
        on_progress: OnProgress = no_progress,
    ) -> Classification:
        """Gives each picture the label whose text is nearest to it: zero-shot classification.

        Args:
            labels: at least two.
            folder: its pictures are read into a temporary index; None is this index's pictures.
            templates: sentences with {} for the label, whose mean stands for it; None is
                `mmsearch.evaluation.classification.TEMPLATES`.

        Raises:
            IndexNotFound: no folder is given, and there is no index.
            UsageError: a folder without pictures, a template without a place for the label, or
                fewer than two different labels (`LabelsError`).
        """
        from mmsearch.engine import benchmark
        from mmsearch.evaluation.classification import TEMPLATES

        where = None if folder is None else expanded(folder)
        return benchmark.classify(self.opened, labels, where, templates or TEMPLATES, on_progress)

    def compare_fusions(
        self,
        fusions: Fusion | Sequence[Fusion],
        dataset: PathLike | LabelledSet | None = None,
        *,
        rerank: int = 0,
        hold_out: int = 1,
        captioned: float = 1.0,
        images: PathLike | None = None,
        split: str | None = None,
        limit: int | None = None,
        on_progress: OnProgress = no_progress,
    ) -> FusionReport:
        """How well each setting finds images by captions that the index does not hold.

        This works on a copy: neither the index nor the labelled set changes. The other
        arguments are those of `bench`.

        Args:
            fusions: what to measure; the others are compared with the first.
            rerank: measure each of them with so many images re-ranked, too.
            hold_out: how many captions of each image ask, and are not in the index; 0 is all.
            captioned: the share of the images that keep captions.

        Raises:
            UsageError: no image has a caption, or a setting needs what was not trained.
        """
        from mmsearch.engine import benchmark

        labels = self._labels(dataset, images, split, limit)
        return benchmark.compare_fusions(
            self.opened,
            labels,
            several(fusions),
            rerank=rerank,
            hold_out=hold_out,
            captioned=captioned,
            on_progress=on_progress,
        )

    def train_fusion(
        self,
        dataset: PathLike | LabelledSet | None = None,
        *,
        hold_out: int = 1,
        keep: bool = False,
        images: PathLike | None = None,
        split: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        on_progress: OnProgress = no_progress,
    ) -> tuple[TrainedFusion, bool]:
        """Trains the weights of the scores of images and captions for this index.

        The arguments are those of `compare_fusions`.

        Args:
            dataset: labels to train on; None is the index's own captions.
            keep: keep the weights also where they do not help.

        Returns what was trained, and whether it was kept: where the 95% interval of the mean
        recall's gain over equal weights lies above nothing.

        Raises:
            IndexNotFound: there is no index to keep the weights for.
            UsageError: too few captions to train on.
        """
        with extra("torch", "training"):
            from mmsearch.engine import training_jobs

        labels = self._labels(dataset, images, split, limit)
        return training_jobs.train_fusion(
            self.opened, labels, hold_out=hold_out, keep=keep, seed=seed, on_progress=on_progress
        )

    def train_compose(
        self,
        dataset: PathLike | LabelledSet | None = None,
        *,
        images: PathLike | None = None,
        keep: bool = False,
        seed: int = 0,
        on_progress: OnProgress = no_progress,
        recipe: composing.Recipe | None = None,
    ) -> tuple[composing.TrainedComposer, bool]:
        """Trains early fusion ("this picture, but ...") for this index's model on drawn scenes.

        Args:
            dataset: captioned photos to train and to measure on too.
            images: the folder of the photos, where it is not beside the labels.
            keep: keep it also where it does not help.
            recipe: how much is learned and measured; None is what `mmsearch train compose` does.

        Returns what was trained, and whether it was kept: where the 95% interval of its gain on
        drawn scenes lies above nothing. Searches take it unasked only if photos have shown that
        it finds no less than a sum and than the text alone.

        Raises:
            IndexNotFound: there is no index to keep it for.
        """
        with extra("torch", "training"):
            from mmsearch.engine import training_jobs

        labels = self._labels(dataset, images)
        return training_jobs.train_compose(
            self.opened, labels, keep=keep, seed=seed, on_progress=on_progress, recipe=recipe
        )

    def train_rerank(
        self,
        dataset: PathLike | LabelledSet,
        *,
        kind: Kind = "interaction",
        images: PathLike | None = None,
        keep: bool = False,
        seed: int = 0,
        on_progress: OnProgress = no_progress,
        recipe: reranking.Recipe | None = None,
    ) -> tuple[reranking.TrainedReranker, bool]:
        """Trains a re-ranker for this index's model on captioned photos.

        Args:
            dataset: trained on, chosen by (val) and measured on (test); splits that it lacks
                are made, a tenth each.
            kind: "interaction" (the best patch of each token) or "attention" (cross-modal).
            images: the folder of the photos, where it is not beside the labels.
            keep: keep it also where it does not help.
            recipe: how long it learns, and from what; None is that of its kind.

        Returns what was trained, and whether it was kept: where the 95% interval of its gain on
        the test photos lies above nothing.

        Raises:
            IndexNotFound: there is no index to keep it for.
            UsageError: too few photos, or a model whose patches cannot be read.
        """
        with extra("torch", "training"):
            from mmsearch.engine import training_jobs

        labels = self._labels(dataset, images)
        return training_jobs.train_rerank(
            self.opened, labels, kind=kind, keep=keep, seed=seed, on_progress=on_progress,
            recipe=recipe,
        )  # fmt: skip

    # -- the rest --------------------------------------------------------------------------

    def status(self) -> Status:
        """What the index holds."""
        return self.store.status()

    def errors(self) -> list[Failure]:
        """The files that could not be used, and why."""
        with self.store.catalog.read() as queries:
            return queries.failures()

    def retry(self, on_progress: OnProgress = no_progress) -> IngestReport:
        """Tries all failed files again, whether they changed or not, in a rescan.

        Raises:
            IndexNotFound: there is no index.
        """
        with self.store.writer() as writer, writer.change() as change:
            change.forget_failures()
        return self.index(on_progress=on_progress)

    # -- maintenance -----------------------------------------------------------------------

    def verify(self, *, deep: bool = False) -> Verified:
        """Whether the index is what was written; nothing is changed.

        Args:
            deep: look at every byte that has a checksum, not only at what must be there.

        Raises:
            IndexNotFound: there is no index.
        """
        from mmsearch.store.verify import verify

        return verify(self.folder, deep=deep)

    def repair(self, on_progress: OnProgress = no_progress) -> Repaired:
        """Makes a damaged index sound again; what was lost is in the report.

        Images whose vectors are lost are embedded again. Where the model is missing, or their
        folder is missing, they stay without: `verify` says so, and another repair resumes.

        Raises:
            IndexNotFound: there is no index.
            DamageError: too little is left of it.
        """
        from mmsearch.engine import maintenance

        return maintenance.repair(self.opened, on_progress)

    def compact(self) -> int:
        """Folds what is new into the vector files, and gives unused room back; how many bytes.

        Searches are as quick again as after one large `index`.
        """
        before = self.status().bytes
        with self.store.writer() as writer:
            writer.compact()
            self.store.catalog.shrink()
        return before - self.status().bytes

    def backup(self, path: PathLike) -> int:
        """Copies the index into one new file, also while another process writes; its bytes.

        Raises:
            UsageError: there is a file of that name.
            DamageError: the index is damaged.
        """
        from mmsearch.engine import maintenance

        return maintenance.backup(self.store, expanded(path))

    def restore(self, path: PathLike, roots: Mapping[str, str] | None = None) -> Status:
        """Makes this engine's index of a backup.

        Args:
            roots: where folders lie now, by where they lay.

        Raises:
            UsageError: there is an index already, or the file is no backup.
        """
        from mmsearch.engine import maintenance

        maintenance.restore(expanded(path), self.folder, roots or {})
        return self.status()

    # -- in and out ------------------------------------------------------------------------

    def export_embeddings(self, folder: PathLike) -> int:
        """Writes vectors and metadata in clip-retrieval's layout; returns how many images."""
        with extra("exchange", "exporting"):
            from mmsearch.ingest.exchange import export_embeddings

        return export_embeddings(self.store, expanded(folder))

    def import_embeddings(self, folder: PathLike, on_progress: OnProgress = no_progress) -> int:
        """Adds images with ready-made vectors from clip-retrieval's layout; returns how many.

        The vectors must come from this index's model. A new index takes the model that the files
        name, if they do, else the engine's.
        """
        with extra("exchange", "importing"):
            from mmsearch.ingest.exchange import import_embeddings, model_of, read_embeddings

        where = expanded(folder)
        spec = self.opened.encoder_to_add(suggested=model_of(where)).spec
        images = read_embeddings(where, spec)
        with self.opened.make().writer() as writer:
            return import_embeddings(
                writer, spec, images, self.opened.runner(1024), on_progress=on_progress
            )

    def models(self) -> list[ModelRow]:
        """The models that come by name and those used on this machine before."""
        active = self.opened.active_space()
        return list_models(
            ModelCache(self.settings.cache_folder()),
            active.spec if active else None,
            self.folder,
            self.settings.home_folder(),
        )

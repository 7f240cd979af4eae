"""The facade: the one place that picks concrete classes and puts them together.

>>> from mmsearch import Engine
>>> with Engine.open("photos.index", model="tiny") as engine:   # doctest: +SKIP
...     engine.index(["~/Pictures"])
...     for hit in engine.search("a dog on the beach", k=3):
...         print(f"{hit.score:.3f} {hit.path}")
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mmsearch.config import Settings, load_settings
from mmsearch.encoders.base import Encoder
from mmsearch.encoders.encoder_provider import EncoderProvider, Provider
from mmsearch.encoders.loading import ModelCache, ModelRow, list_models, pick_device
from mmsearch.errors import IndexNotFound, UsageError
from mmsearch.media.media_types import PICTURES, MediaTypes
from mmsearch.store import catalog
from mmsearch.store.store import REPAIRED, Store
from mmsearch.types import (
    IMAGE,
    TEXT,
    Compose,
    EncoderSpec,
    Failure,
    Filter,
    Fusion,
    Hit,
    IngestReport,
    Progress,
    Query,
    Repaired,
    Status,
    Term,
    Verified,
    expanded,
    several,
)

if TYPE_CHECKING:
    from mmsearch.datasets.labelled import LabelledSet
    from mmsearch.encoders.local import LocalEncoder
    from mmsearch.evaluation.comparison import FusionReport
    from mmsearch.evaluation.report import BenchReport
    from mmsearch.learning.compose import ComposeLearned
    from mmsearch.learning.fusion import FusionLearned
    from mmsearch.learning.rerank import RerankLearned
    from mmsearch.media.isolated import Decoders
    from mmsearch.search.matchers import Kind
    from mmsearch.search.rerank import Reranker
    from mmsearch.search.searcher import Learned, Searcher
    from mmsearch.store.reader import Reader

log = logging.getLogger(__name__)

Notify = Callable[[str], None]
OnProgress = Callable[[Progress], None]
PathLike = str | os.PathLike[str]


def _ignore(_progress: Progress) -> None:
    return None


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
            model: overrules the settings' model; an existing index goes over to it when it is
                indexed (`index`), and until then searches use the index's own.
            notify: told, a line at a time, what a user should know.
            confirm: asked whether weights may be fetched; None is "no".
            provider: gives the index its encoder; None opens models as the settings say.
            media_types: which files are indexed.
        """
        self._settings = settings
        self._asked_model = model
        self._folder = settings.index_folder().absolute()
        self._notify = notify
        self._models = provider or EncoderProvider(settings, notify, confirm)
        self._encoder: Encoder | None = None
        """That of the last search: the next one needs no other, but after a change of model."""
        self.media_types = media_types
        self._store: Store | None = None
        self._decoders: Decoders | None = None
        self._lock = threading.RLock()  # around what is opened on first use

    @classmethod
    def open(
        cls,
        path: PathLike | None = None,
        *,
        model: str | None = None,
        device: str | None = None,
        precision: str | None = None,
        notify: Notify = log.warning,
    ) -> Self:
        """The engine for the index in folder `path`, which `index` makes if it is not there.

        Args:
            path: None is the index that the command line would use.
            model: the model of a new index, or one that `index` is to take an existing one over to.
                None takes an existing index's own, or for a new one what the settings say.
        """
        index = expanded(path) if path is not None else None
        settings = load_settings(index=index, device=device, precision=precision)
        return cls(settings, model=model, notify=notify)

    def beside(self, index: Path, model: str | None = None) -> Engine:
        """An engine for another index, with this one's settings and, unless named, its model."""
        settings = dataclasses.replace(self.settings, index=index)
        return Engine(
            settings,
            model=model or self._asked_model,
            notify=self.notify,
            provider=self._models,
            media_types=self.media_types,
        )

    @property
    def settings(self) -> Settings:
        """What it was opened with."""
        return self._settings

    @property
    def notify(self) -> Notify:
        """What is told, a line at a time, what a user should know."""
        return self._notify

    @property
    def folder(self) -> Path:
        """Where the index lies, or will lie."""
        return self._folder

    def close(self) -> None:
        """Lets go of the files; the engine opens them again when it is used again."""
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None
            if self._decoders is not None:
                self._decoders.close()
                self._decoders = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def store(self) -> Store:
        """The open store.

        Raises:
            IndexNotFound: there is no index yet.
        """
        with self._lock:
            if self._store is None:
                self._store = Store(self._folder)
            return self._store

    @property
    def decoders(self) -> Decoders:
        """What reads and decodes image files."""
        with self._lock:
            self._decoders = self._decoders or self.new_decoders()
            return self._decoders

    def new_decoders(self) -> Decoders:
        """Processes that decode this engine's media types, for its caller to close."""
        from mmsearch.media.isolated import Decoders  # which searches by text do without

        return Decoders(types=self.media_types)

    def made_store(self) -> Store:
        """The open store, made where there is none yet.

        Raises:
            UsageError: the folder holds something else.
        """
        with self._lock:
            self._store = self._store or Store.create(self._folder)
            return self._store

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
        on_progress: OnProgress = _ignore,
    ) -> IngestReport:
        """Brings the index in step with folders and files; makes the index if there is none.

        An engine that was opened with another model than the index has first does that, and then
        embeds everything that the index holds with the other model, beside its own, which answers
        searches until all is done. A run that was cut off is gone on with by the next one. An
        engine that was opened with the index's own model by its name gives that up.

        Args:
            paths: folders and image files; none of them rescans all that the index knows.
            captions: a labelled set or the file of one.
            prune: whether to remove what is gone. None removes it, but not from a folder that
                is missing or empty, as an unmounted disk would be.
            exclude: globs of names or relative paths to leave out, now and in later runs.
            patches: keep what re-ranking reads of every image, now and in later runs; False drops
                it. None goes on as before.
            reread: read every file again. Without, one whose size and modification time are as they
                were is taken for unchanged.
            dry_run: only count what would be done; a new index is not made.

        Raises:
            Interrupted: by Ctrl-C; what was committed is kept.
            UsageError: a path or a captions file that cannot be used.
        """
        from mmsearch import indexing

        named = [expanded(path) for path in several(paths)]
        exclude = None if exclude is None else several(exclude)
        labelled = self._labelled(captions)
        if not named:
            self.store  # noqa: B018 - raises where there is no index to rescan
        if dry_run:
            from mmsearch.ingest.dry_run import dry_run as count_only

            existing = self.store if self.has_index() else None
            space = existing.active_space() if existing else None
            if space is not None and not self.may_use(space.spec):
                self._notify(
                    f"the index is in '{space.spec.model}': all of it would be embedded with "
                    f"'{self._asked_model}' too, which would then take its place"
                )
            return count_only(existing, named, exclude, prune, labelled, reread, self.media_types)
        request = indexing.Request(named, labelled, prune, exclude, patches, reread, on_progress)
        report = indexing.index(self, self._models, request)
        remarks = labelled[0].remarks if labelled else ()
        return dataclasses.replace(report, captions_remarks=remarks)

    def _labelled(self, captions: PathLike | LabelledSet | None) -> tuple[LabelledSet, Path] | None:
        if captions is None:
            return None
        from mmsearch.datasets.formats import read_labelled
        from mmsearch.datasets.labelled import LabelledSet

        if isinstance(captions, LabelledSet):
            return captions, Path()
        path = expanded(captions)
        found = read_labelled(path)
        if told := found.told():
            self._notify(told)
        return found, path if path.is_dir() else path.parent

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
            rerank: how many of the first images are looked at a second time (`Query.rerank`).
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
        if any(term.image is not None for term in query.terms):
            self.decoders.start()  # it is ready when the model is
        encoder = self._encoder
        while True:
            if encoder is None:
                space = self.store.active_space()
                if space is None:
                    return []
                encoder = self._encoder = self.encoder_of(space.spec)
                for term in query.terms:
                    # Beside what else is read and imported: the tokenizer, FAISS.
                    encoder.warm_up(TEXT if term.text is not None else IMAGE, wait=False)
            with self.store.reader() as reader:
                if reader.is_empty:
                    return []
                if reader.space.spec.space == encoder.spec.space:
                    return self._searcher(reader, encoder).search(query)
            encoder = None  # the index has another model by now

    @contextmanager
    def searcher(self, learned: Learned | None = None) -> Iterator[Searcher]:
        """What answers queries: one view of the index with the encoder of its space.

        Args:
            learned: what was learned for that space; None takes what lies with the index and
                with the model.

        Raises:
            IndexNotFound: the index is empty, or there is none.
        """
        with self.store.reader() as reader:
            yield self._searcher(reader, self.encoder_of(reader.space.spec), learned)

    def _searcher(
        self, reader: Reader, encoder: Encoder, learned: Learned | None = None
    ) -> Searcher:
        from mmsearch.search.compose import read_composer
        from mmsearch.search.fusion import read_weights
        from mmsearch.search.searcher import Learned, Searcher

        space = encoder.spec.space

        def read() -> Reranker | None:
            from mmsearch.search.rerank import read_reranker

            return read_reranker(self._folder, space)

        if learned is None:
            learned = Learned(
                weights=lambda: read_weights(self._folder, space),
                composer=lambda: read_composer(self._folder, space, encoder.spec.dim),
                reranker=read,
            )
        return Searcher(
            reader,
            encoder,
            learned,
            lambda: self._models.local_of(encoder.spec),
            lambda: self.decoders,
        )

    # -- measuring -------------------------------------------------------------------------

    def bench(
        self,
        dataset: PathLike | LabelledSet | None = None,
        *,
        images: PathLike | None = None,
        split: str | None = None,
        limit: int | None = None,
        on_progress: OnProgress = _ignore,
    ) -> BenchReport:
        """Recall@1/5/10 both ways, on a labelled set or on the index's own captions.

        A labelled set is indexed into a temporary index with this engine's model settings;
        the searches are those that `search` runs.

        Args:
            dataset: a labelled set or its file; None measures this index.
            images: the folder of the images, where it is not beside the labels.
            split: which split; None is "test" where there is one, else all of it.
            limit: only so many images.
        """
        from mmsearch import trials

        labels = trials.Labels(dataset, images, split, limit)
        return trials.bench(self, labels, on_progress)

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
        on_progress: OnProgress = _ignore,
    ) -> FusionReport:
        """How well each setting finds images by captions that the index does not hold.

        This works on a copy: neither the index nor the labelled set changes. The other
        arguments are those of `bench`.

        Args:
            fusions: what to measure; the others are compared with the first.
            rerank: measure each of them with so many images looked at a second time, too.
            hold_out: how many captions of each image ask, and are not in the index; 0 is all.
            captioned: the share of the images that keep captions.

        Raises:
            UsageError: no image has a caption, or a setting needs what was not learned.
        """
        from mmsearch import trials

        labels = trials.Labels(dataset, images, split, limit)
        return trials.compare_fusions(
            self,
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
        on_progress: OnProgress = _ignore,
    ) -> tuple[FusionLearned, bool]:
        """Learns for this index what the scores of images and of captions count.

        The arguments are those of `compare_fusions`.

        Args:
            dataset: labels to learn from; None is the index's own captions.
            keep: keep the weights also where they do not help.

        Returns what was learned, and whether it was kept: where the 95% interval of the mean
        recall's gain over equal weights lies above nothing.

        Raises:
            IndexNotFound: there is no index to keep the weights for.
            UsageError: too few captions to learn from.
        """
        from mmsearch import trials

        labels = trials.Labels(dataset, images, split, limit)
        return trials.train_fusion(
            self, labels, hold_out=hold_out, keep=keep, seed=seed, on_progress=on_progress
        )

    def train_compose(
        self,
        dataset: PathLike | LabelledSet | None = None,
        *,
        images: PathLike | None = None,
        keep: bool = False,
        seed: int = 0,
        on_progress: OnProgress = _ignore,
    ) -> tuple[ComposeLearned, bool]:
        """Learns for this index's model what "this picture, but ..." means, from drawn scenes.

        Args:
            dataset: captioned photos to learn from and to measure on too.
            images: the folder of the photos, where it is not beside the labels.
            keep: keep it also where it does not help.

        Returns what was learned, and whether it was kept: where the 95% interval of its gain on
        drawn scenes lies above nothing. Searches take it unasked only if photos have shown that
        it finds no less than a sum and than the text alone.

        Raises:
            IndexNotFound: there is no index to keep it for.
        """
        from mmsearch import trials

        labels = trials.Labels(dataset, images)
        return trials.train_compose(self, labels, keep=keep, seed=seed, on_progress=on_progress)

    def train_rerank(
        self,
        dataset: PathLike | LabelledSet,
        *,
        kind: Kind = "interaction",
        images: PathLike | None = None,
        keep: bool = False,
        seed: int = 0,
        on_progress: OnProgress = _ignore,
    ) -> tuple[RerankLearned, bool]:
        """Learns for this index's model to re-rank, from captioned photos.

        Args:
            dataset: learned from, chosen by (val) and measured on (test); splits that it lacks
                are made, a tenth each.
            kind: "interaction" (the best patch of each token) or "attention" (cross-modal).
            images: the folder of the photos, where it is not beside the labels.
            keep: keep it also where it does not help.

        Returns what was learned, and whether it was kept: where the 95% interval of its gain on
        the test photos lies above nothing.

        Raises:
            IndexNotFound: there is no index to keep it for.
            UsageError: too few photos, or a model whose patches cannot be read.
        """
        from mmsearch import trials

        labels = trials.Labels(dataset, images)
        return trials.train_rerank(
            self, labels, kind=kind, keep=keep, seed=seed, on_progress=on_progress
        )

    # -- the rest --------------------------------------------------------------------------

    def status(self) -> Status:
        """What the index holds."""
        return self.store.status()

    def errors(self) -> list[Failure]:
        """The ledger: files that could not be used, and why."""
        with self.store.catalog.read() as queries:
            return queries.failures()

    def retry(self, on_progress: OnProgress = _ignore) -> IngestReport:
        """Tries all files of the ledger again, whether they changed or not, in a rescan.

        Raises:
            IndexNotFound: there is no index.
        """
        with self.store.writer() as writer, writer.change() as change:
            change.forget_failures()
        return self.index(on_progress=on_progress)

    # -- upkeep ----------------------------------------------------------------------------

    def verify(self, *, deep: bool = False) -> Verified:
        """Whether the index is what was written; nothing is changed.

        Args:
            deep: look at every byte that has a checksum, not only at what must be there.

        Raises:
            IndexNotFound: there is no index.
        """
        from mmsearch.store.verify import verify

        return verify(self._folder, deep=deep)

    def repair(self, on_progress: OnProgress = _ignore) -> Repaired:
        """Makes a damaged index sound again; what was lost is in the report.

        Images whose vectors are lost are embedded again. Where the model is not at hand, or their
        folder is missing, they stay without: `verify` says so, and another repair goes on.

        Raises:
            IndexNotFound: there is no index.
            DamageError: too little is left of it.
        """
        from mmsearch import upkeep

        return upkeep.repair(self, self._models, on_progress)

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
        from mmsearch import upkeep

        return upkeep.backup(self.store, expanded(path))

    def restore(self, path: PathLike, roots: Mapping[str, str] | None = None) -> Status:
        """Makes this engine's index of a backup.

        Args:
            roots: where folders lie now, by where they lay.

        Raises:
            UsageError: there is an index already, or the file is no backup.
        """
        from mmsearch import upkeep

        upkeep.restore(expanded(path), self._folder, roots or {})
        return self.status()

    # -- in and out ------------------------------------------------------------------------

    def export_embeddings(self, folder: PathLike) -> int:
        """Writes vectors and metadata in clip-retrieval's layout; returns how many images."""
        from mmsearch.ingest.exchange import export_embeddings

        return export_embeddings(self.store, expanded(folder))

    def import_embeddings(self, folder: PathLike, on_progress: OnProgress = _ignore) -> int:
        """Adds images with ready-made vectors from clip-retrieval's layout; returns how many.

        The vectors must come from this index's model. A new index takes the model that the files
        name, if they do, else the engine's.
        """
        from mmsearch.ingest.exchange import import_embeddings, model_of, read_embeddings

        where = expanded(folder)
        spec = self.encoder_for_writing(suggested=model_of(where)).spec
        images = read_embeddings(where, spec)
        with self.made_store().writer() as writer:
            return import_embeddings(
                writer, spec, images, self.decoders, workers=self.settings.workers,
                on_progress=on_progress,
            )  # fmt: skip

    def models(self) -> list[ModelRow]:
        """The models that come by name and those used on this machine before."""
        active = self.store.active_space() if self.has_index() else None
        return list_models(
            ModelCache(self.settings.cache_folder()),
            active.spec if active else None,
            self._folder,
            self.settings.home_folder(),
        )

    def has_index(self) -> bool:
        """Whether there is an index yet."""
        return any((self._folder / name).is_file() for name in (catalog.FILE_NAME, REPAIRED))

    # -- which model -----------------------------------------------------------------------

    def encoder_of_index(self) -> Encoder:
        """The model that answers searches.

        Raises:
            IndexNotFound: the index is empty, or there is none.
            ModelNotFound: it cannot be had, or its weights are others by now.
        """
        space = self.store.active_space()
        if space is None:
            raise IndexNotFound(f"{self._folder}: the index is empty; run 'mmsearch index PATH'")
        return self.encoder_of(space.spec)

    def encoder_of(self, spec: EncoderSpec) -> Encoder:
        """The model of a space, to answer searches.

        Raises:
            ModelNotFound: it cannot be had, or its weights are others by now.
        """
        # One text is encoded sooner than a GPU is woken.
        device = "cpu" if self.settings.device == "auto" else pick_device(self.settings.device)
        return self._models.for_space(spec, device)

    def may_use(self, spec: EncoderSpec) -> bool:
        """Whether a model is the one that was asked for, where one was."""
        asked = self._asked_model
        return asked in (None, "auto") or self._models.is_of(asked, spec)

    def local_encoder(self) -> LocalEncoder:
        """What gives the patches of images and the tokens of texts, in this index's space."""
        return self._models.local_of(self.encoder_of_index().spec)

    def encoder_for_writing(self, suggested: str | None = None) -> Encoder:
        """What vectors are added with: as `index`, but never another model than the index's own.

        Args:
            suggested: the model of a new index, where none was asked for.

        Raises:
            UsageError: the index was made with another model than was asked for.
        """
        encoder, is_other = self.encoder_for_index(suggested)
        if is_other:
            raise UsageError(
                f"{self._folder} was made with another model than '{encoder.spec.model}' as it is "
                "now; 'mmsearch index' with --model goes over to it, --index DIR names another "
                "index"
            )
        return encoder

    def names_model(self) -> bool:
        """Whether it was opened with a model's name."""
        return self._asked_model not in (None, "auto")

    def encoder_for_index(self, suggested: str | None = None) -> tuple[Encoder, bool]:
        """The model that was asked for, else the index's own, else what was suggested or set.

        Second: whether it is another than the index has.
        """
        device = pick_device(self.settings.device)
        asked = self._asked_model
        space = self.store.active_space() if self.has_index() else None
        if space is None:
            model = asked or suggested or self.settings.model
            return self._models.for_new_index(model, device), False
        if asked is None or not self.names_model():
            return self._models.for_space(space.spec, device), False
        encoder = self._models.for_new_index(asked, device)
        return encoder, encoder.spec.space != space.spec.space

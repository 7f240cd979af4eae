"""An index and what serves it: its store, its encoder, and what reads its files."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mmsearch.config import Settings
from mmsearch.encoders.base import Encoder
from mmsearch.encoders.encoder_provider import Provider
from mmsearch.encoders.loading import pick_device
from mmsearch.errors import IndexNotFound, UsageError
from mmsearch.jobs.runner import BATCH, Runner
from mmsearch.media.media_types import MediaTypes
from mmsearch.store import catalog
from mmsearch.store.reader import Reader
from mmsearch.store.rows import SpaceRow
from mmsearch.store.store import REPAIRED, Store
from mmsearch.types import IMAGE, TEXT, EncoderSpec, Hit, Notify, Query

if TYPE_CHECKING:
    from mmsearch.encoders.patch_encoder import PatchEncoder
    from mmsearch.media.sandbox import Decoders
    from mmsearch.search.searcher import Searcher, Trained


class OpenIndex:
    """An index's folder, and what is opened for it when it is needed. Threads may share it."""

    def __init__(
        self,
        settings: Settings,
        provider: Provider,
        *,
        model: str | None,
        notify: Notify,
        media_types: MediaTypes,
    ) -> None:
        """Does no work yet.

        Args:
            settings: which index, device and precision, and the model of a new index.
            provider: gives the index its encoder.
            model: overrules the settings' model; an existing index migrates to it when it is
                indexed, and until then searches use the index's own.
            notify: told what a user should know.
            media_types: which files are indexed.
        """
        self.settings = settings
        self.provider = provider
        self.asked_model = model
        self.notify = notify
        self.media_types = media_types
        self.folder = settings.index_folder().absolute()
        """Where the index lies, or will lie."""
        self.batch = BATCH
        """How many items a job commits together."""
        self._store: Store | None = None
        self._decoders: Decoders | None = None
        self.search_encoder: Encoder | None = None
        """That of the last search: the next one opens another if this is None or of another model.
        """
        self._lock = threading.RLock()  # around what is opened on first use

    @contextmanager
    def scratch(self, model: str | None = None) -> Iterator[OpenIndex]:
        """An index in a temporary folder, yet to be made.

        With all that this one is opened with and, unless named, its model.
        """
        import tempfile

        with tempfile.TemporaryDirectory(prefix="mmsearch-bench-") as folder:
            other = OpenIndex(
                dataclasses.replace(self.settings, index=Path(folder) / "index"),
                self.provider,
                model=model or self.asked_model,
                notify=self.notify,
                media_types=self.media_types,
            )
            with closing(other):
                yield other

    def close(self) -> None:
        """Lets go of the files; they are opened again when they are needed again."""
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None
            if self._decoders is not None:
                self._decoders.close()
                self._decoders = None

    # -- the store and the files -------------------------------------------------------------

    def exists(self) -> bool:
        """Whether there is an index yet."""
        return any((self.folder / name).is_file() for name in (catalog.FILE_NAME, REPAIRED))

    @property
    def store(self) -> Store:
        """The open store.

        Raises:
            IndexNotFound: there is no index yet.
        """
        with self._lock:
            if self._store is None:
                self._store = Store(self.folder)
            return self._store

    def make(self) -> Store:
        """The open store, made where there is none yet.

        Raises:
            UsageError: the folder holds something else.
        """
        with self._lock:
            self._store = self._store or Store.create(self.folder)
            return self._store

    def active_space(self) -> SpaceRow | None:
        """The space that searches use; None where the index is empty, or there is none."""
        return self.store.active_space() if self.exists() else None

    @property
    def space(self) -> SpaceRow:
        """The space that searches use.

        Raises:
            IndexNotFound: the index is empty, or there is none.
        """
        found = self.store.active_space()
        if found is None:
            raise IndexNotFound(f"{self.folder}: the index is empty; run 'mmsearch index PATH'")
        return found

    @property
    def decoders(self) -> Decoders:
        """What reads and decodes files."""
        with self._lock:
            if self._decoders is None:
                from mmsearch.media.sandbox import Decoders  # which searches by text do without

                self._decoders = Decoders(types=self.media_types)
            return self._decoders

    def runner(self, batch: int = 0) -> Runner:
        """What jobs run on: its decoders stay for the next job and the next search."""
        return Runner(self.decoders, self.settings.workers, batch or self.batch)

    # -- the encoder -------------------------------------------------------------------------

    def names_model(self) -> bool:
        """Whether it was opened with a model's name."""
        return self.asked_model not in (None, "auto")

    def may_use(self, spec: EncoderSpec) -> bool:
        """Whether a model is the one that was asked for, where one was."""
        asked = self.asked_model
        return asked in (None, "auto") or self.provider.is_of(asked, spec)

    def encoder_of(self, spec: EncoderSpec) -> Encoder:
        """The model of a space, to answer searches.

        Raises:
            ModelNotFound: it cannot be had, or its weights are others by now.
        """
        # One text is encoded sooner than a GPU is woken.
        device = "cpu" if self.settings.device == "auto" else pick_device(self.settings.device)
        return self.provider.for_space(spec, device)

    def encoder_for(self, spec: EncoderSpec) -> Encoder:
        """The model of a space, to index with; the errors are `encoder_of`'s."""
        return self.provider.for_space(spec, pick_device(self.settings.device))

    def patch_encoder(self) -> PatchEncoder:
        """What gives the patches of images and the tokens of texts, in this index's space."""
        return self.provider.patch_encoder_of(self.space.spec)

    def encoder_to_index(self, suggested: str | None = None) -> tuple[Encoder, bool]:
        """The model that was asked for, else the index's own, else what was suggested or set.

        Second: whether it is another than the index has.
        """
        space = self.active_space()
        if space is not None and not self.names_model():
            return self.encoder_for(space.spec), False
        model = self.asked_model or suggested or self.settings.model
        encoder = self.provider.for_new_index(model, pick_device(self.settings.device))
        return encoder, space is not None and encoder.spec.space != space.spec.space

    def encoder_to_add(self, suggested: str | None = None) -> Encoder:
        """What vectors are added with: as `encoder_to_index`, but never another than the index's.

        Args:
            suggested: the model of a new index, where none was asked for.

        Raises:
            UsageError: the index was made with another model than was asked for.
        """
        encoder, is_other = self.encoder_to_index(suggested)
        if is_other:
            raise UsageError(
                f"{self.folder} was made with another model than '{encoder.spec.model}' as it is "
                "now; 'mmsearch index' with --model migrates to it, --index DIR names another "
                "index"
            )
        return encoder

    # -- searching ---------------------------------------------------------------------------

    def search(self, query: Query) -> list[Hit]:
        """The hits, best first, from one view of the index; nothing from an empty one."""
        store, encoder = self.store, self.search_encoder
        if any(term.image is not None for term in query.terms):
            self.decoders.start()  # it is ready when the model is
        while True:
            if encoder is None:
                space = store.active_space()
                if space is None:
                    return []
                encoder = self.search_encoder = self.encoder_of(space.spec)
                for term in query.terms:
                    # Beside what else is read and imported: the tokenizer, FAISS.
                    encoder.warm_up(TEXT if term.text is not None else IMAGE, wait=False)
            with store.reader(*_needed(query)) as reader:
                if reader.is_empty:
                    return []
                if reader.space.spec.space == encoder.spec.space:
                    return self._searcher(reader, encoder).search(query)
            encoder = None  # the index has another model by now

    @contextmanager
    def searcher(self, trained: Trained | None = None) -> Iterator[Searcher]:
        """What answers queries: one view of the index with the encoder of its space.

        Args:
            trained: the networks and weights for that space; None takes those that lie with the
                index and with the model.

        Raises:
            IndexNotFound: the index is empty, or there is none.
        """
        with self.store.reader() as reader:
            yield self._searcher(reader, self.encoder_of(reader.space.spec), trained)

    def _searcher(
        self, reader: Reader, encoder: Encoder, trained: Trained | None = None
    ) -> Searcher:
        from mmsearch.search.searcher import Searcher, trained_for

        return Searcher(
            reader,
            encoder,
            trained or trained_for(self.folder, encoder.spec),
            lambda: self.provider.patch_encoder_of(encoder.spec),
            lambda: self.decoders,
        )


def _needed(query: Query) -> tuple[str, ...]:
    """The modalities whose vectors a query is compared with."""
    if query.to == IMAGE and query.fusion != "image":
        return IMAGE, TEXT
    return (TEXT if query.to == "caption" else query.to,)

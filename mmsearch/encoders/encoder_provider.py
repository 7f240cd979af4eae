"""Who gives an index its encoder, and what "auto" stands for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from mmsearch.config import Settings
from mmsearch.encoders.base import Encoder
from mmsearch.encoders.loading import (
    ModelCache,
    open_encoder,
    open_patch_encoder,
    open_space,
    with_checked_precision,
)
from mmsearch.encoders.registry import (
    ALIASES,
    BASE,
    KNOWN,
    TINY,
    ModelSource,
    cached_files,
    full_name,
    parse_model,
)
from mmsearch.errors import MissingExtra, MmsearchError, ModelNotFound, UsageError
from mmsearch.types import EncoderSpec, Notify, Pixels

if TYPE_CHECKING:
    from mmsearch.encoders.patch_encoder import PatchEncoder

_BASE_MEGABYTES = KNOWN[ALIASES[BASE]].megabytes


class Provider(Protocol):
    """Gives an index its encoder. Threads may share it, and so may the indexes of a process."""

    def for_space(self, spec: EncoderSpec, device: str) -> Encoder:
        """The model that an index was made with.

        Raises:
            ModelNotFound: it cannot be had, or its weights are others by now.
        """
        ...

    def for_new_index(self, model: str, device: str) -> Encoder:
        """The model of that name, or "auto".

        Raises:
            ModelNotFound: no such model, or its weights cannot be had.
        """
        ...

    def is_of(self, name: str, spec: EncoderSpec) -> bool:
        """Whether a name is one of a space's model, as far as is known without loading it."""
        ...

    def checked(self, encoder: Encoder, count: int, sample: Callable[[], Pixels]) -> Encoder:
        """The encoder in the precision that serves a run of `count` pictures best.

        Args:
            sample: gives some of them to compare precisions on.
        """
        ...

    def patch_encoder_of(self, spec: EncoderSpec) -> PatchEncoder:
        """What gives the patches and tokens of the model that an index was made with, on the CPU.

        Raises:
            UsageError: a model whose patches cannot be read.
            ModelNotFound: it cannot be had, or its weights are others by now.
        """
        ...


class GivenEncoder:
    """A provider of one encoder that its caller has made."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def for_space(self, spec: EncoderSpec, device: str) -> Encoder:  # noqa: ARG002 - the protocol's
        if spec.space != self._encoder.spec.space:
            raise ModelNotFound(
                f"the index was made with '{spec.model}', not '{self._encoder.spec.model}'"
            )
        return self._encoder

    def for_new_index(self, model: str, device: str) -> Encoder:  # noqa: ARG002 - the protocol's
        return self._encoder

    def is_of(self, name: str, spec: EncoderSpec) -> bool:
        return name == spec.model

    def checked(self, encoder: Encoder, *_: Any) -> Encoder:
        return encoder

    def patch_encoder_of(self, spec: EncoderSpec) -> PatchEncoder:
        raise UsageError(f"'{spec.model}' has no patches that mmsearch can read")


class EncoderProvider:
    """Opens models as the settings say; what serves an index, once."""

    def __init__(
        self,
        settings: Settings,
        notify: Notify,
        confirm: Callable[[str], bool] | None,
        open_model: Callable[..., Encoder] = open_encoder,
    ) -> None:
        """Takes what to say to a user, and how to ask one; None asks nobody.

        Args:
            open_model: as `open_encoder`, for models that are asked for by name, and for those
                of an index that were not converted here yet.
        """
        self._settings, self._open_model = settings, open_model
        self._notify = notify
        self._confirm = confirm
        self._open: dict[tuple[str, str], Any] = {}
        self._without_language: set[str] = set()
        self._lock = threading.Lock()  # around the tables here; never while a model is opened
        self._opening: dict[tuple[str, str], threading.Lock] = {}

    @cached_property
    def cache(self) -> ModelCache:
        """The converted models of this machine."""
        return ModelCache(self._settings.cache_folder())

    def source(self, name: str) -> ModelSource:
        """The model that a user calls by a name: one that was trained here goes by its own.

        Raises:
            UsageError: no model could have such a name.
        """
        return parse_model(full_name(name, self._settings.home_folder()))

    def for_space(self, spec: EncoderSpec, device: str) -> Encoder:
        encoder: Encoder = self._once(
            (spec.space, device),
            lambda: self._open_space(spec, device).with_streams(self._settings.streams),
        )
        return encoder

    def _in_language(self, encoder: Encoder) -> Encoder:
        """A model that was just opened, for texts in the language of the settings."""
        language = self._settings.language
        if not language:
            return encoder
        found = encoder.with_language(language)
        if found is encoder and encoder.spec.space not in self._without_language:
            self._without_language.add(encoder.spec.space)
            self._notify(f"'{encoder.spec.model}' takes no language: '{language}' has no effect")
        return found

    def _once(self, key: tuple[str, str], opened: Callable[[], Any]) -> Any:
        with self._alone(key):
            if key not in self._open:
                self._open[key] = opened()
            return self._open[key]

    def _alone(self, key: tuple[str, str]) -> threading.Lock:
        """Held while a model is opened, so that two threads do not do it twice."""
        with self._lock:
            return self._opening.setdefault(key, threading.Lock())

    def checked(self, encoder: Encoder, count: int, sample: Callable[[], Pixels]) -> Encoder:
        found = with_checked_precision(
            encoder, self.cache, self._settings.precision, count, sample, self._notify
        )
        if found is not encoder:
            with self._alone((encoder.spec.space, "cpu")):
                found = self._in_language(found).with_streams(self._settings.streams)
                self._open[encoder.spec.space, "cpu"] = found
        return found

    def patch_encoder_of(self, spec: EncoderSpec) -> PatchEncoder:
        encoder = self.for_space(spec, "cpu")
        patches: PatchEncoder = self._once(
            (spec.space, "patches"), lambda: open_patch_encoder(encoder, self.cache, self._notify)
        )
        return patches

    def for_new_index(self, model: str, device: str) -> Encoder:
        # "auto" is `base` where it is here or may be fetched, else `tiny`.
        if model != "auto":
            return self._load(self.source(model), device)
        base = parse_model(BASE)
        is_here = cached_files(base) is not None or self.cache.find(base) is not None
        if is_here or self._may_fetch_base():
            try:
                return self._load(base, device)
            except ModelNotFound as error:
                self._notify(str(error))
        self._notify(
            "using the bundled model 'tiny', which is for trying; 'base' is far stronger "
            f"({_BASE_MEGABYTES} MB, fetched with --model base)"
        )
        return self._load(parse_model(TINY), device)

    def _may_fetch_base(self) -> bool:
        question = (
            f"Fetch the model 'base' ({_BASE_MEGABYTES} MB, once)? It is far stronger than tiny."
        )
        return bool(self._confirm and self._confirm(question))

    def _open_space(self, spec: EncoderSpec, device: str) -> Encoder:
        if device == "cpu" or self.cache.is_onnx(spec.space):
            name = self.cache.name_of(spec.space, spec.model)
            encoder = open_space(
                spec.space, name, self.cache, self._settings.precision, self._notify
            )
            if encoder is not None:
                return self._in_language(encoder)
        reason: MmsearchError | None = None
        for name in self.cache.names_of(spec.space, spec.model):
            try:
                found = self._load(parse_model(name), device)
            except (ModelNotFound, MissingExtra) as error:
                reason = reason or error
                continue
            if found.spec.space == spec.space:
                return found
        raise reason or ModelNotFound(
            f"the weights of '{spec.model}' are not those that the index was made with; put those "
            f"back, or embed everything again with 'mmsearch index --model {spec.model}'"
        )

    def is_of(self, name: str, spec: EncoderSpec) -> bool:
        source = self.source(name)
        if source.name == spec.model:
            return True
        entry = self.cache.find(source)
        return entry is not None and entry["space"] == spec.space

    def _load(self, source: ModelSource, device: str) -> Encoder:
        found = self._open_model(
            source,
            self.cache,
            device=device,
            precision=self._settings.precision,
            notify=self._notify,
        )
        return self._in_language(found)

"""The words of mmsearch as frozen dataclasses."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mmsearch.errors import FormatError, UsageError

Modality = str
"""What an encoder embeds: "image", "text", or another that it takes."""
IMAGE, TEXT = "image", "text"

TARGETS = ("image", "caption")
"""What is usually looked for; whatever else an index's encoder embeds can be, too."""

Fusion = Literal["auto", "image", "caption", "words", "sum", "rrf", "trained"]
"""How the scores of an image and of its captions make one: see `mmsearch.search.fusion`."""
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)

Compose = Literal["auto", "early", "sum"]
"""How a query's picture and its text make one vector: see `mmsearch.search.compose`."""
COMPOSES: tuple[Compose, ...] = get_args(Compose)

PathLike = str | os.PathLike[str]
Notify = Callable[[str], None]
"""Told, a line at a time, what a user should know."""
OnProgress = Callable[["Progress"], None]
"""Told where a long job stands."""

Vectors = NDArray[np.float32]
"""Embeddings, shape (n, d), each row of length 1."""

Pixels = NDArray[np.uint8]
"""Images as an encoder takes them, shape (n, height, width, 3), RGB, 0 to 255."""

Batch = Sequence[Any] | NDArray[Any]
"""What an encoder takes at once: texts, or arrays of one modality."""

Ids = NDArray[np.int64]
"""Ids of segments, captions or media, shape (n,)."""


@dataclass(frozen=True)
class Facts:
    """What a file says of itself; 0 and None where it says nothing."""

    width: int = 0
    """In pixels, as a viewer shows it."""
    height: int = 0
    captured: datetime | None = None
    """In local time."""
    duration_ms: int | None = None
    latitude: float | None = None
    longitude: float | None = None
    captured_from: str = "exif"
    """"exif" for what the file says, "mtime" for when it was modified."""
    kind: str | None = "image"
    """The media type. A decoder sets neither this nor `captured_from`."""


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its pictures: open_clip's preprocessing configuration."""

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    """"shortest": scale the short side and crop the centre; "longest": scale the long side
    and pad; "squash": scale each side on its own."""
    fill_color: int = 0

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Preprocess:
        """From plain values, as `dataclasses.asdict` gives them."""
        values = dict(stored)
        for name in ("size", "mean", "std"):
            values[name] = tuple(values[name])
        return cls(**values)


InputSpec = Mapping[str, Any]
"""How an encoder takes one modality, as plain values: for "image" the fields of `Preprocess`, for
"text" `context_length`, `tokenizer` and `clean`. The decoder of a media type gets it."""

_MODALITY = re.compile(r"[a-z][a-z0-9_]*")
_SPEC_VERSION = 1
_SPEC_FIELDS = frozenset(("version", "model", "parameters", "licence", "input"))


@dataclass(frozen=True)
class EncoderSpec:
    """What is known of a model without loading it.

    `space` is the identity of its embedding space: a hash over architecture, weights and
    preprocessing. Vectors compare only within one space.
    """

    model: str
    space: str
    dim: int
    inputs: Mapping[Modality, InputSpec]
    """What it embeds, and how each is given to it."""
    parameters: int = 0
    licence: str = ""

    def __post_init__(self) -> None:
        for modality in self.inputs:
            if not _MODALITY.fullmatch(modality) or modality == "caption":
                raise UsageError(f"a modality is named in small letters, not {modality!r}")
        # As they come back from where they are stored: lists for tuples.
        object.__setattr__(self, "inputs", json.loads(json.dumps(dict(self.inputs))))

    @property
    def preprocess(self) -> Preprocess:
        """How it takes pictures."""
        return Preprocess.from_json(self.inputs[IMAGE])

    @property
    def context_length(self) -> int:
        """How many tokens of a text it takes."""
        return int(self.inputs[TEXT]["context_length"])

    @property
    def tokenizer(self) -> str:
        """Either "clip" (its byte-pair encoding), "json" (a `tokenizer.json`) or "open_clip".

        The last is what open_clip picks for a model; the others need no torch.
        """
        return str(self.inputs[TEXT]["tokenizer"])

    @property
    def tokenizer_clean(self) -> str:
        """How a text is cleaned, by open_clip's name for it."""
        return str(self.inputs[TEXT].get("clean", "lower"))

    def to_json(self) -> dict[str, Any]:
        """As plain values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> EncoderSpec:
        return cls(**stored)

    def tower(self, modality: Modality) -> dict[str, Any]:
        """What of it belongs to one modality, as plain values, for `of_towers`."""
        return {
            "version": _SPEC_VERSION, "model": self.model, "parameters": self.parameters,
            "licence": self.licence, "input": dict(self.inputs[modality]),
        }  # fmt: skip

    @classmethod
    def of_towers(
        cls, space: str, dim: int, towers: Mapping[Modality, Mapping[str, Any]]
    ) -> EncoderSpec:
        """The spec whose towers these are.

        Raises:
            FormatError: a newer program wrote one.
        """
        for stored in towers.values():
            strange = set(stored) - _SPEC_FIELDS
            if stored["version"] != _SPEC_VERSION or strange:
                raise FormatError(
                    f"the index describes its model as a newer mmsearch does "
                    f"({', '.join(sorted(strange)) or 'version'}); update mmsearch",
                    is_ours=True,
                )
        first = next(iter(towers.values()))
        inputs = {modality: dict(stored["input"]) for modality, stored in towers.items()}
        return cls(
            first["model"], space, dim, inputs, int(first["parameters"]), str(first["licence"])
        )


#: More hits than there can be media, and few enough for every library to count.
MOST = 2**31 - 1
_MOST_WEIGHT = 1e6


@dataclass(frozen=True)
class Term:
    """One part of a query: a text or an image, with its weight. Negative means "not".

    Raises:
        UsageError: neither or both, an empty text, or a weight that is no usable number.
    """

    text: str | None = None
    image: str | os.PathLike[str] | None = None
    """The path of a file; `~` is the user's home."""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if (self.text is None) == (self.image is None):
            raise UsageError("a term is a text or an image: give one of them")
        if self.text is not None and not isinstance(self.text, str):
            raise UsageError(f"a text to search for is a str, not {self.text!r}")
        if self.text is not None and not self.text.strip():
            raise UsageError("an empty text cannot be searched for")
        if self.image is not None:
            object.__setattr__(self, "image", expanded(self.image))
        if not _is_number(self.weight) or not abs(self.weight) <= _MOST_WEIGHT:
            raise UsageError(
                f"a weight is a number up to {_MOST_WEIGHT:g} and not below {-_MOST_WEIGHT:g}, "
                f"not {self.weight}"
            )


@dataclass(frozen=True)
class Filter:
    """Which media may be hits. Dates are capture dates: `after` <= captured < `before`.

    Raises:
        UsageError: something that is no path or no date.
    """

    under: str | os.PathLike[str] | None = None
    """A folder; `~` is the user's home."""
    after: datetime | None = None
    """In local time, as capture dates are; a moment with a zone is converted to it."""
    before: datetime | None = None

    def __post_init__(self) -> None:
        if self.under is not None:
            object.__setattr__(self, "under", expanded(self.under))
        for name in ("after", "before"):
            moment = getattr(self, name)
            if moment is None:
                continue
            if not isinstance(moment, datetime):
                raise UsageError(f"{name} is a datetime, not {moment!r}")
            if moment.tzinfo is not None:
                try:
                    local = moment.astimezone().replace(tzinfo=None)
                except (OverflowError, ValueError, OSError) as error:
                    raise UsageError(f"{name}: no local time is {moment}") from error
                object.__setattr__(self, name, local)

    def __bool__(self) -> bool:
        return not (self.under is None and self.after is None and self.before is None)


@dataclass(frozen=True)
class Query:
    """What is looked for.

    Raises:
        UsageError: no terms, or a field that has none of its values.
    """

    terms: tuple[Term, ...]
    to: str = "image"
    """What to find: "image", "caption", or another modality that the index's encoder embeds."""
    k: int = 10
    filter: Filter = field(default_factory=Filter)
    min_score: float | None = None
    """Only hits with at least this cosine; it goes with the fusions that rank by a cosine."""
    fusion: Fusion = "auto"
    compose: Compose = "auto"
    """How terms make one vector. "sum" adds them up by their weights; "early" is a network that
    was trained on "this picture, but ...", for one picture and one text; "auto" is "early" for
    those, of weight 1, where photos have shown that it finds no less, and else "sum"."""
    rerank: int = 0
    """How many of the first images are re-ranked, for queries by text: see
    `mmsearch.search.rerank`. 0 is none."""
    exact: bool = False
    """Compare with every vector, also where an index is so large that it is searched through
    inverted lists (`mmsearch.store.ivf_index`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", _terms_of(self.terms))
        if not isinstance(self.to, str) or not _MODALITY.fullmatch(self.to):
            raise UsageError(f"to is 'image', 'caption' or another modality, not {self.to!r}")
        for name, choices in (("fusion", FUSIONS), ("compose", COMPOSES)):
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"{name} is one of {', '.join(choices)}, not '{getattr(self, name)}'"
                )
        for name, least in (("k", 1), ("rerank", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise UsageError(f"{name} is a whole number, not {value!r}")
            if not least <= value <= MOST:
                raise UsageError(f"{name} is a whole number from {least} to {MOST}, not {value}")
        if not isinstance(self.filter, Filter) or not isinstance(self.exact, bool):
            raise UsageError("filter is a `Filter`, and exact is True or False")
        if self.min_score is not None and not _is_number(self.min_score):
            raise UsageError(f"min_score is a number, not {self.min_score!r}")


def _terms_of(terms: Any) -> tuple[Term, ...]:
    found = (terms,) if isinstance(terms, Term) else tuple(several(terms))
    if not found:
        raise UsageError("nothing to search for: give a text or an image")
    if not all(isinstance(term, Term) for term in found):
        raise UsageError("the terms of a query are `Term`s")
    return found


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path, its `~` for the user's home.

    Raises:
        UsageError: it is no path.
    """
    try:
        return Path(os.path.expanduser(os.fspath(path)))
    except (TypeError, ValueError) as error:
        raise UsageError(f"a path is a text or a Path, not {path!r}") from error


def several(values: str | os.PathLike[str] | Iterable[Any]) -> list[Any]:
    """One value, or any number of them: a text is one, not its letters.

    Raises:
        UsageError: neither.
    """
    if isinstance(values, str | bytes | os.PathLike):
        return [values]
    try:
        return list(values)
    except TypeError as error:
        raise UsageError(f"neither one value nor several: {values!r}") from error


@dataclass(frozen=True)
class Hit:
    """One answer; `rank` counts from 1.

    `score` is higher the better: a cosine similarity, or what the fusion made of `scores`.
    """

    rank: int
    score: float
    path: Path
    modality: str
    """What was found: "image", "caption", or another modality."""
    caption: str | None
    """The caption that was found; None where the hit is an image."""
    media_id: int
    scores: Mapping[str, float] = field(default_factory=dict)
    """What was fused: the cosines of "image" and of the best "caption", BM25 of "words"; "rerank"
    is the score after re-ranking."""
    start_ms: int | None = None
    """Where in the file it was found, from here to `end_ms`; None for all of it."""
    end_ms: int | None = None


@dataclass(frozen=True)
class Progress:
    """Where a long job stands."""

    stage: str
    done: int
    total: int | None


def no_progress(_progress: Progress) -> None:
    """For who need not be told."""


@dataclass(frozen=True)
class IngestReport:
    """What one index run did. Counts are files, but for `captions`: captions added."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    moved: int = 0
    removed: int = 0
    failed: int = 0
    """Files that could not be used in this run; `mmsearch errors` lists them."""
    known_bad: int = 0
    """Files that failed in an earlier run and have not changed: not tried again."""
    captions: int = 0
    captions_removed: int = 0
    """Captions that their file or sidecar no longer has; not those of images that were removed."""
    patches: int = 0
    """Images whose patches were computed and kept (`patches`)."""
    embedded_again: int = 0
    """Images that were in the index and got a vector of another model."""
    missing: int = 0
    """Images that have none of it, for which the index keeps its model: their files are missing,
    damaged, or changed in folders that this run did not look at."""
    replaced: str = ""
    """The model that the index had before this run, where that changed it."""
    seconds: float = 0.0
    images_per_second: float = 0.0
    """Images embedded over the seconds from the first file opened to the last commit."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds in scan, decode (summed over threads), encode, write, load, again and patches."""
    model: str = ""
    precision: str = ""
    dry_run: bool = False
    kept_roots: tuple[Path, ...] = ()
    """Folders found missing or empty, from which nothing was removed."""
    unmatched_captions: tuple[str, ...] = ()
    """File names in the captions file that no indexed image answers to."""
    unread_sidecars: tuple[str, ...] = ()
    """Files `name.txt` that are no text in UTF-8, so that they gave no captions."""
    captions_remarks: tuple[str, ...] = ()
    """What of the captions file could not be used, a line each."""


@dataclass(frozen=True)
class Failure:
    """A failed file: one that is not in the index, and why."""

    path: Path
    reason: str
    failed_at: str


DamageKind = Literal["catalog", "vector", "snapshot", "ivf", "words", "missing", "item"]


@dataclass(frozen=True)
class Damage:
    """Something in an index that is not as it was written."""

    kind: DamageKind
    what: str
    """One line for a person."""


@dataclass(frozen=True)
class Verified:
    """What a look at a whole index found."""

    images: int
    captions: int
    deep: bool
    damages: tuple[Damage, ...]
    """Empty where the index is sound."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Repaired:
    """What a repair did."""

    found: tuple[Damage, ...] = ()
    """What was damaged."""
    lost: tuple[str, ...] = ()
    """What could not be had again: files that an `index` takes in again where they are there, and
    captions that only a captions file can bring back."""
    embedded: int = 0
    """Images and captions that got a new vector."""
    kept: Path | None = None
    """Where the damaged catalog lies now, if a new one took its place."""


@dataclass(frozen=True)
class Status:
    """What an index holds."""

    path: Path
    model: str
    space: str
    dim: int
    images: int
    captions: int
    failures: int
    roots: tuple[Path, ...]
    exclude: Mapping[Path, tuple[str, ...]]
    """The globs that each root leaves out, where it has any."""
    bytes: int
    format_version: int
    patches: int = 0
    """Images of which patch embeddings are kept for re-ranking (`mmsearch index --patches`)."""
    pending: str = ""
    """The model that is being embedded beside the index's own, to take its place."""
    missing: int = 0
    """Files that have no vector of that model yet."""

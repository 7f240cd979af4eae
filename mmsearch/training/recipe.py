"""The recipe of `mmsearch train clip`: a TOML file, checked before anything is done."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mmsearch.errors import UsageError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=100)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
LossKind = Literal["clip", "siglip"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class _Table:
    """A table of the file: a field it does not know is an error."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class ModelTable(_Table):
    """Where the network comes from."""

    config: str | None = None
    """An open_clip architecture, or a folder beside the recipe with an `open_clip_config.json`."""
    weights: str | None = None
    """A model to start from, instead of `config`: a name as `--model` takes it. Paths in it are
    relative to the data."""
    parts: dict[str, str] = field(default_factory=dict)
    """Files of weights (a state dict) for modules of the network, by the module's name."""
    half: bool = False
    """Whether the weights are kept in fp16."""
    int8: tuple[str, ...] = ()
    """Modules whose matrices are kept in int8, a scale for each row."""


@dataclass(frozen=True)
class DataTable(_Table):
    """A labelled set to learn from."""

    labels: str
    images: str | None = None
    """The folder of its images, where it is not beside the labels."""
    splits: tuple[str, ...] = ()
    """None is every picture that is not in a split called val, dev, validation or test."""
    weight: Positive = 1.0
    flip: bool = True
    """Whether mirror images are shown too: not where captions tell left from right."""
    augment: dict[str, Any] | None = None
    """Instead of the recipe's."""
    name: str = ""
    views: Count | None = None
    """How many views of a picture are cached, where that is not as the stage says."""


@dataclass(frozen=True)
class HeldOutTable(_Table):
    """A split that is measured on."""

    labels: str
    split: str
    images: str | None = None


@dataclass(frozen=True)
class TeacherTable(_Table):
    """A model whose similarities are followed, beside the labels."""

    model: str
    weight: Positive = 1.0
    scale: Positive = 100.0
    """1/T of the softmax over the teacher's cosines."""


@dataclass(frozen=True)
class CardTable(_Table):
    """What the model card says besides what was measured."""

    licence: str | None = None
    """None names the base's terms, where there is one, and the data's."""
    notes: str = ""


@dataclass(frozen=True)
class Schedule(_Table):
    """How one stage learns. Names of modules stand for everything below them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "train"
    epochs: Positive = 10
    """Passes over the first set."""
    batch: Annotated[int, Field(ge=2)] = 256
    """Pairs in a batch, over all processes."""
    chunk: Count | None = None
    """Pairs that go through the network at once: fewer than the batch is gradient caching."""
    rate: Rate = 1e-3
    rates: dict[str, Rate] = field(default_factory=dict)
    """Learning rates of some modules; the longest name counts."""
    freeze: tuple[str, ...] = ()
    """Modules that do not learn."""
    keep_eval: tuple[str, ...] = ()
    """Modules that learn in eval mode: batch norms keep their statistics, nothing drops out."""
    input_dropout: dict[str, Share] = field(default_factory=dict)
    """The share of a module's inputs that is dropped."""
    warmup: Annotated[int, Field(ge=0)] = 100
    """Steps until the rate is reached, a tenth of all at most; it then falls as a cosine."""
    decay: NotNegative = 0.1
    betas: tuple[Share, Share] = (0.9, 0.98)
    clip_norm: Positive = 1.0
    validate_every: Positive = 1.0
    """In epochs."""


@dataclass(frozen=True)
class Stage(Schedule):
    """A stage of `train clip`: what is computed ahead for it."""

    cache: tuple[str, ...] = ()
    """The first modules of the image tower, in order: computed once for some views of every
    picture, and left as they are."""
    views: Count = 4
    cache_precision: Precision = "fp32"
    """What they are computed in, on a CPU."""


@dataclass(frozen=True)
class Recipe(_Table):
    """All that decides the weights, but for the data itself."""

    model: ModelTable
    data: tuple[DataTable, ...]
    validation: HeldOutTable
    stage: tuple[Stage, ...]
    test: HeldOutTable | None = None
    """Measured once, at the end, for the model card."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Precision = "fp32"
    text_precision: Precision | None = None
    """That of the text tower, where it is another: on a CPU with bf16, transformers learn twice as
    fast in it, and convolutions no faster."""
    loss: LossKind = "clip"
    ema: Share | None = None
    word_drop: Share = 0.0
    train_size: Count | None = None
    """Pixels a side while learning, where they are not those of the model, for towers that take any
    size. Things look larger in crops than in whole pictures: in whole pictures of a larger size
    they look as they did (Touvron et al. 2019, "Fixing the train-test resolution discrepancy")."""
    augment: dict[str, Any] = field(default_factory=dict)
    """Fields of open_clip's `AugmentationCfg`."""
    teacher: TeacherTable | None = None
    card: CardTable = field(default_factory=CardTable)

    def __post_init__(self) -> None:
        if not self.data or not self.stage:
            raise ValueError("needs at least one [[data]] and one [[stage]]")
        if len({stage.name for stage in self.stage}) < len(self.stage):
            raise ValueError("every [[stage]] needs a name of its own")
        if (self.model.config is None) == (self.model.weights is None):
            raise ValueError("[model] needs one of config and weights")
        if self.teacher and self.loss != "clip":
            raise ValueError("a teacher goes with the loss 'clip'")

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        found: dict[str, Any] = TypeAdapter(Recipe).dump_python(self, mode="json")
        return found


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file.

    Raises:
        UsageError: it cannot be read, or says something that there is not.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not TOML: {error}") from error
    try:
        found = TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the recipe"
        raise UsageError(f"{path}: {where}: {first['msg']}") from error
    config = found.model.config
    if config is not None and (path.parent / config).is_dir():
        model = replace(found.model, config=str((path.parent / config).resolve()))
        return replace(found, model=model)
    return found

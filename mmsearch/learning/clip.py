"""Full contrastive training of an open_clip model by a recipe, stage by stage."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.distributed as dist
from torch import nn

from mmsearch.datasets.formats import find_images, read_labelled
from mmsearch.datasets.labelled import LabelledImage
from mmsearch.encoders.base import Encoder
from mmsearch.encoders.open_clip import load_model, model_config, quiet_open_clip
from mmsearch.encoders.registry import (
    ModelSource,
    cached_files,
    full_name,
    name_of,
    parse_model,
    tower_source,
)
from mmsearch.errors import LabelsError, UsageError
from mmsearch.learning.batches import ImageInputs, Plan, Source, Taught
from mmsearch.learning.card import Card, write_card
from mmsearch.learning.checkpoint import State, load_weights, save_weights, weights_remarks
from mmsearch.learning.embedding import embed_pictures, embed_texts, unusable
from mmsearch.learning.losses import (
    SIGLIP_BIAS,
    SIGLIP_SCALE,
    ContrastiveLoss,
    Teacher,
)
from mmsearch.learning.recipe import DataTable, HeldOutTable, ModelTable, Recipe, Stage
from mmsearch.learning.runs import check_room, run_folder
from mmsearch.learning.trainer import Outcome, Setting, Trainer, check_schedule
from mmsearch.learning.validation import Validation, recall_line, validate
from mmsearch.learning.views import (
    Pictures,
    Prefix,
    Transform,
    compute_views,
    plain_transform,
    preprocess_of,
    split_network,
    training_transform,
)
from mmsearch.learning.words import carry_meanings, give_meanings
from mmsearch.store.files import write_durably
from mmsearch.types import Progress

log = logging.getLogger(__name__)

_LEAST = 10  # validation pictures: the recalls of fewer are all alike
_NOT_LEARNED = ("val", "dev", "valid", "validation", "test")

OnProgress = Callable[[Progress], None]
Tokenize = Callable[[Sequence[str]], torch.Tensor]
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where a run reads and writes, and on what it computes. None of it decides the weights."""

    data: Path
    """What the recipe's paths are relative to."""
    folder: Path
    """The model's folder; the run keeps its state in `training` below it."""
    cache: Path
    """Where computed views are kept."""
    home: Path
    """Where the models lie that were trained here and go by a name."""
    device: str = "cpu"
    workers: int = 0
    rank: int = 0
    world: int = 1

    @property
    def run(self) -> Path:
        return self.folder / "training"

    def model(self, name: str) -> ModelSource:
        """A model that a recipe names; a path starts at the data, as all of a recipe's do."""
        kind, colon, path = name.partition(":")
        if colon and kind != "hf-hub":
            return parse_model(f"{kind}:{self.data / Path(path).expanduser()}")
        return parse_model(full_name(name, self.home))


@dataclass(frozen=True)
class ClipReport:
    """What came of a run: where the model is, and its recalls in percent."""

    folder: Path
    validation: dict[str, float]
    test: dict[str, float] | None


@dataclass(frozen=True)
class _Set:
    """A labelled set whose files were found."""

    name: str
    table: DataTable | HeldOutTable
    files: list[Path]
    images: list[LabelledImage]
    tokens: list[torch.Tensor]


def train_clip(
    recipe: Recipe,
    place: Place,
    *,
    open_model: Callable[[str], Encoder],
    restart: bool = False,
    on_progress: OnProgress = lambda progress: None,
    notify: Notify = log.info,
) -> ClipReport:
    """Trains a model by a recipe into `place.folder`; a stopped run goes on where it was.

    Args:
        open_model: gives the teacher, by its name.
        restart: forget what an earlier run left in the folder.

    Raises:
        UsageError: a recipe that does not fit the model or the data, or a folder that holds
            something else.
        TrainingError: a run that diverged, or another run's state in the folder.
        Interrupted: by Ctrl-C.
    """
    uses = _starts_from(recipe, place)
    if not place.rank:
        check_room(place.folder, restart=restart, uses=uses)
    torch.manual_seed(recipe.seed)  # what is not loaded starts at random
    network = start_network(recipe.model, recipe.loss, place)
    tokenize = _tokenizer(recipe, place, network)
    sets = [_read_set(table, tokenize, place, on_progress, notify) for table in recipe.data]
    held_out = _read_set(recipe.validation, tokenize, place, on_progress, notify)
    test_set = None
    if recipe.test:
        test_set = _read_set(recipe.test, tokenize, place, on_progress, notify)
    _keep_apart([*sets, held_out], test_set)
    _keep_apart(sets, held_out)
    if len(held_out.files) < _LEAST:
        raise UsageError(
            f"validation: {len(held_out.files)} pictures cannot choose between weights; at least "
            f"{_LEAST} are needed"
        )
    _check_stages(recipe, network, sets, place)
    teacher = open_model(place.model(recipe.teacher.model).name) if recipe.teacher else None
    run = _run_id(recipe, network, sets, held_out, teacher, place.world)
    with nullcontext() if place.rank else run_folder(place.folder, restart=restart, uses=uses):
        if place.world > 1:
            dist.barrier()  # until the folder is the run's
        taught = _teach(sets, teacher, place.cache, on_progress)
        return _train(
            recipe, network, sets, held_out, test_set, taught, place, run, on_progress, notify
        )


def _starts_from(recipe: Recipe, place: Place) -> list[Path]:
    """The files of all models that a recipe names."""
    named = [recipe.model.weights, recipe.teacher.model if recipe.teacher else None]
    found = [place.data / file for file in recipe.model.parts.values()]
    for name in named:
        if name is not None and name != "auto":
            found += cached_files(place.model(name)) or []
    return found


def _check_stages(recipe: Recipe, network: nn.Module, sets: Sequence[_Set], place: Place) -> None:
    """Finds in all stages what would fail once earlier work was removed, or done in vain."""
    plain = plain_transform(preprocess_of(network))
    for one in sets:
        _augmentation(recipe, one, network)
    sources = [
        Source(one.name, Pictures(one.files, plain, 1), one.tokens, one.table.weight)
        for one in sets if isinstance(one.table, DataTable)
    ]  # fmt: skip
    for stage in recipe.stage:
        learner = split_network(network, stage.cache)[1] if stage.cache else network
        check_schedule(learner, stage, place.world)
        Plan(sources, stage.batch, recipe.seed)


def _augmentation(recipe: Recipe, one: _Set, network: nn.Module) -> Transform:
    assert isinstance(one.table, DataTable)
    augment = recipe.augment if one.table.augment is None else one.table.augment
    return training_transform(preprocess_of(network), augment, flip=one.table.flip)


def _train(
    recipe: Recipe,
    network: nn.Module,
    sets: Sequence[_Set],
    held_out: _Set,
    test_set: _Set | None,
    taught: Sequence[Taught | None],
    place: Place,
    run: str,
    on_progress: OnProgress,
    notify: Notify,
) -> ClipReport:
    """All stages, and what comes of them."""
    for stage in recipe.stage:
        trained = place.run / f"stage-{stage.name}.safetensors"
        outcome, network = _earlier(trained, run, network) or _learn(
            recipe, stage, network, sets, held_out, taught, place, run, on_progress, notify
        )
        merge_state(network, outcome.state)
        if place.rank == 0:
            save_weights(trained, network.state_dict(), _remarks(run, outcome))
        notify(f"stage {stage.name} is done: validation {recall_line(outcome.recall)}")
    if recipe.model.words:
        seen = torch.cat([text.flatten() for one in sets for text in one.tokens])
        carry_meanings(network, place.data / recipe.model.words, seen)
    if recipe.model.half:
        network.half().float()  # what is measured is what is kept
    test = _measure(test_set, network, place) if test_set else None
    report = ClipReport(place.folder, _measure(held_out, network, place), test)
    if place.rank == 0:
        write_card(
            place.folder, _card(recipe, report, sets, held_out, name_of(place.folder, place.home))
        )
        save_model(network, recipe.model, place)  # last: by it the folder is a model
    return report


def _remarks(run: str, outcome: Outcome) -> dict[str, str]:
    return {"run": run, "step": str(outcome.step), "score": str(outcome.score),
            "recall": json.dumps(outcome.recall)}  # fmt: skip


def _earlier(path: Path, run: str, network: nn.Module) -> tuple[Outcome, nn.Module] | None:
    """What a stage came to before the run was stopped."""
    remarks = weights_remarks(path)
    if remarks is None or remarks["run"] != run:
        return None
    found = Outcome(
        int(remarks["step"]), load_weights(path), float(remarks["score"]),
        json.loads(remarks["recall"]),
    )  # fmt: skip
    return found, network


# -- the network -----------------------------------------------------------------------------


def start_network(table: ModelTable, loss: str, place: Place) -> nn.Module:
    """The network as it is before the first step.

    Raises:
        UsageError: no such architecture, or weights that do not fit.
        ModelNotFound: the model to start from is not at hand.
    """
    bias = {"init_logit_scale": _log(SIGLIP_SCALE), "init_logit_bias": SIGLIP_BIAS}
    if table.weights is not None:
        source = place.model(table.weights)
        if tower_source(source) != source:
            raise UsageError(
                f"model.weights: '{table.weights}' is heads on a frozen model; start from that one"
            )
        network = load_model(source).network
        if loss == "siglip" and getattr(network, "logit_bias", None) is None:
            raise UsageError("model.weights: the loss 'siglip' needs a model with a logit bias")
    else:
        assert table.config is not None
        try:
            with quiet_open_clip():  # it warns of the weights that are not asked for
                network = open_clip.create_model(
                    _config_name(table.config),
                    load_weights=False,
                    precision="fp32",
                    **(bias if loss == "siglip" else {}),
                )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"model.config: '{table.config}' cannot be made: {reason}") from error
    for name, file in table.parts.items():
        _load_part(network, name, place.data / file)
    if table.words is not None:
        give_meanings(network, place.data / table.words)
    return network


def _log(value: float) -> float:
    return float(torch.tensor(value).log())


def _config_name(name: str) -> str:
    return f"local-dir:{name}" if Path(name).is_dir() else name


def _load_part(network: nn.Module, name: str, file: Path) -> None:
    try:
        part = network.get_submodule(name)
    except AttributeError as error:
        raise UsageError(f"model.parts: the model has no module '{name}'") from error
    try:
        if file.suffix == ".safetensors":
            state = load_weights(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        missing, unexpected = part.load_state_dict(state, strict=False)
    except Exception as error:
        raise UsageError(f"{file}: weights that do not fit '{name}': {error}") from error
    # Folded batch norms lack the counter that only training would use.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        odd = ", ".join([*missing, *unexpected][:5])
        raise UsageError(f"{file}: weights that do not fit '{name}': {odd}")


def merge_state(network: nn.Module, state: State) -> None:
    """Puts what a stage learned into the whole network; what it did not hold stays."""
    network.load_state_dict({**network.state_dict(), **state})


# -- the data --------------------------------------------------------------------------------


def _tokenizer(recipe: Recipe, place: Place, network: nn.Module) -> Tokenize:
    """The model's own tokenizer, as open_clip picks it."""
    table = recipe.model
    if table.weights is not None:
        name = place.model(table.weights).open_clip_name
    else:
        assert table.config is not None
        name = _config_name(table.config)
    try:
        tokenizer: Any = open_clip.get_tokenizer(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the tokenizer of '{Path(name).name}' cannot be loaded: {reason}; models with one of "
            "their own need the hf extra: pip install 'mmsearch[hf]'"
        ) from error
    if recipe.word_drop and not isinstance(tokenizer, open_clip.SimpleTokenizer):
        raise UsageError("word_drop: only for models with CLIP's byte-pair tokenizer")
    length = int(getattr(network, "context_length", 77))
    return lambda texts: tokenizer(list(texts), context_length=length)


def _read_set(
    table: DataTable | HeldOutTable,
    tokenize: Tokenize,
    place: Place,
    on_progress: OnProgress,
    notify: Notify,
) -> _Set:
    labels = place.data / table.labels
    labelled = read_labelled(labels)
    if isinstance(table, HeldOutTable):
        chosen = list(labelled.of_split(table.split))
        wanted = table.split
    else:
        wanted = ", ".join(table.splits)
        chosen = [
            image for image in labelled.images
            if (image.split in table.splits) or not (
                table.splits or image.split.lower() in _NOT_LEARNED
            )
        ]  # fmt: skip
    chosen = [image for image in chosen if image.captions]
    if not chosen:
        raise UsageError(f"{labels}: no captioned picture in the split '{wanted}'")
    images = place.data / table.images if table.images else find_images(labels, chosen)
    files = [images / image.file for image in chosen]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise LabelsError(f"{missing}: named in {labels}, but not there")
    name = (table.name if isinstance(table, DataTable) else "") or labelled.name
    bad = unusable(files, place.cache, f"looking through {name}", on_progress)
    if len(bad) == len(files):
        raise LabelsError(f"{images}: none of the {len(files)} pictures of {labels} is usable")
    if bad:
        first = ", ".join(chosen[row].file for row in sorted(bad)[:5])
        notify(f"{name}: {len(bad)} pictures are damaged and left out: {first}")
    good = [row for row in range(len(files)) if row not in bad]
    chosen = [chosen[row] for row in good]
    tokens = [tokenize(image.captions) for image in chosen]
    return _Set(name, table, [files[row] for row in good], chosen, tokens)


def _keep_apart(sets: Sequence[_Set], held_out: _Set | None) -> None:
    """Stops a recipe that learns from what it is measured on."""
    if held_out is None:
        return
    measured = {file.resolve() for file in held_out.files}
    for one in sets:
        both = sum(file.resolve() in measured for file in one.files)
        if both:
            raise UsageError(
                f"{one.name}: {both} of its pictures are in a split that is measured on; name "
                "other splits"
            )


def _run_id(
    recipe: Recipe,
    network: nn.Module,
    sets: Sequence[_Set],
    held_out: _Set,
    teacher: Encoder | None,
    world: int,
) -> str:
    """A name for all that the weights depend on."""
    taught_by = teacher.spec.space if teacher is not None else None
    found = hashlib.sha256(
        json.dumps([recipe.to_json(), world, taught_by], sort_keys=True).encode()
    )
    for value in network.state_dict().values():
        found.update(value.contiguous().numpy().tobytes())
    for one in (*sets, held_out):
        found.update(json.dumps([one.name, len(one.files)]).encode())
        for file, image in zip(one.files, one.images, strict=True):
            stat = file.stat()
            about = [image.file, stat.st_size, stat.st_mtime_ns, image.captions]
            found.update(json.dumps(about).encode())
    return found.hexdigest()[:16]


def _sources(
    recipe: Recipe,
    stage: Stage,
    prefix: Prefix | None,
    network: nn.Module,
    sets: Sequence[_Set],
    taught: Sequence[Taught | None],
    place: Place,
    on_progress: OnProgress,
) -> list[Source]:
    found = []
    for one, teacher in zip(sets, taught, strict=True):
        assert isinstance(one.table, DataTable)
        images = _inputs(
            one, _augmentation(recipe, one, network), prefix, one.table.views or stage.views,
            network, recipe, place, on_progress,
        )  # fmt: skip
        found.append(Source(one.name, images, one.tokens, one.table.weight, teacher))
    return found


def _inputs(
    one: _Set,
    transform: Transform,
    prefix: Prefix | None,
    views: int,
    network: nn.Module,
    recipe: Recipe,
    place: Place,
    on_progress: OnProgress,
) -> ImageInputs:
    size = preprocess_of(network).size
    pictures = Pictures(one.files, transform, size if isinstance(size, int) else max(size))
    if prefix is None:
        return pictures
    if place.world > 1 and place.rank:
        dist.barrier()  # the first process computes the views
    found = compute_views(prefix, pictures, views, recipe.seed, place.cache, one.name, on_progress)
    if place.world > 1 and not place.rank:
        dist.barrier()
    return found


def _teach(
    sets: Sequence[_Set], encoder: Encoder | None, cache: Path, on_progress: OnProgress
) -> list[Taught | None]:
    """What the teacher makes of every picture, as it is, and of every caption."""
    if encoder is None:
        return [None] * len(sets)
    found: list[Taught | None] = []
    for one in sets:
        job = f"teacher on {one.name}"
        vectors, good = embed_pictures(encoder, one.files, cache, job, on_progress)
        if not good.all():
            file = one.files[int(np.argmin(good))]
            raise LabelsError(f"{file}: cannot be learned from: it is damaged")
        captions = [text for image in one.images for text in image.captions]
        texts = torch.from_numpy(embed_texts(encoder, captions, cache, job, on_progress))
        by_image = texts.split([len(image.captions) for image in one.images])
        found.append(Taught(torch.from_numpy(vectors), list(by_image)))
    return found


# -- the stages ------------------------------------------------------------------------------


def _learn(
    recipe: Recipe,
    stage: Stage,
    network: nn.Module,
    sets: Sequence[_Set],
    held_out: _Set,
    taught: Sequence[Taught | None],
    place: Place,
    run: str,
    on_progress: OnProgress,
    notify: Notify,
) -> tuple[Outcome, nn.Module]:
    prefix, learner = (
        split_network(network, stage.cache) if stage.cache else (None, copy.deepcopy(network))
    )
    plain = plain_transform(preprocess_of(network))
    validation = Validation(
        _inputs(held_out, plain, prefix, 1, network, recipe, place, on_progress), held_out.tokens
    )
    taught_by = recipe.teacher
    trainer = Trainer(
        learner,
        _sources(recipe, stage, prefix, network, sets, taught, place, on_progress),
        validation,
        stage,
        Setting(
            seed=recipe.seed, device=place.device, precision=recipe.precision, ema=recipe.ema,
            word_drop=recipe.word_drop, workers=0 if stage.cache else place.workers,
            rank=place.rank, world=place.world,
        ),
        ContrastiveLoss(
            recipe.loss,
            Teacher(taught_by.weight, taught_by.scale) if taught_by else None,
            place.rank,
            place.world,
        ),
        place.run,
        run=run,
        on_progress=on_progress,
        notify=notify,
    )  # fmt: skip
    return trainer.fit(), network


def _measure(one: _Set, network: nn.Module, place: Place) -> dict[str, float]:
    how = preprocess_of(network)
    side = how.size if isinstance(how.size, int) else max(how.size)
    pictures = Pictures(one.files, plain_transform(how), side)
    device = torch.device(place.device)
    return validate(network.to(device), Validation(pictures, one.tokens), device)


# -- the result ------------------------------------------------------------------------------


def save_model(network: nn.Module, table: ModelTable, place: Place) -> None:
    """Writes an open_clip `local-dir:` folder; its config, without which it is none, last."""
    state = {
        name: value.half() if table.half and value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    save_weights(place.folder / "open_clip_model.safetensors", state)
    if table.weights is not None:
        config = model_config(place.model(table.weights))
    else:
        assert table.config is not None
        config = dict(open_clip.get_model_config(_config_name(table.config)))
    for part, key in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        if key in config[part]:  # or open_clip would fetch weights only to replace them
            config[part] = {**config[part], key: False}
    if getattr(network, "logit_bias", None) is not None:
        config["init_logit_bias"] = SIGLIP_BIAS
    document = {
        "model_cfg": config,
        "preprocess_cfg": dataclasses.asdict(preprocess_of(network)),
    }
    write_durably(
        place.folder / "open_clip_config.json", (json.dumps(document, indent=2) + "\n").encode()
    )


def _card(
    recipe: Recipe, report: ClipReport, sets: Sequence[_Set], held_out: _Set, name: str
) -> Card:
    start = (
        recipe.model.weights
        or f"the architecture {Path(recipe.model.config or '').name}, not trained"
    )
    parts = [f"{part} from {Path(file).name}" for part, file in recipe.model.parts.items()]
    if recipe.model.words:
        parts.append(f"token meanings from {Path(recipe.model.words).name}")
    chosen_by = f"{held_out.name}, validation ({len(held_out.files)} pictures), which chose them"
    figures = [(chosen_by, report.validation)]
    if report.test and recipe.test:
        figures.append((f"{recipe.test.labels}, {recipe.test.split}", report.test))
    return Card(
        name=report.folder.name,
        what="An open_clip model for mmsearch, trained by contrast of pictures and captions.",
        base="; ".join([start, *parts]),
        data=[
            f"{one.name}: {len(one.files)} pictures, "
            f"{sum(len(image.captions) for image in one.images)} captions"
            for one in sets
        ],
        figures=figures,
        licence=recipe.card.licence,
        made_by="`mmsearch train clip`; its log and plot are in `training`",
        use=f"mmsearch index FOLDER --model {name}",
        notes=[recipe.card.notes] if recipe.card.notes else [],
    )

"""Full contrastive training of an open_clip model by a recipe, stage by stage."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mmsearch.encoders.base import Encoder
from mmsearch.encoders.registry import (
    cached_files,
    name_of,
)
from mmsearch.errors import LabelsError, UsageError
from mmsearch.learning.batches import ImageInputs, Plan, Source, Taught
from mmsearch.learning.card import Card, write_card
from mmsearch.learning.checkpoint import load_weights, save_weights, weights_remarks
from mmsearch.learning.embedding import embed_pictures, embed_texts
from mmsearch.learning.losses import (
    ContrastiveLoss,
    Teacher,
)
from mmsearch.learning.network import merge_state, save_model, start_network, tokenizer_of
from mmsearch.learning.recipe import DataTable, HeldOutTable, Recipe, Stage
from mmsearch.learning.runs import Place, check_room, run_folder
from mmsearch.learning.schedule import check_schedule
from mmsearch.learning.sets import LabelledFiles, Notify, OnProgress, keep_apart, read_set
from mmsearch.learning.trainer import Outcome, Setting, Trainer
from mmsearch.learning.validation import LEAST, Validation, recall_line, validate
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
from mmsearch.learning.words import carry_meanings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipReport:
    """What came of a run: where the model is, and its recalls in percent."""

    folder: Path
    validation: dict[str, float]
    test: dict[str, float] | None


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
    tokenize = tokenizer_of(recipe, place, network)

    def read(table: DataTable | HeldOutTable) -> LabelledFiles:
        return read_set(table, tokenize, place.data, place.cache, on_progress, notify)

    sets = [read(table) for table in recipe.data]
    held_out = read(recipe.validation)
    test_set = read(recipe.test) if recipe.test else None
    keep_apart([*sets, held_out], test_set)
    keep_apart(sets, held_out)
    if len(held_out.files) < LEAST:
        raise UsageError(
            f"validation: {len(held_out.files)} pictures cannot choose between weights; at least "
            f"{LEAST} are needed"
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


def _check_stages(
    recipe: Recipe, network: nn.Module, sets: Sequence[LabelledFiles], place: Place
) -> None:
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


def _augmentation(recipe: Recipe, one: LabelledFiles, network: nn.Module) -> Transform:
    assert isinstance(one.table, DataTable)
    augment = recipe.augment if one.table.augment is None else one.table.augment
    return training_transform(preprocess_of(network), augment, flip=one.table.flip)


def _train(
    recipe: Recipe,
    network: nn.Module,
    sets: Sequence[LabelledFiles],
    held_out: LabelledFiles,
    test_set: LabelledFiles | None,
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


# -- the data --------------------------------------------------------------------------------


def _run_id(
    recipe: Recipe,
    network: nn.Module,
    sets: Sequence[LabelledFiles],
    held_out: LabelledFiles,
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
    sets: Sequence[LabelledFiles],
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
    one: LabelledFiles,
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
    sets: Sequence[LabelledFiles], encoder: Encoder | None, cache: Path, on_progress: OnProgress
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
    sets: Sequence[LabelledFiles],
    held_out: LabelledFiles,
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


def _measure(one: LabelledFiles, network: nn.Module, place: Place) -> dict[str, float]:
    how = preprocess_of(network)
    side = how.size if isinstance(how.size, int) else max(how.size)
    pictures = Pictures(one.files, plain_transform(how), side)
    device = torch.device(place.device)
    return validate(network.to(device), Validation(pictures, one.tokens), device)


# -- the result ------------------------------------------------------------------------------


def _card(
    recipe: Recipe,
    report: ClipReport,
    sets: Sequence[LabelledFiles],
    held_out: LabelledFiles,
    name: str,
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

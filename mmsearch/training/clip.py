"""Full contrastive training of an open_clip model by a recipe, stage by stage."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmsearch.encoders.base import Encoder
from mmsearch.encoders.registry import KNOWN, NOTHING_KNOWN, cached_files, name_of
from mmsearch.errors import LabelsError, UsageError
from mmsearch.evaluation.ranking import LEAST, recall_line
from mmsearch.search.known_words import write_words
from mmsearch.training.batches import ImageInputs, Plan, Source, Taught
from mmsearch.training.distributed import barrier, from_first, require_same
from mmsearch.training.losses import ContrastiveLoss
from mmsearch.training.network import (
    check_size,
    drop_folded_norms,
    round_to_kept,
    save_model,
    start_network,
    tokenizer_of,
)
from mmsearch.training.recipe import DataTable, HeldOutTable, Recipe, Stage
from mmsearch.training.runs import (
    Entry,
    Place,
    check_room,
    check_run,
    load_remarked,
    run_folder,
    save_weights,
    write_card,
)
from mmsearch.training.sets import LabelledFiles, embed_pictures, embed_texts, keep_apart, read_set
from mmsearch.training.trainer import Outcome, Setting, Trainer, check_schedule, validate
from mmsearch.training.views import (
    Pictures,
    Prefix,
    Transform,
    compute_views,
    plain_transform,
    preprocess_of,
    split_network,
    training_transform,
)
from mmsearch.types import Notify, OnProgress

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
    """Trains a model by a recipe into `place.folder`; a stopped run resumes.

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
    tokenizer = tokenizer_of(recipe, place, network)

    def read(table: DataTable | HeldOutTable) -> LabelledFiles:
        return read_set(table, tokenizer, place.data, place.cache, on_progress, notify)

    sets = [read(table) for table in recipe.data]
    held_out = read(recipe.validation)
    test = read(recipe.test) if recipe.test else None
    *sets, held_out = keep_apart([*sets, held_out], test, notify)
    sets = keep_apart(sets, held_out, notify)
    if len(held_out.files) < LEAST:
        raise UsageError(
            f"validation: {len(held_out.files)} pictures cannot choose between weights; at least "
            f"{LEAST} are needed"
        )
    run = _Run(recipe, place, network, sets, held_out, on_progress, notify)
    run.check_stages()
    teacher = open_model(place.model(recipe.teacher.model).name) if recipe.teacher else None
    names = run.names(teacher.spec.space if teacher is not None else None)
    require_same(names, "data or weights")
    if not restart:
        check_run(place.run, names)
    with nullcontext() if place.rank else run_folder(place.folder, restart=restart, uses=uses):
        barrier()  # until the folder is the run's
        has_improved = run.train(names, run.teach(teacher))
        report = None
        if place.rank == 0:
            report = ClipReport(
                place.folder, run.measure(held_out), run.measure(test) if test else None
            )
            _write_card(run, report, has_improved=has_improved)
            captions = (text for one in sets for image in one.images for text in image.captions)
            start = recipe.model.weights
            write_words(place.folder, captions, place.model(start) if start else None)
            save_model(network, recipe.model, tokenizer, place)  # last: by it the folder is a model
        found: ClipReport = from_first(report, place.device)
        return found


def _starts_from(recipe: Recipe, place: Place) -> list[Path]:
    """The files of all models that a recipe names."""
    named = [recipe.model.weights, recipe.teacher.model if recipe.teacher else None]
    found = [place.data / file for file in recipe.model.parts.values()]
    for name in named:
        if name is not None:
            found += cached_files(place.model(name)) or []
    if recipe.model.config:
        found += (place.data / recipe.model.config).glob("*")
    return found


@dataclass(frozen=True)
class _Run:
    """What all stages of a run share; `network` goes from one to the next."""

    recipe: Recipe
    place: Place
    network: nn.Module
    sets: Sequence[LabelledFiles]
    held_out: LabelledFiles
    on_progress: OnProgress
    notify: Notify

    def check_stages(self) -> None:
        """Finds in all stages what would fail once earlier work was removed, or done in vain."""
        if size := self.recipe.train_size:
            check_size(self.network, size)
        sources = self._sources(self.recipe.stage[0], None, [None] * len(self.sets))
        for stage in self.recipe.stage:
            _, learner = self._parts(stage)
            check_schedule(learner, stage, self.place.world)
            Plan(sources, stage.batch, self.recipe.seed)

    def names(self, taught_by: str | None) -> list[str]:
        """For each stage a name for all that its weights depend on, the stages before included."""
        shared = self.recipe.to_json()
        for field in ("card", "test", "stage"):  # the first two decide no weights
            del shared[field]
        found = hashlib.sha256(
            json.dumps([shared, self.place.world, taught_by], sort_keys=True).encode()
        )
        for value in self.network.state_dict().values():
            found.update(value.contiguous().numpy().tobytes())
        for one in (*self.sets, self.held_out):
            found.update(json.dumps([one.name, len(one.files)]).encode())
            for file, image in zip(one.files, one.images, strict=True):
                stat = file.stat()
                about = [image.file, stat.st_size, stat.st_mtime_ns, image.captions]
                found.update(json.dumps(about).encode())
        names = []
        for stage in self.recipe.to_json()["stage"]:
            found.update(json.dumps(stage, sort_keys=True).encode())
            names.append(found.hexdigest()[:16])
        return names

    def teach(self, encoder: Encoder | None) -> list[Taught | None]:
        """What the teacher makes of every picture, as it is, and of every caption."""
        if encoder is None:
            return [None] * len(self.sets)
        found: list[Taught | None] = []
        for one in self.sets:
            job = f"teacher on {one.name}"
            cache = self.place.cache
            vectors, good = embed_pictures(encoder, one.files, cache, job, self.on_progress)
            if not good.all():
                file = one.files[int(np.argmin(good))]
                raise LabelsError(f"{file}: cannot be trained on: it is damaged")
            captions = [text for image in one.images for text in image.captions]
            texts = torch.from_numpy(embed_texts(encoder, captions, cache, job, self.on_progress))
            by_image = texts.split([len(image.captions) for image in one.images])
            found.append(Taught(torch.from_numpy(vectors), list(by_image)))
        return found

    def train(self, names: Sequence[str], taught: Sequence[Taught | None]) -> bool:
        """All stages, but for those that an earlier run did; whether any came to something."""
        history: list[Entry] = []
        has_improved = False
        for number, stage in enumerate(self.recipe.stage):
            trained = self.place.run / f"stage-{stage.name}.safetensors"
            earlier = from_first(_earlier(trained, names[number]), self.place.device)
            outcome, history = earlier or self._learn(
                stage, names[number], names[:number], history, taught
            )
            has_improved = has_improved or outcome.step > 0
            # What the stage did not hold stays.
            self.network.load_state_dict({**self.network.state_dict(), **outcome.state})
            if self.place.rank == 0:
                save_weights(trained, self.network.state_dict(), {
                    "run": names[number], "step": str(outcome.step), "score": str(outcome.score),
                    "recall": json.dumps(outcome.recall), "history": json.dumps(history),
                })  # fmt: skip
            self.notify(f"stage {stage.name} is done: validation {recall_line(outcome.recall)}")
        round_to_kept(self.network, self.recipe.model)
        return has_improved

    def _learn(
        self,
        stage: Stage,
        name: str,
        before: Sequence[str],
        history: Sequence[Entry],
        taught: Sequence[Taught | None],
    ) -> tuple[Outcome, list[Entry]]:
        recipe, place = self.recipe, self.place
        prefix, learner = self._parts(stage)
        held_out = self.held_out
        trainer = Trainer(
            learner,
            self._sources(stage, prefix, taught),
            Source(held_out.name, self._inputs(held_out, prefix=prefix), held_out.tokens),
            stage,
            Setting(
                seed=recipe.seed, device=place.device, precision=recipe.precision,
                text_precision=recipe.text_precision, ema=recipe.ema,
                word_drop=recipe.word_drop, workers=0 if stage.cache else place.workers,
                rank=place.rank, world=place.world,
            ),
            ContrastiveLoss(recipe.loss, recipe.teacher, place.rank, place.world),
            place.run,
            run=name,
            before=before,
            history=history,
            on_progress=self.on_progress,
            notify=self.notify,
        )  # fmt: skip
        return trainer.fit(), trainer.history

    def _parts(self, stage: Stage) -> tuple[Prefix | None, nn.Module]:
        """What is computed ahead for a stage, and what learns in it."""
        if stage.cache:
            prefix, learner = split_network(self.network, stage.cache)
        else:
            prefix, learner = None, copy.deepcopy(self.network)
        drop_folded_norms(learner, stage.keep_eval)
        return prefix, learner

    def _sources(
        self, stage: Stage, prefix: Prefix | None, taught: Sequence[Taught | None]
    ) -> list[Source]:
        found = []
        how_it_searches = preprocess_of(self.network)
        size = self.recipe.train_size or how_it_searches.size
        how_it_learns = replace(how_it_searches, size=size)
        for table, one, teacher in zip(self.recipe.data, self.sets, taught, strict=True):
            augment = self.recipe.augment if table.augment is None else table.augment
            how = training_transform(how_it_learns, augment, flip=table.flip)
            views = table.views or stage.views
            images = self._inputs(one, how, prefix, views, stage.cache_precision)
            found.append(Source(one.name, images, one.tokens, table.weight, teacher))
        return found

    def _inputs(
        self,
        one: LabelledFiles,
        transform: Transform | None = None,
        prefix: Prefix | None = None,
        views: int = 1,
        precision: str = "fp32",
    ) -> ImageInputs:
        """A set's pictures for the towers, as a search prepares them where no transform is told."""
        how = preprocess_of(self.network)
        side = how.size if isinstance(how.size, int) else max(how.size)
        pictures = Pictures(one.files, transform or plain_transform(how), side)
        if prefix is None:
            return pictures
        place = self.place
        if place.rank:
            barrier()  # the first process computes the views
        found = compute_views(
            prefix, pictures, views, self.recipe.seed, place.cache, one.name, self.on_progress,
            precision=precision,
        )  # fmt: skip
        if not place.rank:
            barrier()
        return found

    def measure(self, one: LabelledFiles) -> dict[str, float]:
        """The six recalls of the network as it now is, on a held-out set."""
        device, pictures = self.place.device, self._inputs(one)
        network = self.network.to(device)
        return validate(network, Source(one.name, pictures, one.tokens), device, self.place.workers)


def _earlier(path: Path, name: str) -> tuple[Outcome, list[Entry]] | None:
    """What a stage came to before the run was stopped, and the log until then."""
    with suppress(FileNotFoundError):
        state, remarks = load_remarked(path)
        if remarks.get("run") == name:
            recall = json.loads(remarks["recall"])
            outcome = Outcome(int(remarks["step"]), state, float(remarks["score"]), recall)
            return outcome, json.loads(remarks["history"])
    return None


def _write_card(run: _Run, report: ClipReport, *, has_improved: bool) -> None:
    recipe, held_out = run.recipe, run.held_out
    notes = [recipe.card.notes] if recipe.card.notes else []
    if not has_improved:
        notes.insert(0, "Nothing that was trained did better on the validation pictures than the "
                        "start, so these are the weights that it started from.")  # fmt: skip
    start = recipe.model.weights
    if start is not None:
        own = KNOWN.get(start, NOTHING_KNOWN).licence or "see its card"
        terms = f"those of the base ({own}), and of the data"
    else:
        start = f"the architecture {Path(recipe.model.config or '').name}, not trained"
        terms = "those of the data, and of the parts"
    parts = [f"{part} from {Path(file).name}" for part, file in recipe.model.parts.items()]
    chosen_by = f"{held_out.name}, validation ({len(held_out.files)} pictures), which chose them"
    figures = [(chosen_by, report.validation)]
    if report.test and recipe.test:
        figures.append((f"{recipe.test.labels}, {recipe.test.split}", report.test))
    write_card(
        report.folder,
        "An open_clip model for mmsearch, trained by contrast of pictures and captions.",
        base="; ".join([start, *parts]),
        data=[
            f"{one.name}: {len(one.files)} pictures, "
            f"{sum(len(image.captions) for image in one.images)} captions"
            for one in run.sets
        ],
        figures=figures,
        licence=terms if recipe.card.licence is None else recipe.card.licence,
        made_by="mmsearch train clip",
        use=f"mmsearch index FOLDER --model {name_of(report.folder, run.place.home)}",
        notes=notes,
    )

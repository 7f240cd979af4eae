"""The one training loop: whole models and projection heads go through it alike."""

from __future__ import annotations

import ctypes
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmsearch.errors import Interrupted, TrainingError, UsageError
from mmsearch.evaluation.ranking import both_ranks, both_recalls, recall_line
from mmsearch.training.batches import (
    Example,
    Examples,
    Plan,
    Source,
    load_batches,
    load_images,
    seed_of,
)
from mmsearch.training.distributed import barrier, from_first
from mmsearch.training.losses import (
    ContrastiveLoss,
    Embeddings,
    cached_backward,
    clamp_scale,
)
from mmsearch.training.network import encode_texts, is_below
from mmsearch.training.recipe import Schedule
from mmsearch.training.runs import (
    CHECKPOINT,
    Entry,
    State,
    check_run,
    load_checkpoint,
    replaced,
    save_weights,
    write_log,
)
from mmsearch.types import OnProgress, Progress, no_progress

log = logging.getLogger(__name__)

_DIVERGED = 1.0  # nats above what the beginning and what guessing cost
_RISING = 0.5  # nats above its lowest: such weights do not replace the last good ones
_COLLAPSED = 2.0  # nats above its lowest: what was learned before is gone
_FORGET = 0.002  # nats a step by which the lowest is forgotten: a loss may settle a little higher
_SMOOTH = 0.95
_DRAW_SECONDS = 20.0  # drawing takes as long as many steps of a small model
_SAVE_SHARE = 0.05  # of the time, at most, for checkpoints between validations


@dataclass(frozen=True)
class Setting:
    """What all stages of a run share."""

    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    text_precision: str | None = None
    ema: float | None = None
    """The decay of the average of the weights; the average is what is validated and kept."""
    word_drop: float = 0.0
    workers: int = 0
    checkpoint_seconds: float = 60.0
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Outcome:
    """The weights that did best on the validation pairs, and how they did."""

    step: int
    state: State
    score: float
    """The mean of the six recalls, in percent."""
    recall: dict[str, float]


class Trainer:
    """One stage of a run. The checkpoint in `folder` is taken up where there is one."""

    def __init__(
        self,
        network: nn.Module,
        sources: Sequence[Source],
        validation: Source,
        schedule: Schedule,
        setting: Setting,
        loss: ContrastiveLoss,
        folder: Path,
        *,
        run: str = "",
        before: Collection[str] = (),
        history: Sequence[Entry] = (),
        on_progress: OnProgress = no_progress,
        notify: Callable[[str], None] = log.info,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes the network as it is to start.

        Args:
            folder: where checkpoint, log and plot are kept.
            run: a name for everything that the weights depend on; a checkpoint of another run
                is refused,
            before: but for those of the stages that led here.
            history: what those measured, for the log.
            clock: tells the seconds by which checkpoints and plots are due, from any beginning.

        Raises:
            UsageError: a batch that processes cannot share, or a module that there is not.
            TrainingError: nothing is left to learn.
        """
        self.schedule, self.setting, self._loss = schedule, setting, loss
        self._folder, self._run, self._before = folder, run, before
        self._progress, self._notify, self._clock = on_progress, notify, clock
        self._device = torch.device(setting.device)
        # As the pixels lie: a CPU trains convolutional towers half as fast again.
        self.network: Any = network.to(self._device).to(memory_format=torch.channels_last)
        check_schedule(self.network, schedule, setting.world)
        self._validation = validation
        self._examples = Examples(sources, setting.word_drop)
        self._plan = Plan(sources, schedule.batch, setting.seed)
        self.total = max(1, round(schedule.epochs * self._plan.steps_per_epoch))
        self._every = max(1, round(schedule.validate_every * self._plan.steps_per_epoch))
        self._drop_inputs()
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self.network, schedule), betas=schedule.betas
        )
        self._rates = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate_at)
        self._learning = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._average: AveragedModel | None = None
        self._shown = self.network  # what is validated, and kept
        if setting.ema:
            how = _averaging(setting.ema)
            self._average = AveragedModel(self.network, multi_avg_fn=how)
            self._shown = self._average.module
        self.step = 0
        self._saved_step = 0
        self._save_after = -math.inf
        self._losses: list[float] = []
        self._sum = self._counted = 0.0
        self.seconds = 0.0
        self._best: Outcome | None = None
        self.history = list(history)
        self._drawn = -math.inf

    # -- the loop --------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Learns until the last step; returns the best weights.

        Raises:
            TrainingError: the loss is no number any more, a nat above both where it began and
                what guessing costs, or two above the lowest that it has been at lately.
            Interrupted: by Ctrl-C; the same run resumes from the last checkpoint.
        """
        if self.setting.world > 1:
            # The first process's weights and its statistics, which batches decide.
            for value in self.network.state_dict().values():
                dist.broadcast(value, 0)
        resumed = self._resume()
        try:
            self._loop(resumed)
        except KeyboardInterrupt:
            # What a step has half done is not saved: it would not be what an undisturbed run has.
            raise Interrupted(
                f"interrupted at step {self.step} of {self.total}: the same command, without "
                f"--restart, resumes from step {self._saved_step}"
            ) from None
        except (RuntimeError, MemoryError) as error:
            full = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not full and "allocate memory" not in str(error):
                raise
            through = self.schedule.chunk or self.schedule.batch
            raise TrainingError(
                f"stage '{self.schedule.name}': the memory is full, with {through} pairs at once "
                "in a step; a smaller chunk (gradient caching) learns the same from less"
            ) from error
        finally:
            with suppress(OSError, TrainingError):  # what stopped the run is what must be told
                self._show(last=True)
        best: Outcome | None = from_first(self._best, self._device)
        assert best is not None
        if not best.step:
            self._notify("nothing that was trained does better on the validation pictures than "
                         "the start, which is kept")  # fmt: skip
        return best

    def _loop(self, resumed: bool) -> None:
        if self._device.type == "cpu":
            _keep_freed_memory()
        batches = load_batches(
            self._examples,
            self._plan,
            range(self.step, self.total),
            workers=self.setting.workers,
            pin=self._device.type == "cuda",
            rank=self.setting.rank,
            world=self.setting.world,
        )
        started = self._clock()
        before = self.seconds
        if not resumed:
            self._validate()  # where it starts from may be the best there is
            self._save()
        for batch in batches:
            self._learn(batch)
            self.step += 1
            self.seconds = before + self._clock() - started
            self._progress(Progress(f"stage {self.schedule.name}", self.step, self.total))
            if self.step % self._every == 0 or self.step == self.total:
                self._validate()
                self._save()
                self._show()
            elif self._clock() > self._save_after:
                self._save()

    def _learn(self, batch: Example) -> None:
        self._mode()
        # What drops out depends on the step alone, not on what ran before it.
        torch.manual_seed(seed_of(self.setting.seed, self.step, self.setting.rank))
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._backward(Example(*(part.to(self._device) for part in batch)))
        loss = self._shared_gradients(loss)
        norm = nn.utils.clip_grad_norm_(self._learning, self.schedule.clip_norm)
        self._check(loss, float(norm))
        self._optimizer.step()
        self._rates.step()
        clamp_scale(self.network)
        if self._average is not None:
            self._average.update_parameters(self.network)
        self._sum += loss
        self._counted += 1

    def _backward(self, batch: Example) -> float:
        """Puts the gradients of the batch's loss into the parameters; returns the loss."""
        taught = Embeddings(batch.teacher_image, batch.teacher_text)

        def loss_of(own: Embeddings) -> torch.Tensor:
            return self._loss(own, self.network, taught if taught.image.numel() else None)

        chunk = self.schedule.chunk
        if chunk is not None and chunk < len(batch.image):
            return cached_backward(self._embed, loss_of, batch.image, batch.text, chunk)
        loss = loss_of(self._embed(batch.image, batch.text))
        loss.backward()
        return loss.item()

    def _embed(self, image: torch.Tensor, text: torch.Tensor) -> Embeddings:
        if image.ndim == 4:
            image = image.contiguous(memory_format=torch.channels_last)
        with self._computing_in(self.setting.precision):
            images = self.network.encode_image(image, normalize=True)
        with self._computing_in(self.setting.text_precision or self.setting.precision):
            texts = encode_texts(self.network, text)
        # The softmax over the batch needs more than bf16's 8 bits.
        kind = self.network.logit_scale.dtype
        return Embeddings(images.to(kind), texts.to(kind))

    def _computing_in(self, precision: str) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bf16")

    def _shared_gradients(self, loss: float) -> float:
        """The mean of gradients and loss over all processes."""
        world = self.setting.world
        if world == 1:
            return loss
        used = [float(parameter.grad is not None) for parameter in self._learning]
        users_of = torch.tensor(used, device=self._device)
        dist.all_reduce(users_of)
        for parameter, users in zip(self._learning, users_of.tolist(), strict=True):
            if not users:
                continue  # as in a single process: what no batch used does not decay either
            if parameter.grad is None:  # every process must take part in every exchange
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        mean = torch.tensor(loss, device=self._device)
        dist.all_reduce(mean)
        return mean.item() / world

    def _check(self, loss: float, norm: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = "gradient" if math.isfinite(loss) else "loss"
            raise self._stopped(f"the {what} is not a finite number", "a lower rate, or fp32")
        first, mean, lowest = self._losses or [loss, loss, loss]
        mean = _SMOOTH * mean + (1 - _SMOOTH) * loss
        self._losses = [first, mean, min(lowest + _FORGET, mean)]
        guess = math.log(self.schedule.batch)
        # A teacher with a large weight makes losses that vary by more than two nats.
        collapsed = lowest + _COLLAPSED * max(1.0, lowest / guess)
        if mean > max(first, guess) + _DIVERGED or mean > collapsed:
            raise self._stopped(
                f"the loss diverges to {mean:.2f}, where it began with {first:.2f},", "a lower rate"
            )

    def _stopped(self, why: str, remedy: str) -> TrainingError:
        return TrainingError(
            f"{why} at step {self.step + 1} of stage '{self.schedule.name}'; the last good "
            f"checkpoint (step {self._saved_step}) and the best weights so far are in "
            f"{self._folder}; try {remedy}"
        )

    # -- what learns, and how fast -----------------------------------------------------------

    def _mode(self) -> None:
        self.network.train()
        for name, module in self.network.named_modules():
            if name and is_below(name, (*self.schedule.freeze, *self.schedule.keep_eval)):
                module.eval()

    def _drop_inputs(self) -> None:
        for name, share in self.schedule.input_dropout.items():
            module = self.network.get_submodule(name)

            def drop(owner: nn.Module, inputs: Any, share: float = share) -> Any:
                return (nn.functional.dropout(inputs[0], share, owner.training), *inputs[1:])

            module.register_forward_pre_hook(drop)

    def _rate_at(self, step: int) -> float:
        # A short run is not all warm-up: a tenth of it at most.
        warm = min(1.0, (step + 1) / max(1, min(self.schedule.warmup, self.total // 10)))
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.total)))

    # -- validation and state ----------------------------------------------------------------

    def _validate(self) -> None:
        """Measures where the run stands: in the first process, which alone keeps the best."""
        recall = None
        if not self.setting.rank:
            with suppress(ArithmeticError):
                recall = validate(self._shown, self._validation, self._device, self.setting.workers)
        recall = from_first(recall, self._device)
        if recall is None:
            raise self._stopped(
                "a validation vector is not a finite number", "a lower rate, or fp32"
            )
        if self.setting.rank:
            return
        score = sum(recall.values()) / len(recall)
        epoch = self.step / self._plan.steps_per_epoch
        mean = self._sum / self._counted if self._counted else math.nan
        self.history.append({
            "stage": self.schedule.name, "step": self.step, "epoch": epoch, "loss": mean,
            "scale": self.network.logit_scale.exp().item(),
            "rate": float(self._rates.get_last_lr()[0]), "seconds": self.seconds, **recall,
        })  # fmt: skip
        self._sum = self._counted = 0.0
        learned = f"loss {mean:.3f}, " if math.isfinite(mean) else ""
        self._notify(
            f"{self.schedule.name}: epoch {epoch:.3g} of {self.schedule.epochs:g}, {learned}"
            f"validation {recall_line(recall)}, {self.seconds:.0f} s"
        )
        # Of equals the later has learned for longer.
        if self._best is None or score >= self._best.score:
            state = {n: v.detach().cpu().clone() for n, v in self._shown.state_dict().items()}
            self._best = Outcome(self.step, state, score, recall)

    def _save(self) -> None:
        _, mean, lowest = self._losses or [0.0, 0.0, 0.0]
        # Where the loss climbs, these weights may be the way to a divergence.
        if self.setting.rank or mean > lowest + _RISING:
            return
        state: dict[str, Any] = {
            "run": self._run,
            "stage": self.schedule.name,
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rates": self._rates.state_dict(),
            "average": self._average.state_dict() if self._average is not None else None,
            "losses": self._losses,
            "sum": self._sum,
            "counted": self._counted,
            "seconds": self.seconds,
            "best": vars(self._best) if self._best is not None else None,
            "history": self.history,
        }
        began = self._clock()
        with replaced(self._folder / CHECKPOINT) as draft:
            torch.save(state, draft)
        self._saved_step = self.step
        took = self._clock() - began
        self._save_after = began + max(self.setting.checkpoint_seconds, took / _SAVE_SHARE)

    def _show(self, *, last: bool = False) -> None:
        """For people: the log, its plot now and then, and the best weights so far."""
        if self.setting.rank:
            return
        plot = last or self._clock() - self._drawn > _DRAW_SECONDS
        write_log(self._folder, self.history, plot=plot)
        if plot:
            self._drawn = self._clock()
        if self._best is not None:
            save_weights(self._folder / "best.safetensors", self._best.state)

    def _resume(self) -> bool:
        """Takes up this stage's checkpoint; whether there was one."""
        check_run(self._folder, {self._run, *self._before})
        state = load_checkpoint(self._folder / CHECKPOINT)
        barrier()  # the first process replaces it soon
        if state is None or state["run"] != self._run:
            return False  # an earlier stage's: what came of it is here already
        self.history = state["history"]
        self.step = self._saved_step = int(state["step"])
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rates.load_state_dict(state["rates"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._losses = state["losses"]
        self._best = Outcome(**state["best"]) if state["best"] is not None else None
        self._sum, self._counted = state["sum"], state["counted"]
        self.seconds = float(state["seconds"])
        self._notify(f"going on at step {self.step} of {self.total}")
        return True


def check_schedule(network: nn.Module, schedule: Schedule, world: int) -> None:
    """Makes sure that a stage fits a network and the number of processes.

    Raises:
        UsageError: it does not.
        TrainingError: it leaves nothing to learn.
    """
    if schedule.batch % world:
        raise UsageError(
            f"stage '{schedule.name}': a batch of {schedule.batch} cannot be split evenly "
            f"between {world} processes"
        )
    modules = {name: module for name, module in network.named_modules() if name}
    parameters = [name for name, _ in network.named_parameters()]
    named = {
        "freeze": (schedule.freeze, {*modules, *parameters}),
        "rates": (schedule.rates, {*modules, *parameters}),
        "keep_eval": (schedule.keep_eval, {*modules}),
        "input_dropout": (
            schedule.input_dropout,
            {name for name, module in modules.items() if not isinstance(module, nn.Embedding)},
        ),
    }  # fmt: skip
    for field, (names, known) in named.items():
        for name in names:
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise UsageError(
                    f"stage '{schedule.name}': {field}: the model has no module '{name}'"
                    + (" that takes it" if name in modules or name in parameters else "")
                    + (f"; '{near[0]}' perhaps" if near else "")
                )
    if all(is_below(name, schedule.freeze) for name in parameters):
        raise TrainingError(f"stage '{schedule.name}' freezes everything: nothing is left to learn")


def parameter_groups(network: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    """What learns, by rate and decay: matrices decay; biases, norms and embeddings do not.

    What does not learn is frozen.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        parameter.requires_grad = not is_below(name, schedule.freeze)
        if not parameter.requires_grad:
            continue
        longest = max((n for n in schedule.rates if is_below(name, (n,))), key=len, default=None)
        rate = schedule.rates[longest] if longest is not None else schedule.rate
        decays = parameter.ndim > 1 and "embedding" not in name
        groups.setdefault((rate, schedule.decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def validate(
    network: Any, held_out: Source, device: torch.device | str, workers: int = 0, block: int = 128
) -> dict[str, float]:
    """Recall@1/5/10 both ways, in percent, by names such as "t2i_R@1".

    Args:
        workers: processes that load pictures; 0 is this one.
        block: how many pictures go through the network at once.

    Raises:
        ArithmeticError: the network gives vectors that are no numbers.
    """
    network.eval()
    with torch.inference_mode():
        images = torch.cat([
            network.encode_image(batch.to(device), normalize=True).float().cpu()
            for batch in load_images(held_out.images, block, workers)
        ])  # fmt: skip
        texts = torch.cat([
            encode_texts(network, part.to(device)).float().cpu()
            for part in torch.cat(list(held_out.texts)).split(4 * block)
        ])  # fmt: skip
    if not (images.isfinite().all() and texts.isfinite().all()):
        raise ArithmeticError("vectors that are not finite")
    owner = np.repeat(np.arange(len(held_out.texts)), [len(own) for own in held_out.texts])
    return both_recalls(both_ranks(images.numpy(), texts.numpy(), owner))


def _averaging(decay: float) -> Callable[[Any, Any, torch.Tensor | int], None]:
    """An exponential average of the weights that forgets sooner at first: what it starts from."""

    def average(averaged: Any, current: Any, count: torch.Tensor | int) -> None:
        get_ema_multi_avg_fn(min(decay, (1 + int(count)) / (10 + int(count))))(
            averaged, current, count
        )

    return average


def _keep_freed_memory() -> None:
    """Keeps glibc from handing large tensors back to the system after every step.

    The next step needs the same sizes again, and touching fresh pages took half of a step's
    time (MobileNetV2's last stages, batches of 368: 34 images a second before, 76 after).
    """
    with suppress(OSError, AttributeError):  # another C library
        allocator = ctypes.CDLL(None).mallopt
        allocator(-4, 0)  # M_MMAP_MAX: no block of its own for a large request
        allocator(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink

"""The one training loop: whole models and projection heads go through it alike."""

from __future__ import annotations

import ctypes
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmsearch.errors import Interrupted, TrainingError, UsageError
from mmsearch.learning.batches import Example, Examples, Plan, Source, load_batches
from mmsearch.learning.checkpoint import State, load_checkpoint, save_checkpoint, save_weights
from mmsearch.learning.gradients import cached_backward
from mmsearch.learning.history import History
from mmsearch.learning.losses import ContrastiveLoss, Embeddings, clamp_scale
from mmsearch.learning.recipe import Schedule
from mmsearch.learning.validation import Validation, recall_line, validate
from mmsearch.types import Progress

log = logging.getLogger(__name__)

_DIVERGED = 1.0  # nats above what the beginning and what guessing cost
_SMOOTH = 0.95
_DRAW_SECONDS = 20.0  # drawing takes as long as many steps of a small model


@dataclass(frozen=True)
class Setting:
    """What all stages of a run share."""

    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
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
        validation: Validation,
        schedule: Schedule,
        setting: Setting,
        loss: ContrastiveLoss,
        folder: Path,
        *,
        run: str = "",
        on_progress: Callable[[Progress], None] = lambda progress: None,
        notify: Callable[[str], None] = log.info,
    ) -> None:
        """Takes the network as it is to start.

        Args:
            folder: where checkpoint, log and plot are kept.
            run: a name for everything that the weights depend on; a checkpoint of another run
                is refused.
        """
        self.schedule, self.setting, self._loss = schedule, setting, loss
        self._folder, self._run = folder, run
        self._progress, self._notify = on_progress, notify
        self._device = torch.device(setting.device)
        self.network: Any = network.to(self._device)
        if self._device.type == "cuda":
            self.network = self.network.to(memory_format=torch.channels_last)
        if schedule.batch % setting.world:
            raise UsageError(
                f"stage '{schedule.name}': a batch of {schedule.batch} cannot be split evenly "
                f"between {setting.world} processes"
            )
        self._validation = validation
        self._examples = Examples(sources, setting.word_drop)
        self._plan = Plan(sources, schedule.batch, setting.seed)
        self.total = max(1, round(schedule.epochs * self._plan.steps_per_epoch))
        self._every = max(1, round(schedule.validate_every * self._plan.steps_per_epoch))
        self._drop_inputs()
        self._freeze()
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self.network, schedule), betas=schedule.betas
        )
        self._rates = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate_at)
        self._average = (
            AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(setting.ema))
            if setting.ema
            else None
        )
        self.step = 0
        self._losses: list[float] = []
        self._sum = self._counted = 0.0
        self.seconds = 0.0
        self._best: tuple[float, dict[str, float], State] | None = None
        self.history = History()
        self._drawn = -math.inf

    # -- the loop --------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Learns until the last step; returns the best weights.

        Raises:
            TrainingError: the loss is no number any more, or worse than guessing.
            Interrupted: by Ctrl-C; the same run goes on from there.
        """
        self._resume()
        try:
            self._loop()
        except KeyboardInterrupt:
            self._save()
            raise Interrupted(
                f"interrupted at step {self.step} of {self.total}: the same command goes on from "
                "there"
            ) from None
        finally:
            self._show(last=True)
        assert self._best is not None
        score, recall, state = self._best
        return Outcome(state, score, recall)

    def _loop(self) -> None:
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
        saved = started = time.monotonic()
        before = self.seconds
        if not self.step and self._best is None:
            self._validate()  # where it starts from may be the best there is
        for batch in batches:
            self._learn(batch)
            self.step += 1
            self.seconds = before + time.monotonic() - started
            self._progress(Progress(f"stage {self.schedule.name}", self.step, self.total))
            if self.step % self._every == 0 or self.step == self.total:
                self._validate()
                self._save()
                saved = time.monotonic()
                self._show()
            elif time.monotonic() - saved > self.setting.checkpoint_seconds:
                self._save()
                saved = time.monotonic()

    def _learn(self, batch: Example) -> None:
        self._mode()
        # What drops out depends on the step alone, not on what ran before it.
        torch.manual_seed(_mixed(self.setting.seed, self.step, self.setting.rank))
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._backward(Example(*(part.to(self._device) for part in batch)))
        loss = self._shared_gradients(loss)
        norm = nn.utils.clip_grad_norm_(self._learning(), self.schedule.clip_norm)
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
        taught = (
            Embeddings(batch.teacher_image, batch.teacher_text)
            if batch.teacher_image.numel()
            else None
        )
        chunk = self.schedule.chunk
        if chunk is None or chunk >= len(batch.image):
            loss = self._loss(self._embed(batch.image, batch.text), self.network, taught)
            loss.backward()
            return loss.item()
        return cached_backward(
            self._embed,
            lambda own: self._loss(own, self.network, taught),
            batch.image,
            batch.text,
            chunk,
        )

    def _embed(self, image: torch.Tensor, text: torch.Tensor) -> Embeddings:
        if image.ndim == 4 and self._device.type == "cuda":
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(
            self._device.type, torch.bfloat16, enabled=self.setting.precision == "bf16"
        ):
            pair = (
                self.network.encode_image(image, normalize=True),
                self.network.encode_text(text, normalize=True),
            )
        # The softmax over the batch needs more than bf16's 8 bits.
        kind = self.network.logit_scale.dtype
        return Embeddings(pair[0].to(kind), pair[1].to(kind))

    def _shared_gradients(self, loss: float) -> float:
        """The mean of gradients and loss over all processes."""
        world = self.setting.world
        if world == 1:
            return loss
        for parameter in self._learning():
            if parameter.grad is None:  # every process must take part in every exchange
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        mean = torch.tensor(loss, device=self._device)
        dist.all_reduce(mean)
        return mean.item() / world

    def _check(self, loss: float, norm: float) -> None:
        stopped = f"at step {self.step + 1} of stage '{self.schedule.name}'"
        kept = (
            f"; the last good checkpoint (step {self._saved_step()}) and the best weights so far "
            f"are in {self._folder}"
        )
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"the {'gradient' if math.isfinite(loss) else 'loss'} is not a finite number "
                f"{stopped}{kept}; try a lower rate, or fp32"
            )
        if not self._losses:  # the first of this stage, and the running mean
            self._losses = [loss, loss]
        first, mean = self._losses
        mean = _SMOOTH * mean + (1 - _SMOOTH) * loss
        self._losses = [first, mean]
        bound = max(first, math.log(self.schedule.batch)) + _DIVERGED
        if self.step > self.schedule.warmup and mean > bound:
            raise TrainingError(
                f"the loss diverges: {mean:.2f} {stopped}, where it began with {first:.2f}{kept}; "
                "try a lower rate"
            )

    def _saved_step(self) -> int:
        with suppress(TrainingError):
            state = load_checkpoint(self._folder / "checkpoint.pt")
            return int(state["step"]) if state else 0
        return 0

    # -- what learns, and how fast -----------------------------------------------------------

    def _learning(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _freeze(self) -> None:
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad = not is_below(name, self.schedule.freeze)

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
        warm = min(1.0, (step + 1) / max(1, self.schedule.warmup))
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.total)))

    # -- validation and state ----------------------------------------------------------------

    @property
    def _shown(self) -> Any:
        return self._average.module if self._average is not None else self.network

    def _validate(self) -> None:
        recall = validate(self._shown, self._validation, self._device)
        score = sum(recall.values()) / len(recall)
        epoch = self.step / self._plan.steps_per_epoch
        mean = self._sum / self._counted if self._counted else math.nan
        self.history.add(
            stage=self.schedule.name, step=self.step, epoch=epoch, loss=mean,
            scale=self.network.logit_scale.exp().item(),
            rate=float(self._rates.get_last_lr()[0]), seconds=self.seconds, **recall,
        )  # fmt: skip
        self._sum = self._counted = 0.0
        learned = f"loss {mean:.3f}, " if math.isfinite(mean) else ""
        self._notify(
            f"{self.schedule.name}: epoch {epoch:.3g} of {self.schedule.epochs:g}, {learned}"
            f"validation {recall_line(recall)}, {self.seconds:.0f} s"
        )
        if self._best is None or score > self._best[0]:
            state = {n: v.detach().cpu().clone() for n, v in self._shown.state_dict().items()}
            self._best = (score, recall, state)

    def _save(self) -> None:
        if self.setting.rank:
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
            "best": self._best,
            "history": self.history.entries,
        }
        save_checkpoint(self._folder / "checkpoint.pt", state)

    def _show(self, *, last: bool = False) -> None:
        """For people: the log, its plot now and then, and the best weights so far."""
        if self.setting.rank:
            return
        plot = last or time.monotonic() - self._drawn > _DRAW_SECONDS
        self.history.write(self._folder, plot=plot)
        if plot:
            self._drawn = time.monotonic()
        if self._best is not None:
            save_weights(self._folder / "best.safetensors", self._best[2])

    def _resume(self) -> None:
        state = load_checkpoint(self._folder / "checkpoint.pt")
        if state is None:
            return
        if state["run"] != self._run:
            raise TrainingError(
                f"{self._folder}: holds a run with other settings or data; --restart begins anew, "
                "another --out keeps both"
            )
        self.history = History(state["history"])
        if state["stage"] != self.schedule.name:
            return  # the stage before: its log goes on, its weights came with the network
        self.step = int(state["step"])
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rates.load_state_dict(state["rates"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._losses, self._best = state["losses"], state["best"]
        self._sum, self._counted = state["sum"], state["counted"]
        self.seconds = float(state["seconds"])
        if self.step:
            self._notify(f"going on at step {self.step} of {self.total}")


def parameter_groups(network: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    """What learns, by rate and decay: matrices decay; biases, norms and embeddings do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        longest = max((n for n in schedule.rates if is_below(name, (n,))), key=len, default=None)
        rate = schedule.rates[longest] if longest is not None else schedule.rate
        decays = parameter.ndim > 1 and "embedding" not in name
        groups.setdefault((rate, schedule.decay if decays else 0.0), []).append(parameter)
    if not groups:
        raise TrainingError(f"stage '{schedule.name}' freezes everything: nothing is left to learn")
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def is_below(name: str, tops: Sequence[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def _mixed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _keep_freed_memory() -> None:
    """Keeps glibc from handing large tensors back to the system after every step.

    The next step needs the same sizes again, and touching fresh pages took half of a step's
    time (MobileNetV2's last stages, batches of 368: 34 images a second before, 76 after).
    """
    with suppress(OSError, AttributeError):  # another C library
        allocator = ctypes.CDLL(None).mallopt
        allocator(-4, 0)  # M_MMAP_MAX: no block of its own for a large request
        allocator(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink

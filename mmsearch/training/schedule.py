"""What of a network learns, and how fast."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from mmsearch.errors import TrainingError, UsageError
from mmsearch.training.recipe import Schedule
from mmsearch.types import OnProgress, Progress


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


def is_below(name: str, tops: Sequence[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def cosine_steps(
    optimizer: torch.optim.Optimizer, count: int, warmup: int, on_progress: OnProgress
) -> Iterator[int]:
    """The steps of a training without stages; the caller does them, from clean gradients.

    The rate rises for `warmup` steps and falls as a cosine.
    """
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / count)) / 2,
    )
    for step in range(count):
        optimizer.zero_grad()
        yield step
        rate.step()
        on_progress(Progress("learning", step + 1, count))

"""The processes of a run, as torchrun starts them; one alone without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmsearch.errors import TrainingError, UsageError, in_a_line


@dataclass(frozen=True)
class Process:
    """One of `world` processes that train together."""

    rank: int
    world: int
    device: str
    beside: int = 1
    """How many of them share this machine."""


@contextmanager
def processes(device: str) -> Iterator[Process]:
    """Joins the processes that torchrun started, each on a device of its own.

    Args:
        device: "cpu" or a torch device; of several processes each takes a card of its own.

    Raises:
        UsageError: there is no such device.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise UsageError(
                f"device '{device}': of several processes each takes a card of its own; say "
                "--device cuda, and CUDA_VISIBLE_DEVICES=0,1 for which"
            )
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the second from a torch without CUDA
        reason = in_a_line(error).partition(". ")[0]
        if reason.startswith("Expected one of"):  # and then some twenty that nobody has
            reason = "torch knows no such device; take cpu, or cuda"
        raise UsageError(f"device '{device}' cannot be used: {reason}") from error
    if world == 1:
        yield Process(0, 1, device)
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # where barriers and exchanged objects go
    # The others wait while the first computes views of every picture, which may take hours.
    try:
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=24)
        )
    except ValueError as error:
        raise UsageError(
            f"RANK and WORLD_SIZE are set, but not what torchrun sets beside them: {error}"
        ) from error
    try:
        yield Process(rank, world, device, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TrainingError("another of the processes stopped: its own message says why") from error
    finally:
        dist.destroy_process_group()


def are_several() -> bool:
    """Whether processes train together: this is one of them."""
    return dist.is_available() and dist.is_initialized()


def barrier() -> None:
    """Waits until all processes are here."""
    if are_several():
        dist.barrier()


def from_first(value: Any, device: torch.device | str) -> Any:
    """What the first process has, in every process: the others wait for it."""
    if not are_several():
        return value
    held = [value]
    dist.broadcast_object_list(held, device=torch.device(device))
    return held[0]


def require_same(value: Any, what: str) -> None:
    """Makes sure that all processes have the same value; all of them fail if they do not.

    Raises:
        TrainingError: they do not.
    """
    if not are_several():
        return
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    if any(other != found[0] for other in found):
        raise TrainingError(f"the processes see different {what}: are all files the same to all?")

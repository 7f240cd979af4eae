"""The processes of a run, as torchrun starts them; one alone without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Process:
    """One of `world` processes that train together."""

    rank: int
    world: int
    device: str


@contextmanager
def processes(device: str) -> Iterator[Process]:
    """Joins the processes that torchrun started, each on a device of its own.

    Args:
        device: "cpu" or "cuda".
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Process(0, 1, device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)  # where barriers and exchanged objects go
    # The others wait while the first computes views of every picture, which may take hours.
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=24)
    )
    try:
        yield Process(rank, world, device)
    finally:
        dist.destroy_process_group()

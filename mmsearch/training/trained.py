"""Networks that searches use: how they learn, and as OpenVINO runs them.

torch's import would cost a search two seconds.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmsearch.encoders.openvino import Graph, convert_graph, ov
from mmsearch.errors import TrainingError
from mmsearch.search.trained import Network
from mmsearch.types import OnProgress, Progress

_AGREEMENT = 1e-3  # of outputs that are about 1, or some tens


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
        on_progress(Progress("training", step + 1, count))


def export_network(
    network: nn.Module, examples: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
) -> Network:
    """Converts a network, in half precision.

    Args:
        examples: inputs to trace it with, and to compare on.
        shapes: those of the inputs; -1 for what varies.

    Raises:
        TrainingError: its weights are no numbers, or OpenVINO computes something else than torch.
    """
    network = network.float().eval()
    with torch.inference_mode():
        for value in (*network.parameters(), *network.buffers()):
            value.copy_(value.half())  # what is compared, and measured, is what is kept
            if not torch.isfinite(value).all():
                raise TrainingError("the trained network holds values that are no numbers")
        expected = network(*examples)
    converted = convert_graph(network, tuple(examples), list(shapes))
    with tempfile.TemporaryDirectory(prefix="mmsearch-export-") as scratch:
        path = Path(scratch) / "network.xml"
        ov.save_model(converted, path, compress_to_fp16=True)
        found = Network(path.read_bytes(), path.with_suffix(".bin").read_bytes())
    got = Graph.of_network(found.graph, found.weights)(*(example.numpy() for example in examples))
    for want, have in zip([expected] if torch.is_tensor(expected) else expected, got, strict=True):
        if not np.allclose(want.numpy(), have, atol=_AGREEMENT, rtol=_AGREEMENT):
            raise TrainingError("OpenVINO computes something else than the trained network")
    return found

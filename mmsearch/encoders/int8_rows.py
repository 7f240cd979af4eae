"""Weights in eight bits: each row of a matrix as whole numbers, and what one of them stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

#: Beside a tensor of whole numbers, (rows, ...), the tensor by which its rows are multiplied.
SCALE = ".int8_scale"
_LARGEST = 127


def quantise_rows(
    state: Mapping[str, torch.Tensor], modules: Sequence[str]
) -> dict[str, torch.Tensor]:
    """A network's weights with the matrices of some modules in int8.

    Args:
        state: tensors by name; of those below `modules` the ones with two dimensions are changed.
    """
    found = {}
    for name, value in state.items():
        if value.ndim == 2 and any(name.startswith(f"{module}.") for module in modules):
            scale = value.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / _LARGEST
            found[name] = (value.float() / scale).round().to(torch.int8)
            found[name + SCALE] = scale
        else:
            found[name] = value
    return found


def is_scale(name: str) -> bool:
    """Whether a tensor of that name is what rows of another are multiplied by."""
    return name.endswith(SCALE)


def dequantise_rows(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as floating-point numbers again; those that were left as they were stay so."""
    return {
        name: value.float() * state[name + SCALE] if value.dtype == torch.int8 else value
        for name, value in state.items()
        if not is_scale(name)
    }

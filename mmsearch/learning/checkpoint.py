"""Where a run stands, on disk: replaced as a whole, so that a kill at any point costs nothing."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmsearch.errors import TrainingError
from mmsearch.store.files import draft_of, sync_file, sync_folder

State = dict[str, torch.Tensor]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces the checkpoint; after a crash it is the old one or the new one."""
    draft = draft_of(path)
    torch.save(state, draft)
    _replace(draft, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state that was saved last, or None where there is none. Runs no code from the file.

    Raises:
        TrainingError: the file is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its remarks on what a damaged file might be
            found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"{path}: the checkpoint is damaged; --restart trains from the beginning"
        ) from error
    return found


def save_weights(path: Path, state: State, remarks: dict[str, str] | None = None) -> None:
    """Replaces a file of weights (safetensors), all or nothing."""
    draft = draft_of(path)
    # Tensors that share memory are refused by safetensors; a clone each is what is meant.
    copies = {n: value.detach().cpu().clone().contiguous() for n, value in state.items()}
    save_file(copies, draft, remarks)
    draft.chmod(0o644)  # safetensors lets nobody else read, an installed model must be readable
    _replace(draft, path)


def load_weights(path: Path) -> State:
    return load_file(path)


def weights_remarks(path: Path) -> dict[str, str] | None:
    """What was remarked on the weights in a file, or None where there is no such file."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _replace(draft: Path, path: Path) -> None:
    sync_file(draft)
    os.replace(draft, path)
    sync_folder(path.parent)

"""Where a run stands, on disk: replaced as a whole, so that a kill at any point costs nothing."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mmsearch.errors import TrainingError
from mmsearch.store.files import draft_of, sync_file, sync_folder

State = dict[str, torch.Tensor]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces the checkpoint; after a crash it is the old one or the new one.

    Raises:
        TrainingError: it cannot be written; the old one is kept.
    """
    with replaced(path) as draft:
        torch.save(state, draft)


def load_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any] | None:
    """The state that was saved last, or None where there is none. Runs no code from the file.

    Args:
        mapped: read the tensors only when they are used.

    Raises:
        TrainingError: the file is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its remarks on what a damaged file might be
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except FileNotFoundError:
        return None
    except Exception as error:  # torch answers damaged files with nearly any exception there is
        raise TrainingError(
            f"{path}: the checkpoint is damaged; --restart trains from the beginning"
        ) from error


def save_weights(path: Path, state: State, remarks: dict[str, str] | None = None) -> None:
    """Replaces a file of weights (safetensors), all or nothing.

    Raises:
        TrainingError: it cannot be written; the old one is kept.
    """
    # Tensors that share memory are refused by safetensors; a clone each is what is meant.
    copies = {n: value.detach().cpu().clone().contiguous() for n, value in state.items()}
    with replaced(path) as draft:
        save_file(copies, draft, remarks)
        draft.chmod(0o644)  # safetensors lets nobody else read; an installed model must be readable


def load_weights(path: Path) -> State:
    """The weights in a file.

    Raises:
        FileNotFoundError: there is none.
        TrainingError: it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path) from error


def weights_remarks(path: Path) -> dict[str, str] | None:
    """What was remarked on the weights in a file, or None where there is no such file.

    Raises:
        TrainingError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> TrainingError:
    return TrainingError(f"{path}: damaged; delete it, and it is made again")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives the name of a draft that takes a file's place once it is written."""
    draft = draft_of(path)
    try:
        yield draft
        sync_file(draft)
        os.replace(draft, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # each says a full disk its own way
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        room = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        reason = f": {error.strerror}" if isinstance(error, OSError) else ""
        raise TrainingError(
            f"{path}: cannot be written ({room / 1e6:.0f} MB are free there){reason}; once it can "
            "be, the same command resumes"
        ) from error

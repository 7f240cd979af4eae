"""The folder of a trained model, and what a run keeps in it."""

from __future__ import annotations

import shutil
from pathlib import Path

#: The state, the log and the plot of a run, below the model's folder.
RUN = "training"
_RESULTS = ("open_clip_config.json", "open_clip_model.safetensors", "mmsearch_model.json",
            "heads.safetensors", "README.md")  # fmt: skip


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a model already."""
    return any(
        (folder / name).is_file() for name in ("open_clip_config.json", "mmsearch_model.json")
    )


def forget_run(folder: Path) -> None:
    """Removes a model that was trained into a folder, and its run's state."""
    shutil.rmtree(folder / RUN, ignore_errors=True)
    for name in _RESULTS:
        (folder / name).unlink(missing_ok=True)

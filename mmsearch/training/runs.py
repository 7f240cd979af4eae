"""The folder of a trained model, and what a run keeps in it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mmsearch.encoders.registry import ModelSource, full_name, parse_model
from mmsearch.errors import TrainingError, UsageError
from mmsearch.store.files import write_durably

#: The state, the log and the plot of a run, below the model's folder.
RUN = "training"
#: By this file a folder is known as a run's own; it is there from before the first step.
_MARK = "mmsearch-run"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FINISHED = ("open_clip_config.json", "mmsearch_model.json")
_RESULTS = (*_FINISHED, "open_clip_model.safetensors", "heads.safetensors", "README.md",
            "text.npy", "image.npy")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a run reads and writes, and on what it computes. None of it decides the weights."""

    data: Path
    """What the recipe's paths are relative to."""
    folder: Path
    """The model's folder; the run keeps its state in `training` below it."""
    cache: Path
    """Where computed views are kept."""
    home: Path
    """Where the models lie that were trained here and go by a name."""
    device: str = "cpu"
    workers: int = 0
    rank: int = 0
    world: int = 1

    @property
    def run(self) -> Path:
        return self.folder / RUN

    def model(self, name: str) -> ModelSource:
        """A model that a recipe names; a path starts at the data, as all of a recipe's do."""
        kind, colon, path = name.partition(":")
        if colon and kind != "hf-hub":
            return parse_model(f"{kind}:{self.data / Path(path).expanduser()}")
        return parse_model(full_name(name, self.home))


def check_room(folder: Path, *, restart: bool, uses: Iterable[Path] = ()) -> None:
    """Makes sure that a run may write into a folder; changes nothing.

    Args:
        uses: the files that the run starts from.

    Raises:
        UsageError: it holds files that no run made, a finished model, or what the run needs.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; --out takes a model's name or a folder")
    ours = (folder / RUN / _MARK).is_file()
    if not ours and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} holds files that no training made; take a new folder or a name for --out"
        )
    if not restart and any((folder / name).is_file() for name in _FINISHED):
        raise UsageError(
            f"{folder} holds a trained model; take another --out, or --restart to train it again"
        )
    for path in uses:
        if path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"{path} is what the run starts from, and would be replaced; take another --out"
            )


@contextmanager
def run_folder(folder: Path, *, restart: bool, uses: Iterable[Path] = ()) -> Iterator[None]:
    """Marks a folder as a run's own and keeps other processes out of it meanwhile.

    Args:
        restart: removes what an earlier run left: call this when all else is known to be fine.
        uses: the files that the run starts from.

    Raises:
        UsageError: as `check_room`.
        TrainingError: another process trains into the folder, or its disk is full.
    """
    check_room(folder, restart=restart, uses=uses)
    lock = FileLock(folder / RUN / "lock")
    try:
        (folder / RUN).mkdir(parents=True, exist_ok=True)
        write_durably(folder / RUN / _MARK, b"mmsearch train keeps its state here\n")
        lock.acquire(timeout=0)
        if restart:
            _forget(folder)
        yield
    except Timeout:
        raise TrainingError(f"{folder}: another process is training into it") from None
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise TrainingError(
            f"{error.filename or folder}: {error.strerror}; once there is room, the same command "
            "goes on"
        ) from error
    finally:
        lock.release()


def _forget(folder: Path) -> None:
    for name in _RESULTS:
        (folder / name).unlink(missing_ok=True)
    for path in (folder / RUN).iterdir():
        if path.name in (_MARK, "lock"):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

"""The folder of a trained model, and what a run keeps in it.

Files are replaced as a whole, so that a kill at any point costs nothing.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmsearch.encoders.registry import ModelSource, full_name, parse_model
from mmsearch.errors import TrainingError, UsageError
from mmsearch.evaluation.ranking import CUTOFFS
from mmsearch.store.files import replacing, write_durably

State = dict[str, torch.Tensor]
T = TypeVar("T")

Entry = dict[str, float | str]
"""What was measured at a validation, by field."""

_RECALLS = tuple(f"{way}_R@{k}" for way in ("t2i", "i2t") for k in CUTOFFS)
FIELDS = ("stage", "step", "epoch", "loss", "scale", "rate", "seconds", *_RECALLS)
#: The state, the log and the plot of a run, below the model's folder.
RUN = "training"
CHECKPOINT = "checkpoint.pt"
#: By this file a folder is known as a run's own; it is there from before the first step.
_MARK = "mmsearch-run"
PORTION = 2048  # what is made and kept at once: a run that is stopped loses no more
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
            "resumes"
        ) from error
    finally:
        lock.release()


def _forget(folder: Path) -> None:
    for path in (*(folder / name for name in _RESULTS), *(folder / RUN).iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (_MARK, "lock"):
            path.unlink(missing_ok=True)


def check_run(folder: Path, runs: Collection[str]) -> None:
    """Makes sure that a checkpoint in a folder, where there is one, belongs to one of these runs.

    Raises:
        TrainingError: it does not, or is damaged.
    """
    state = load_checkpoint(folder / CHECKPOINT, mapped=True)
    if state is not None and state.get("run") not in runs:
        raise TrainingError(
            f"{folder}: stage '{state.get('stage')}' was begun there with other settings or data; "
            f"delete {CHECKPOINT} in it to train what has changed again, --restart begins "
            "again, another --out keeps both"
        )


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
    return load_remarked(path)[0]


def load_remarked(path: Path) -> tuple[State, dict[str, str]]:
    """The weights in a file, and what was remarked on them.

    Raises:
        FileNotFoundError: there is none.
        TrainingError: it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            return state, dict(file.metadata() or {})
    except SafetensorError as error:
        raise TrainingError(f"{path}: damaged; delete it, and it is made again") from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives the name of a draft that takes a file's place once it is written."""
    try:
        with replacing(path) as draft:
            yield draft
    except (OSError, RuntimeError, SafetensorError) as error:  # each says a full disk its own way
        room = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        reason = f": {error.strerror}" if isinstance(error, OSError) else ""
        raise TrainingError(
            f"{path}: cannot be written ({room / 1e6:.0f} MB are free there){reason}; once it can "
            "be, the same command resumes"
        ) from error


def remembered(
    cache: Path,
    kind: str,
    items: Sequence[T],
    about: Callable[[Sequence[T], int], Any],
    make: Callable[[Sequence[T], int], State],
    portion: int = PORTION,
) -> Iterator[State]:
    """What is made of items, portion by portion: from `cache` where it was made before.

    Tensors stay in their file, from which the system reads what is used of them.

    Args:
        about: all that a portion's outcome depends on, as plain values.
        make: takes a portion and the place of its first item.
        portion: how many items are made and kept at once.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(items), portion):
        part = items[start : start + portion]
        key = hashlib.sha256(json.dumps(about(part, start)).encode()).hexdigest()[:16]
        kept = cache / f"{kind}-{key}.safetensors"
        with FileLock(kept.with_suffix(".lock")):  # another process may be at the same
            try:
                found = load_weights(kept)
            except (FileNotFoundError, TrainingError):  # nothing yet, or damaged: made again
                save_weights(kept, make(part, start))
                found = load_weights(kept)
        yield found


# -- for people: a log, a plot, a card --------------------------------------------------------


def write_log(folder: Path, entries: Sequence[Entry], *, plot: bool = True) -> None:
    """Writes `log.csv` and, unless told otherwise or without the extra `plots`, `plot.png`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in entry.items()}
        for entry in entries
    )
    write_durably(folder / "log.csv", text.getvalue().encode())
    if entries and plot and find_spec("matplotlib"):
        write_durably(folder / "plot.png", _plot(entries))


def _plot(entries: Sequence[Entry]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, recalls = figure.subplots(1, 2)
    places = list(range(1, len(entries) + 1))
    shown: Any = [entry.get("loss", float("nan")) for entry in entries]
    losses.plot(places, shown, marker=".")
    losses.set(title="loss in training", xlabel="validation", ylabel="contrastive loss")
    for direction, style in (("t2i", "-"), ("i2t", "--")):
        for k, colour in ((1, "C3"), (5, "C1"), (10, "C0")):
            values: Any = [entry[f"{direction}_R@{k}"] for entry in entries]
            recalls.plot(places, values, style, color=colour, label=f"{direction} R@{k}")
    recalls.set(title="validation", xlabel="validation", ylabel="Recall@K, %", ylim=(0, None))
    recalls.legend(ncols=2, fontsize="small")
    for place, (before, after) in enumerate(itertools.pairwise(entries)):
        if before["stage"] != after["stage"]:
            for axes in (losses, recalls):
                axes.axvline(place + 1.5, color="grey", linewidth=0.8)
    for axes in (losses, recalls):
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    return image.getvalue()


def write_card(
    folder: Path,
    what: str,
    *,
    base: str,
    data: Sequence[str],
    figures: Sequence[tuple[str, dict[str, float]]],
    licence: str,
    made_by: str,
    use: str,
    notes: Sequence[str],
) -> None:
    """Writes `README.md` into a model's folder: what the next person must know of it.

    Args:
        data: a line for each set, with its split.
        figures: what was measured on, and the six recalls.
        made_by: the command.
    """
    lines = [
        f"# {folder.name}",
        "",
        what,
        "",
        f"- **Started from**: {base}",
        f"- **Made by**: `{made_by}`; its log and plot are in `training`",
        f"- **Terms**: {licence}",
        "",
        "## Trained on",
        "",
        *(f"- {line}" for line in data),
        "",
        "## Measured",
        "",
        f"| on | {' | '.join(name.replace('_', ' ') for name in _RECALLS)} |",
        f"|---|{'---|' * 6}",
        *(
            f"| {name} | {' | '.join(f'{recall[field]:.1f}' for field in _RECALLS)} |"
            for name, recall in figures
        ),
        "",
        "Recall@K in percent: the share of queries with a true answer among the first K, among the",
        "pictures and captions of that split. t2i: a caption asks for its picture; i2t: a picture",
        "asks for one of its captions.",
        "",
        "## Use",
        "",
        f"    {use}",
        "",
        *notes,
    ]
    write_durably(folder / "README.md", ("\n".join(lines).rstrip() + "\n").encode())

"""Projection heads over a frozen model, or over two files of vectors, by contrast."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmsearch.encoders.base import Encoder
from mmsearch.encoders.registry import ALIGNED, HEADS, cached_files, parse_model
from mmsearch.evaluation.ranking import (
    CUTOFFS,
    Difference,
    both_ranks,
    both_recalls,
    gain_line,
    recall_gain,
)
from mmsearch.networks.aligned import AlignedHeads, HeadKind, HeadsConfig
from mmsearch.store.files import write_durably
from mmsearch.training.batches import Source
from mmsearch.training.losses import ContrastiveLoss
from mmsearch.training.recipe import Schedule
from mmsearch.training.runs import RUN, run_folder, save_weights, write_card
from mmsearch.training.sets import Features, read_array, unit
from mmsearch.training.trainer import Setting, Trainer
from mmsearch.training.views import CachedViews
from mmsearch.types import Notify, OnProgress, no_progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlignSettings:
    """How heads learn."""

    head: HeadKind = "linear"
    dim: int | None = None
    """The width of the shared space; None is the smaller of the two."""
    epochs: int = 30
    batch: int | None = None
    """Pairs in a step; None is an eighth of the images, 32 to 512."""
    rate: float = 1e-3
    decay: float = 0.1
    dropout: float = 0.1
    ema: float = 0.99
    seed: int = 0


@dataclass(frozen=True)
class AlignReport:
    """What came of it, on pictures that were neither trained on nor chosen by."""

    folder: Path | None
    """Where the model is; None where it does not help and was not kept."""
    before: dict[str, float] | None
    """The six recalls without heads; None where the widths differ."""
    after: dict[str, float]
    gains: dict[str, Difference] | None
    """The difference of each recall, with its 95% interval, in points."""
    overall: Difference | None
    """The difference of the mean of the six."""
    images: dict[str, int]
    """How many images each split had."""


def train_heads(
    features: Features,
    settings: AlignSettings,
    folder: Path,
    *,
    run: str,
    on_progress: OnProgress = no_progress,
    notify: Notify = log.info,
) -> AlignedHeads:
    """The heads that do best on the validation images; a stopped run resumes.

    Args:
        folder: where the run keeps its state.
        run: a name for what the weights depend on besides the settings.
    """
    image_width, text_width = features.images.shape[1], features.texts.shape[1]
    dim = settings.dim or min(image_width, text_width)
    torch.manual_seed(settings.seed)
    heads = AlignedHeads(HeadsConfig(image_width, text_width, dim, settings.head, settings.dropout))
    train, val = (
        Source(split, CachedViews([torch.from_numpy(one.images[:, None])]), one.texts_by_image())
        for split, one in (("train", features.of("train")), ("val", features.of("val")))
    )
    wanted = settings.batch or min(512, max(32, len(train.images) // 8))
    folder.mkdir(parents=True, exist_ok=True)
    identity = hashlib.sha256(json.dumps([run, dataclasses.asdict(settings)]).encode())
    identity.update(json.dumps(features.splits).encode())
    for part in (features.images, features.texts, features.owner):
        identity.update(np.ascontiguousarray(part).tobytes())
    trainer = Trainer(
        heads,
        [train],
        val,
        Schedule(
            name="heads", epochs=settings.epochs, batch=min(wanted, len(train.images)),
            rate=settings.rate, decay=settings.decay, warmup=20,
            input_dropout={"image": settings.dropout, "text": settings.dropout},
        ),
        Setting(seed=settings.seed, ema=settings.ema),
        ContrastiveLoss(),
        folder,
        run=identity.hexdigest()[:16],
        on_progress=on_progress,
        notify=notify,
    )  # fmt: skip
    outcome = trainer.fit()
    heads.load_state_dict(outcome.state)
    return heads.eval()


def compare(heads: AlignedHeads, held_out: Features) -> AlignReport:
    """Held-out recalls with and without the heads."""
    with torch.inference_mode():
        images = heads.encode_image(torch.from_numpy(held_out.images), normalize=True)
        texts = heads.encode_text(torch.from_numpy(held_out.texts), normalize=True)
    new = both_ranks(images.numpy(), texts.numpy(), held_out.owner)
    after = both_recalls(new)
    if held_out.images.shape[1] != held_out.texts.shape[1]:
        return AlignReport(None, None, after, None, None, {})
    old = both_ranks(held_out.images, held_out.texts, held_out.owner)
    clusters = {"t2i": held_out.owner, "i2t": np.arange(len(held_out.images))}
    both = {way: (new[way], old[way], clusters[way]) for way in new}
    gains = {f"{way}_R@{k}": recall_gain(both[way], cutoffs=[k]) for way in both for k in CUTOFFS}
    overall = recall_gain(*both.values())
    return AlignReport(None, both_recalls(old), after, gains, overall, {})


def align(
    features: Features,
    settings: AlignSettings,
    folder: Path,
    *,
    base: Encoder | None,
    name: str,
    data: str,
    keep: bool = False,
    restart: bool = False,
    files: tuple[Path, Path] | None = None,
    on_progress: OnProgress = no_progress,
    notify: Notify = log.info,
) -> AlignReport:
    """Learns heads, measures them on the held-out images, and keeps them if they help.

    They help where the 95% interval of the mean recall's gain lies above nothing; where there
    is nothing to compare with (widths that differ), they are kept.

    Args:
        folder: the model's folder.
        base: the frozen model; None where the vectors come from elsewhere.
        name: what `--model` takes it by, for its card.
        data: what was trained on, in words.
        restart: forget what an earlier run left in the folder.
        files: the texts' and the images' vectors as files, to be written into the folder
            aligned, as `text.npy` and `image.npy`.

    Raises:
        UsageError: the folder holds something else.
        TrainingError: a run that diverged, or another run's state in the folder.
        Interrupted: by Ctrl-C.
    """
    uses = cached_files(parse_model(base.spec.model)) if base is not None else files
    with run_folder(folder, restart=restart, uses=uses or ()):
        run = base.spec.space if base is not None else "features"
        heads = train_heads(
            features, settings, folder / RUN, run=run, on_progress=on_progress, notify=notify
        )
        counts = {split: features.splits.count(split) for split in ("train", "val", "test")}
        report = dataclasses.replace(compare(heads, features.of("test")), images=counts)
        if not keep and report.overall is not None and not report.overall.is_gain:
            return report
        report = dataclasses.replace(report, folder=folder)
        save_weights(folder / HEADS, heads.state_dict())
        _write_card(report, base, folder, name, data, settings)
        if files is not None:
            _write_aligned(heads, folder, *files)
        manifest: dict[str, Any] = {
            "version": 1,
            "base": base.spec.model if base is not None else None,
            "space": base.spec.space if base is not None else None,
            "heads": dataclasses.asdict(heads.config),
        }
        # Last: by it the folder is a model.
        write_durably(folder / ALIGNED, (json.dumps(manifest, indent=2) + "\n").encode())
        return report


def _write_card(
    report: AlignReport,
    base: Encoder | None,
    folder: Path,
    name: str,
    data: str,
    settings: AlignSettings,
) -> None:
    counts = report.images
    held_out = f"held-out pictures ({counts['test']})"
    figures = [(f"{held_out}, with the heads", report.after)]
    notes = []
    if report.before is not None and report.overall is not None:
        figures.insert(0, (f"{held_out}, without", report.before))
        gain = gain_line(report.overall)
        notes = [f"The mean of the six changes by {gain} (paired bootstrap over pictures)."]
    licence = base.spec.licence if base is not None else "that of the vectors"
    write_card(
        folder,
        f"Projection heads ({settings.head}) trained to bring pictures and captions closer "
        "together than the model below them does, on data like this.",
        base=f"`{base.spec.model}`, frozen" if base is not None else "vectors from elsewhere",
        data=[f"{data}: {counts['train']} pictures; {counts['val']} more chose the epoch"],
        figures=figures,
        licence=f"those of the base ({licence}), and of the data",
        made_by="mmsearch train align",
        use=(
            f"mmsearch index FOLDER --model {name}" if base is not None
            else "the aligned vectors are in `text.npy` and `image.npy`"
        ),
        notes=notes,
    )  # fmt: skip


def _write_aligned(heads: AlignedHeads, folder: Path, text: Path, image: Path) -> None:
    with torch.inference_mode():
        for name, path, encode in (
            ("text.npy", text, heads.encode_text), ("image.npy", image, heads.encode_image),
        ):  # fmt: skip
            rows = torch.from_numpy(unit(read_array(path)))
            content = io.BytesIO()
            np.save(content, encode(rows, normalize=True).numpy())
            write_durably(folder / name, content.getvalue())

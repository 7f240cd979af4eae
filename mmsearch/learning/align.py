"""Projection heads over a frozen model, or over two files of vectors, by contrast."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmsearch.datasets.labelled import LabelledImage
from mmsearch.encoders.base import Encoder
from mmsearch.encoders.registry import ALIGNED, HEADS, cached_files, parse_model, read_aligned
from mmsearch.errors import LabelsError, ModelNotFound, UsageError
from mmsearch.evaluation.ranking import CUTOFFS, Difference, paired_difference
from mmsearch.learning.batches import Source
from mmsearch.learning.card import Card, write_card
from mmsearch.learning.checkpoint import load_weights, save_weights
from mmsearch.learning.embedding import embed_pictures, embed_texts
from mmsearch.learning.losses import ContrastiveLoss
from mmsearch.learning.recipe import Schedule
from mmsearch.learning.runs import RUN, run_folder
from mmsearch.learning.trainer import Setting, Trainer
from mmsearch.learning.validation import Validation, ranks_of, recalls
from mmsearch.networks.aligned import AlignedHeads, HeadsConfig
from mmsearch.networks.projection import HeadKind
from mmsearch.store.files import write_durably
from mmsearch.types import Progress, Vectors

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]
Notify = Callable[[str], None]

_HELD_OUT = 0.1
_LEAST = 10  # images of a split: fewer measure nothing


@dataclass(frozen=True)
class Features:
    """Vectors of images (n, a) and of texts (c, b), each of length 1; widths may differ."""

    images: Vectors
    texts: Vectors
    owner: np.ndarray
    """For each text, the row of its image, (c,), ascending."""
    splits: tuple[str, ...]
    """The split of each image: "train", "val" or "test"."""

    def of(self, split: str) -> Features:
        """The images of one split with their texts."""
        rows = np.array([place for place, name in enumerate(self.splits) if name == split], int)
        place_of = np.full(len(self.images), -1)
        place_of[rows] = np.arange(len(rows))
        kept = place_of[self.owner] >= 0
        return Features(
            self.images[rows], self.texts[kept], place_of[self.owner[kept]], (split,) * len(rows)
        )

    def texts_by_image(self) -> list[torch.Tensor]:
        """For each image its texts, (texts, b)."""
        counts = np.bincount(self.owner, minlength=len(self.images))
        return list(torch.from_numpy(self.texts).split(counts.tolist()))


@dataclass(frozen=True)
class AlignSettings:
    """How heads learn."""

    head: HeadKind = "linear"
    dim: int | None = None
    """The width of the shared space; None is the smaller of the two."""
    epochs: int = 30
    batch: int = 512
    rate: float = 1e-3
    decay: float = 0.1
    dropout: float = 0.1
    ema: float = 0.99
    seed: int = 0


@dataclass(frozen=True)
class AlignReport:
    """What came of it, on pictures that were neither learned from nor chosen by."""

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


class _Rows:
    """Feature vectors as a source's pictures."""

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = torch.from_numpy(np.ascontiguousarray(vectors))

    def __len__(self) -> int:
        return len(self._vectors)

    def load(self, place: int, seed: int) -> torch.Tensor:  # noqa: ARG002 - vectors have no views
        return self._vectors[place]


# -- where the vectors come from -------------------------------------------------------------


def embed_set(
    encoder: Encoder,
    folder: Path,
    images: Sequence[LabelledImage],
    cache: Path,
    seed: int,
    on_progress: OnProgress = lambda progress: None,
) -> tuple[Features, list[str]]:
    """The frozen model's vectors of a labelled set, from `cache` where they were kept.

    Returns the features and the files that could not be used.
    """
    images = [image for image in images if image.captions]
    files = [folder / image.file for image in images]
    vectors, good = embed_pictures(encoder, files, cache, "embedding pictures", on_progress)
    usable = [image for image, fine in zip(images, good, strict=True) if fine]
    bad = [image.file for image, fine in zip(images, good, strict=True) if not fine]
    if not usable:
        raise LabelsError(f"{folder}: none of the set's {len(images)} captioned pictures is usable")
    texts = [text for image in usable for text in image.captions]
    owner = np.repeat(np.arange(len(usable)), [len(image.captions) for image in usable])
    found = embed_texts(encoder, texts, cache, "embedding captions", on_progress)
    return Features(vectors, found, owner, _splits([i.split for i in usable], seed)), bad


def read_features(text: Path, image: Path, seed: int) -> Features:
    """Two files of vectors that come from elsewhere: row i of one belongs to row i of the other.

    Image rows that are equal are one image with several texts, so that no image is both
    learned from and measured on.

    Raises:
        UsageError: not two arrays (n, a) and (n, b) of finite numbers.
    """
    texts, images = _read_array(text), _read_array(image)
    if len(texts) != len(images):
        raise UsageError(
            f"{text} has {len(texts)} rows and {image} {len(images)}: row i of one must belong to "
            "row i of the other"
        )
    _, first, which = np.unique(images, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    owner = which.reshape(-1)[order]
    splits = _splits([""] * len(first), seed)
    return Features(_unit(images[first]), _unit(texts[order]), owner, splits)


def _read_array(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path}: not an array that NumPy can load: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
        raise UsageError(f"{path}: not an array of numbers with two dimensions (rows, width)")
    found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise UsageError(f"{path}: holds values that are no finite numbers")
    zeros = np.flatnonzero(~found.any(axis=1))
    if len(zeros):
        raise UsageError(
            f"{path}: {len(zeros)} rows hold only zeros, which point nowhere (the first is row "
            f"{zeros[0]}); leave them out of both files"
        )
    return found


def _unit(vectors: np.ndarray) -> Vectors:
    # Squares of very small and of very large numbers do not fit into float32.
    rows = vectors.astype(np.float64)
    found: Vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return found


def _splits(names: Sequence[str], seed: int) -> tuple[str, ...]:
    """The set's own splits; a tenth of its other pictures for each of val and test that it lacks.

    What the set holds out is never learned from: its figures would be worth nothing any more.
    """
    known = {"val": "val", "dev": "val", "valid": "val", "validation": "val", "test": "test"}
    found = [known.get(name.lower(), "train") for name in names]
    learnable = [place for place, split in enumerate(found) if split == "train"]
    order = iter(np.random.default_rng(seed).permutation(learnable))
    size = int(_HELD_OUT * len(learnable))
    for split in ("val", "test"):
        own = found.count(split)
        for place in itertools.islice(order, 0 if own else size):
            found[place] = split
        if found.count(split) < _LEAST:
            held = f"the set's own split has {own}" if own else "a tenth is held out for it"
            raise UsageError(
                f"{len(found)} captioned pictures are too few for '{split}' ({held}): fewer than "
                f"{_LEAST} pictures measure nothing"
            )
    if "train" not in found:
        raise UsageError(f"all {len(found)} captioned pictures are held out: none to learn from")
    return tuple(found)


# -- learning --------------------------------------------------------------------------------


def learn_heads(
    features: Features,
    settings: AlignSettings,
    folder: Path,
    *,
    run: str,
    on_progress: OnProgress = lambda progress: None,
    notify: Notify = log.info,
) -> AlignedHeads:
    """The heads that do best on the validation images; a stopped run goes on where it was.

    Args:
        folder: where the run keeps its state.
        run: a name for what the weights depend on besides the settings.
    """
    image_width, text_width = features.images.shape[1], features.texts.shape[1]
    dim = settings.dim or min(image_width, text_width)
    torch.manual_seed(settings.seed)
    heads = AlignedHeads(HeadsConfig(image_width, text_width, dim, settings.head, settings.dropout))
    train, val = features.of("train"), features.of("val")
    folder.mkdir(parents=True, exist_ok=True)
    identity = hashlib.sha256(json.dumps([run, dataclasses.asdict(settings)]).encode())
    identity.update(json.dumps(features.splits).encode())
    for part in (features.images, features.texts, features.owner):
        identity.update(np.ascontiguousarray(part).tobytes())
    trainer = Trainer(
        heads,
        [Source("train", _Rows(train.images), train.texts_by_image())],
        Validation(_Rows(val.images), val.texts_by_image()),
        Schedule(
            name="heads", epochs=settings.epochs, batch=min(settings.batch, len(train.images)),
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


def project(heads: AlignedHeads, features: Features) -> tuple[Vectors, Vectors]:
    """Images and texts in the shared space, unit vectors."""
    with torch.inference_mode():
        images = heads.encode_image(torch.from_numpy(features.images), normalize=True)
        texts = heads.encode_text(torch.from_numpy(features.texts), normalize=True)
    return images.numpy(), texts.numpy()


def compare(heads: AlignedHeads, held_out: Features) -> AlignReport:
    """Held-out recalls with and without the heads."""
    images, texts = project(heads, held_out)
    new = ranks_of(images, texts, held_out.owner)
    after = recalls(new)
    if held_out.images.shape[1] != held_out.texts.shape[1]:
        return AlignReport(None, None, after, None, None, {})
    old = ranks_of(held_out.images, held_out.texts, held_out.owner)
    before = recalls(old)
    clusters = {"t2i": held_out.owner, "i2t": np.arange(len(held_out.images))}
    gains = {
        f"{way}_R@{k}": paired_difference(
            100.0 * (old[way] <= k), 100.0 * (new[way] <= k), clusters[way]
        )
        for way in ("t2i", "i2t")
        for k in CUTOFFS
    }
    overall = paired_difference(
        _by_image(old, held_out.owner), _by_image(new, held_out.owner), clusters["i2t"]
    )
    return AlignReport(None, before, after, gains, overall, {})


def _by_image(ranks: dict[str, np.ndarray], owner: np.ndarray) -> np.ndarray:
    """For each image the mean of its six recalls, its texts' first averaged."""
    found = np.zeros(len(ranks["i2t"]))
    counts = np.bincount(owner, minlength=len(found))
    for k in CUTOFFS:
        texts = np.bincount(owner, weights=100.0 * (ranks["t2i"] <= k), minlength=len(found))
        found += texts / np.maximum(counts, 1) + 100.0 * (ranks["i2t"] <= k)
    return found / (2 * len(CUTOFFS))


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
    on_progress: OnProgress = lambda progress: None,
    notify: Notify = log.info,
) -> AlignReport:
    """Learns heads, measures them on the held-out images, and keeps them if they help.

    They help where the 95% interval of the mean recall's gain lies above nothing; where there
    is nothing to compare with (widths that differ), they are kept.

    Args:
        folder: the model's folder.
        base: the frozen model; None where the vectors come from elsewhere.
        name: what `--model` takes it by, for its card.
        data: what was learned from, in words.
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
        heads = learn_heads(
            features, settings, folder / RUN, run=run, on_progress=on_progress, notify=notify
        )
        counts = {split: features.splits.count(split) for split in ("train", "val", "test")}
        report = dataclasses.replace(compare(heads, features.of("test")), images=counts)
        if not keep and report.overall is not None and not report.overall.is_gain:
            return report
        report = dataclasses.replace(report, folder=folder)
        save_weights(folder / HEADS, heads.state_dict())
        write_card(folder, _card(report, base, folder, name, data, settings))
        if files is not None:
            _write_aligned(heads, folder, *files)
        manifest: dict[str, Any] = {
            "version": 1,
            "base": base.spec.model if base is not None else None,
            "space": base.spec.space if base is not None else None,
            "heads": heads.config.to_json(),
        }
        # Last: by it the folder is a model.
        write_durably(folder / ALIGNED, (json.dumps(manifest, indent=2) + "\n").encode())
        return report


def _card(
    report: AlignReport,
    base: Encoder | None,
    folder: Path,
    name: str,
    data: str,
    settings: AlignSettings,
) -> Card:
    counts = report.images
    held_out = f"held-out pictures ({counts['test']})"
    figures = [(f"{held_out}, with the heads", report.after)]
    notes = []
    if report.before is not None and report.overall is not None:
        figures.insert(0, (f"{held_out}, without", report.before))
        gain = gain_line(report.overall)
        notes = [f"The mean of the six changes by {gain} (paired bootstrap over pictures)."]
    licence = base.spec.licence if base is not None else "that of the vectors"
    return Card(
        name=folder.name,
        what=f"Projection heads ({settings.head}) that bring pictures and captions closer together "
        "than the model below them does, on data like this.",
        base=f"`{base.spec.model}`, frozen" if base is not None else "vectors from elsewhere",
        data=[f"{data}: {counts['train']} pictures; {counts['val']} more chose the epoch"],
        figures=figures,
        licence=f"those of the base ({licence}), and of the data",
        made_by="`mmsearch train align`; its log and plot are in `training`",
        use=(
            f"mmsearch index FOLDER --model {name}" if base is not None
            else "the aligned vectors are in `text.npy` and `image.npy`"
        ),
        notes=notes,
    )  # fmt: skip


def gain_line(gain: Difference) -> str:
    """A difference for people, in points."""
    return f"{gain.mean:+.1f} points [{gain.low:+.1f}, {gain.high:+.1f}]"


def load_heads(folder: Path) -> AlignedHeads:
    """The heads in a model's folder, to project vectors with (`encode_image`, `encode_text`).

    Raises:
        ModelNotFound: there are none.
    """
    aligned = read_aligned(folder)
    if aligned is None:
        raise ModelNotFound(f"{folder}: no {ALIGNED} there, so it holds no heads")
    heads = AlignedHeads(HeadsConfig.from_json(aligned.heads))
    heads.load_state_dict(load_weights(folder / HEADS))
    return heads.eval()


def _write_aligned(heads: AlignedHeads, folder: Path, text: Path, image: Path) -> None:
    with torch.inference_mode():
        for name, path, encode in (
            ("text.npy", text, heads.encode_text), ("image.npy", image, heads.encode_image),
        ):  # fmt: skip
            rows = torch.from_numpy(_unit(_read_array(path)))
            content = io.BytesIO()
            np.save(content, encode(rows, normalize=True).numpy())
            write_durably(folder / name, content.getvalue())

"""Embeddings in and out: clip-retrieval's layout, which embedding-reader and autofaiss read.

    img_emb/img_emb_0.npy            image vectors, a row for each pair of image and caption
    text_emb/text_emb_0.npy          caption vectors, zeros where an image has no caption
    metadata/metadata_0.parquet      image_path and caption, in the same order

An image with several captions stands in several rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmsearch.datasets.sidecar import clean_captions
from mmsearch.errors import LabelsError, SpaceError, UsageError
from mmsearch.jobs.runner import Runner
from mmsearch.media.fingerprint import NEVER, content_hash
from mmsearch.media.media_types import is_image_name
from mmsearch.media.sandbox import Decoders
from mmsearch.store.paths import canonical, relative
from mmsearch.store.rows import (
    FILE,
    CaptionRecord,
    MediaRecord,
    RootRow,
    SegmentRecord,
    SpaceRow,
    stored_time,
)
from mmsearch.store.store import Store
from mmsearch.store.writer import Writer
from mmsearch.types import IMAGE, MOST, EncoderSpec, Facts, OnProgress, Progress, Vectors

_SPACE_KEY = b"mmsearch.space"
_MODEL_KEY = b"mmsearch.model"
_SOURCE = re.compile(r"sidecar|file(:[0-9a-f]{16})?")


def export_embeddings(store: Store, folder: Path) -> int:
    """Writes every image with its captions and vectors; returns how many images.

    Raises:
        UsageError: the folder holds other things already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: not an empty folder; name a new one")
    space = store.active_space()
    if space is None:
        raise UsageError(f"{store.folder}: the index is empty, there is nothing to export")
    held = store.contents()
    captions: dict[int, list[int]] = {}
    for row, media_id in enumerate(held.caption_media.tolist()):
        captions.setdefault(media_id, []).append(row)
    pairs = [
        (row, caption)
        for row, media_id in enumerate(held.image_ids.tolist())
        for caption in captions.get(media_id, [-1])
    ]
    image_rows, caption_rows = np.array(pairs, np.int64).reshape(-1, 2).T
    texts = np.zeros((len(pairs), space.spec.dim), dtype=np.float32)
    captioned = caption_rows >= 0
    texts[captioned] = held.caption_vectors[caption_rows[captioned]]
    paths = [held.image_paths[row] for row in image_rows]
    facts = [held.image_facts[row] for row in image_rows]
    table = pa.table(
        {
            "image_path": [path.decode("utf-8", "replace") for path in paths],
            "caption": [held.caption_texts[row] if row >= 0 else "" for row in caption_rows],
            # What follows is ours: it makes an import the same index again.
            "path_bytes": paths,
            "caption_source": [
                held.caption_sources[row] if row >= 0 else "" for row in caption_rows
            ],
            "width": [one.width for one in facts],
            "height": [one.height for one in facts],
            "captured": [one.captured and stored_time(one.captured) for one in facts],
            "captured_from": [one.captured_from for one in facts],
        }
    ).replace_schema_metadata(
        {_SPACE_KEY: space.spec.space.encode(), _MODEL_KEY: space.spec.model.encode()}
    )
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "img_emb/img_emb_0.npy", held.image_vectors[image_rows])
    np.save(folder / "text_emb/text_emb_0.npy", texts)
    pq.write_table(table, folder / "metadata/metadata_0.parquet")
    return len(held.image_ids)


@dataclass
class Incoming:
    """An image of an export: its absolute path, its vector, its captions with theirs."""

    path: bytes
    vector: NDArray[np.float32]
    captions: list[CaptionRecord]
    facts: Facts | None


def import_embeddings(
    writer: Writer,
    spec: EncoderSpec,
    images: dict[bytes, Incoming],
    runner: Runner,
    *,
    on_progress: OnProgress,
) -> int:
    """Adds images with ready-made vectors; images that the index has already stay as they are."""
    if not images:
        return 0
    space = writer.space_of(spec, "imported")
    roots, known = writer.place(list(images))
    waiting = [one for path, one in images.items() if path not in known]
    job = _ImportJob(writer, space, waiting, roots, runner.decoders, on_progress)
    runner.run(job, len(waiting))
    writer.compact(only_if="short")
    return job.done


@dataclass
class _ImportJob:
    """Looks at the files of what is imported, and writes it."""

    writer: Writer
    space: SpaceRow
    images: Sequence[Incoming]
    roots: Mapping[bytes, RootRow]
    decoders: Decoders
    on_progress: OnProgress
    done: int = 0
    size: int = 64

    def missing(self) -> Iterator[Incoming]:
        return iter(self.images)

    def read(self, item: Incoming) -> MediaRecord:
        """A file that is an image here gets its stamp and hash, so that a rescan knows it."""
        stamp, digest = NEVER, content_hash(b"imported " + item.path)
        if is_image_name(item.path):
            with self.decoders.open(item.path) as file:
                if not file.reason:
                    stamp, digest = file.stamp, file.digest
        root = self.roots[item.path]
        path = relative(item.path, canonical(root.path))
        assert path is not None, "its root is above it by construction"
        return MediaRecord(
            root.id, path, stamp.size, stamp.mtime_ns, digest,
            item.facts or Facts(), [SegmentRecord(IMAGE, item.vector)], tuple(item.captions),
        )  # fmt: skip

    def compute(self, reads: Sequence[MediaRecord]) -> Sequence[MediaRecord]:
        return reads

    def commit(self, outcomes: Sequence[Sequence[MediaRecord]]) -> None:
        with self.writer.change() as change:
            for one in chain.from_iterable(outcomes):
                change.add_media(one, self.space)
                self.done += 1
        self.on_progress(Progress("import", self.done, len(self.images)))


def model_of(folder: Path) -> str | None:
    """The model that an export names; None where it was made by another program."""
    for path in sorted((folder / "metadata").glob("metadata_*.parquet")):
        try:
            stored = pq.read_schema(path).metadata or {}
        except (OSError, pa.ArrowException):
            return None
        return stored[_MODEL_KEY].decode("utf-8", "replace") if _MODEL_KEY in stored else None
    return None


def read_embeddings(folder: Path, spec: EncoderSpec) -> dict[bytes, Incoming]:
    """The images of an export with their vectors, by absolute path.

    Raises:
        LabelsError: the layout is not whole, or its parts do not fit each other.
        SpaceError: the vectors come from another model.
    """
    found: dict[bytes, Incoming] = {}
    real = cache(os.path.realpath)  # once a folder, not once a row
    for images, texts, table in _parts(folder):
        _check_part(images, texts, table, spec, folder)
        for row, values in enumerate(table.to_pylist()):
            place, name = os.path.split(_path(values, folder, row))
            path = os.path.join(real(place), name)
            one = found.setdefault(path, Incoming(path, _unit(images[row]), [], _facts(values)))
            cleaned = clean_captions([str(values.get("caption") or "")])
            if texts is not None and cleaned and np.any(texts[row]):
                origin = str(values.get("caption_source"))
                origin = origin if _SOURCE.fullmatch(origin) else FILE
                one.captions.append(CaptionRecord(cleaned[0], origin, _unit(texts[row])))
    return found


def _path(values: dict[str, Any], folder: Path, row: int) -> bytes:
    """Where a row's image lies: its absolute path."""
    name = values.get("path_bytes") or values["image_path"]
    name = os.fsencode(name) if isinstance(name, str) else name
    if not isinstance(name, bytes) or not name or b"\0" in name:
        raise LabelsError(f"{folder}: row {row} of the metadata names no image")
    return os.path.abspath(os.path.join(os.fsencode(folder), name))


def _facts(values: dict[str, Any]) -> Facts | None:
    """What our own exports say of an image; None for those of others, and for nonsense."""
    try:
        width, height = int(values["width"]), int(values["height"])
        captured = datetime.fromisoformat(values["captured"])
        source = {"exif": "exif", "mtime": "mtime"}[values["captured_from"]]
    except (KeyError, TypeError, ValueError):
        return None
    is_size = min(width, height) >= 0 and max(width, height) <= MOST
    return Facts(width, height, captured, captured_from=source) if is_size else None


def _parts(folder: Path) -> Iterator[tuple[Vectors, Vectors | None, pa.Table]]:
    files = sorted((folder / "img_emb").glob("img_emb_*.npy"), key=_number)
    if not files:
        raise LabelsError(f"{folder}: no img_emb/img_emb_0.npy there; name the folder above it")
    for path in files:
        number = path.stem.removeprefix("img_emb_")  # as it is written: "0" or "00"
        texts = folder / f"text_emb/text_emb_{number}.npy"
        metadata = folder / f"metadata/metadata_{number}.parquet"
        try:
            yield (
                np.load(path, mmap_mode="r", allow_pickle=False),
                np.load(texts, mmap_mode="r", allow_pickle=False) if texts.is_file() else None,
                pq.read_table(metadata),
            )
        except Exception as error:
            # NumPy and Arrow answer files that are not what they say with nearly anything.
            raise LabelsError(f"{folder}: part {number} cannot be read: {error}") from error


def _number(path: Path) -> int:
    match = re.search(r"(\d+)$", path.stem)
    return int(match[1]) if match else 0


def _check_part(
    images: Vectors, texts: Vectors | None, table: pa.Table, spec: EncoderSpec, folder: Path
) -> None:
    stored = table.schema.metadata or {}
    if stored.get(_SPACE_KEY, spec.space.encode()) != spec.space.encode():
        model = stored.get(_MODEL_KEY, b"another model").decode("utf-8", "replace")
        raise SpaceError(
            f"{folder}: these vectors come from '{model}', this index uses '{spec.model}'; "
            f"import into a new index with --model {model}"
        )
    if images.ndim != 2 or images.shape[1] != spec.dim:
        raise SpaceError(
            f"{folder}: image vectors of shape {images.shape}; those of '{spec.model}' have "
            f"{spec.dim} numbers"
        )
    if "image_path" not in table.column_names:
        raise LabelsError(f"{folder}: the metadata has no column image_path")
    if len(images) != table.num_rows or (texts is not None and texts.shape != images.shape):
        raise LabelsError(f"{folder}: vectors and metadata have different numbers of rows")


def _unit(row: NDArray[np.floating]) -> NDArray[np.float32]:
    vector = np.asarray(row, dtype=np.float32)
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0:
        raise LabelsError("a vector of zeros or of no numbers: the export is damaged")
    return vector / np.float32(length)

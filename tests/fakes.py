"""Small doubles: an encoder that needs no weights, and pictures to feed it."""

from __future__ import annotations

import atexit
import hashlib
import threading
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mmsearch.encoders.patch_encoder import PatchEmbeddings, Tokens
from mmsearch.errors import ModelNotFound, UsageError
from mmsearch.ingest.pipeline import Pipeline
from mmsearch.jobs.runner import BATCH, Runner
from mmsearch.media.sandbox import Decoders
from mmsearch.media.source import LocalFiles
from mmsearch.search.candidates import find_candidates
from mmsearch.search.searcher import Searcher
from mmsearch.store.rows import CaptionRecord, MediaRecord, SegmentRecord
from mmsearch.types import EncoderSpec, Facts, Filter, Preprocess, no_progress

DIM = 16
#: For all tests of one process.
DECODERS = Decoders()
atexit.register(DECODERS.close)
WORDS = ("red", "green", "blue", "yellow", "white", "black")
_COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}


class WatchedFiles:
    """This machine's files, as a source of `Decoders`; `look` is told of each that is opened.

    What it raises is what comes of the file.
    """

    def __init__(self, look) -> None:
        self._look = look

    def open(self, path):
        self._look(path)
        return LocalFiles().open(path)


class FakeEncoder:
    """Texts and pictures meet by colour: a text's vector is that of the colours it names."""

    precision = "fp32"

    def __init__(self, name: str = "fake") -> None:
        self.spec = EncoderSpec(
            model=name,
            space=hashlib.sha256(name.encode()).hexdigest()[:32],
            dim=DIM,
            inputs={
                "image": asdict(Preprocess((8, 8), (0.0,) * 3, (1.0,) * 3, resize_mode="squash")),
                "text": {"context_length": 77, "tokenizer": "clip"},
            },
        )
        self.basis = np.random.default_rng(7).normal(size=(4, DIM)).astype(np.float32)
        self.images_encoded = 0
        self._lock = threading.Lock()

    batch = 4

    def with_streams(self, count):
        return self

    def warm_up(self, modality, *, wait=True):
        pass

    def encode(self, modality, batch):
        return self.texts(batch) if modality == "text" else self.images(np.asarray(batch))

    def images(self, pixels):
        with self._lock:
            self.images_encoded += len(pixels)
        mean = pixels.reshape(len(pixels), -1, 3).mean(axis=1) / 255
        return self._unit(mean)

    def texts(self, texts):
        rows = []
        for text in texts:
            named = [_COLOURS[word] for word in WORDS if word in text.lower()]
            digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
            other = np.frombuffer(digest[:3], np.uint8)
            rows.append(np.mean(named, axis=0) if named else other)
        return self._unit(np.array(rows, dtype=np.float32).reshape(-1, 3) / 255)

    def _unit(self, colours):
        # The fourth coordinate keeps black from being the zero vector.
        full = np.concatenate([colours, np.full((len(colours), 1), 0.3)], axis=1)
        vectors = full.astype(np.float32) @ self.basis
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class FakeClock:
    """Tells seconds, which pass only when a test adds them to `now`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeProvider:
    """Gives encoders by the names of their models; the first for "auto"."""

    def __init__(self, *encoders):
        self.encoders = {one.spec.model: one for one in encoders}
        self.with_patches = {*self.encoders}

    def for_new_index(self, model, device):
        return self.encoders[next(iter(self.encoders)) if model == "auto" else model]

    def for_space(self, spec, device):
        if spec.model not in self.encoders:
            raise ModelNotFound("not here")
        return self.encoders[spec.model]

    def is_of(self, name, spec):
        return name == spec.model

    def checked(self, encoder, count, sample):
        return encoder

    def patch_encoder_of(self, spec):
        if spec.model not in self.with_patches:
            raise UsageError("a model whose patches cannot be read")
        return FakePatchEncoder(self.encoders[spec.model])


class FakePatchEncoder:
    """Looks at the four corners of a picture and at each word of a text."""

    def __init__(self, encoder: FakeEncoder | None = None) -> None:
        self._encoder = encoder or FakeEncoder()
        self.spec = self._encoder.spec
        self.preprocess = self.spec.preprocess
        self.looked = 0

    def encode(self, pixels):
        self.looked += len(pixels)
        corners = [pixels[:, :4, :4], pixels[:, :4, 4:], pixels[:, 4:, :4], pixels[:, 4:, 4:]]
        patches = np.stack([self._encoder.encode("image", corner) for corner in corners], axis=1)
        return PatchEmbeddings(self._encoder.encode("image", pixels[:, ::-1, ::-1]), patches)

    def tokens(self, texts):
        words = [text.split() or [""] for text in texts]
        longest = max(map(len, words), default=1)
        rows = np.zeros((len(texts), longest, DIM), np.float32)
        there = np.zeros((len(texts), longest), bool)
        for place, own in enumerate(words):
            rows[place, : len(own)] = self._encoder.encode("text", own)
            there[place, : len(own)] = True
        return Tokens(rows, there)


def paint(path: Path, colour: str, *, mark: int = 0, size=(40, 30)) -> Path:
    """Writes a picture of one colour; another `mark` makes other bytes of the same colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    if mark:
        ImageDraw.Draw(image).point((mark % size[0], mark // size[0] % size[1]), "gray")
    image.save(path)
    return path


def root_at(writer, folder: bytes):
    """The root of a folder, made where there is none."""
    path = folder + b"/any"
    return writer.place([path])[0][path]


def new_media(root, name, vector, *, captions=(), captured="2020-01-01T00:00:00", size=1):
    """A picture for the catalog; captions are texts with their vectors."""
    name = name if isinstance(name, bytes) else name.encode()
    return MediaRecord(
        root_id=root.id,
        path=name,
        size=size,
        mtime_ns=2,
        content_hash=name,
        facts=Facts(3, 4, datetime.fromisoformat(captured)),
        segments=[SegmentRecord("image", vector)],
        captions=[CaptionRecord(text, "file", row) for text, row in captions],
    )


def nearest(store, queries, to="image", k=10, where=None, *, exact=False):
    """What a search for vectors (q, dim) finds: a list of `Answer`s."""
    with store.reader() as reader:
        searcher = Searcher(reader, FakeEncoder())
        return searcher.rank(queries, to, k, where, exact=exact)


def searcher_over(store, encoder=None, *more, **options):
    """A searcher over a store as it is now; what it reads from is closed with it."""
    view = store.reader()
    found = Searcher(view.__enter__(), encoder or FakeEncoder(), *more, **options)
    found.view = view
    return found


def candidates(store, query, text, depth, where=Filter()):  # noqa: B008 - it never changes
    """The candidates of a query (dim,)."""
    with store.reader() as reader:
        return find_candidates(reader, query, text, depth, where)


def run_plan(
    store, writer, plan, encoder=None, *, workers=2, batch=BATCH, decoders=DECODERS,
    on_progress=no_progress,
):  # fmt: skip
    """Indexes the files of a plan."""
    runner = Runner(decoders, workers, batch)
    return Pipeline(store, writer, encoder or FakeEncoder(), runner, on_progress).run(plan)


def unit_vectors(rng: np.random.Generator, count: int, dim: int = DIM) -> np.ndarray:
    vectors = rng.normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

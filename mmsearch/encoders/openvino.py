"""The CPU runtime: models converted once into a cache, then run without torch.

A converted model is a folder named after its space:

    manifest.json    what is known of the model, and how far each precision agrees with torch, or
                     with fp32 where the model came as ONNX graphs
    image.xml, .bin  the image tower, u8 pixels in, unit vectors out; the second may be a link to
                     the model's own file of weights
    text.xml, .bin   the text tower, token ids in, unit vectors out; where the manifest says so,
                     ids that are cut after the longest text
    embeddings.npy   where the text tower takes the rows of this table, (tokens, width), for ids
    tokenizer.json   where the model's tokenizer runs without torch; merges.npy, and for SigLIP2's
                     kind letters.npy and few.json, are what the texts of a query take of it
    precisions.json  how fast and how exact each precision is on this machine, once it was seen
    image-int8.xml   the image tower in int8, where that was tried
    compiled/        OpenVINO's own cache for this CPU, by precision
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmsearch.config import available_cores
from mmsearch.encoders.base import Encoder, usable
from mmsearch.encoders.precision import (
    AGREEMENT,
    INT8_IMAGE,
    choose_precision,
    doubt,
    read_verdicts,
)
from mmsearch.encoders.registry import parse_model, stamp, write_json
from mmsearch.encoders.telemetry import without_telemetry
from mmsearch.encoders.tokenizer import (
    ClipTokenizer,
    FewWords,
    JsonTokenizer,
    Tokenize,
    read_tokenizer,
    trimmed,
)
from mmsearch.errors import UnreadableError, UsageError, extra, in_a_line
from mmsearch.types import TEXT, Batch, EncoderSpec, Modality, Pixels, Vectors

with without_telemetry():
    import openvino as ov

__all__ = ["Graph", "OpenVinoEncoder", "ov"]

if TYPE_CHECKING:
    from mmsearch.encoders.open_clip import ImageTower, LoadedModel, TextTower

# Whoever first asks OpenVINO for an array has it find NumPy, behind a lock of C++ that waits with
# Python's own lock held: two threads that ask at once wait for each other for ever. Modules are
# imported by one thread.
ov.Tensor(np.zeros(1, np.float32)).data  # noqa: B018 - for what it does once

#: Bumped when a converted model of an older program cannot be used any more.
EXPORT_VERSION = 5
EMBEDDINGS = "embeddings.npy"
#: Weights in int8 are what a model is; numbers in int8 between its layers are not.
NOT_QUANTISED: Mapping[str, Any] = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
_HINTS = {"fp32": "f32", "bf16": "bf16"}
_PROBES = 16
#: In the manifest of towers that link to their model's weights: these, their size and time.
_LINKED = "linked"
#: In the manifest of a text tower that is given rows of a table in its model's weights: where the
#: rows of int8 begin in that file, where what each is multiplied by (fp32), how many, how wide.
ROWS = "rows"


@functools.cache
def openvino_core() -> ov.Core:
    """The process's one OpenVINO core.

    OpenVINO's CPU plugin gives the thread that loads it an alternate signal stack, and puts the
    earlier one back when it goes. Two plugins that go in the order they came leave the thread
    with a stack that is no longer mapped, and the next signal with a Python handler (Ctrl-C, the
    end of a child) kills the process. One core that stays until the end cannot do that.
    """
    return ov.Core()


_compiling = threading.Lock()


def compile_graph(graph: Any, options: dict[str, Any]) -> Any:
    """Compiles a graph, or the file of one, for the CPU.

    One at a time: around its cache OpenVINO sets the locale of the whole process to "C" and back
    again, and two that do so at once can leave it there, or read numbers in another. For as long as
    that takes, a text file that another thread opens without an encoding is read in that locale.
    """
    with _compiling:
        return openvino_core().compile_model(graph, "CPU", options)


class Graph:
    """A graph that is compiled for the CPU. Threads may share it."""

    def __init__(
        self,
        model: Any,
        options: Mapping[str, Any] | None = None,
        *,
        threads: int = 0,
        precision: str = "fp32",
    ) -> None:
        """Takes a graph of OpenVINO's, or the file of one.

        Args:
            options: OpenVINO's, besides the precision; by default, all cores that this process may
                use work at one call.
            threads: how many call it at once, the others wait; by default as many as cores.

        Raises:
            RuntimeError: it is no graph, or there is too little memory.
        """
        shared = {"INFERENCE_NUM_THREADS": available_cores(), "PERFORMANCE_HINT": "LATENCY"}
        hint = {"INFERENCE_PRECISION_HINT": _HINTS[precision]}
        options = hint | dict(shared if options is None else options)
        compiled = compile_graph(model, options)
        rows = compiled.input(0).partial_shape[0]
        self._takes_one = bool(rows.is_static and rows.get_length() == 1)
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(threads or available_cores()):
            self._idle.put(compiled.create_infer_request())

    @classmethod
    def of_network(cls, graph: bytes, weights: bytes) -> Graph:
        """The graph that OpenVINO has in a model's two files.

        Raises:
            RuntimeError: they are none.
        """
        content = ov.Tensor(np.frombuffer(weights, np.uint8))
        return cls(openvino_core().read_model(graph, content))

    def __call__(self, *inputs: NDArray[Any]) -> list[NDArray[np.float32]]:
        """What it makes of a batch, all at once or, if it takes one only, one by one."""
        if self._takes_one and len(inputs[0]) > 1:
            each = [self(*(one[i : i + 1] for one in inputs)) for i in range(len(inputs[0]))]
            return [np.concatenate(parts) for parts in zip(*each, strict=True)]
        request = self._idle.get()
        try:
            found = request.infer([np.ascontiguousarray(one) for one in inputs])
            return [np.array(value, np.float32) for value in found.values()]
        finally:
            self._idle.put(request)


class Towers(ABC):
    """The converted towers of a model; each is compiled when it is first used.

    Threads may share them.
    """

    def __init__(self, name: str) -> None:
        """Takes what they are called in a message."""
        self._name = name
        self._lock = threading.Lock()
        self._towers: dict[str, Graph] = {}

    @abstractmethod
    def compile(self, tower: str) -> Graph:
        """Compiles a tower."""

    def run(self, tower: str, *inputs: NDArray[Any]) -> list[NDArray[np.float32]]:
        """What a tower makes of a batch, which is one array for each of its inputs.

        Raises:
            UnreadableError: it cannot be run here.
        """
        with _explaining(self._name):
            return self.ready(tower)(*inputs)

    def ready(self, tower: str) -> Graph:
        """A tower, compiled."""
        with self._lock:
            if tower not in self._towers:
                self._towers[tower] = self.compile(tower)
            return self._towers[tower]


class OpenVinoEncoder(Towers):
    """Runs a converted model."""

    #: Small batches stay in a core's cache: `tiny` takes a quarter less time than with 64.
    batch = 4

    def __init__(
        self,
        folder: Path,
        precision: str = "auto",
        streams: int = 1,
        *,
        name: str = "",
        language: str = "",
    ) -> None:
        """Takes a converted model's folder.

        Args:
            streams: how many threads encode at once. For one, all cores work at what it gives.
            name: what the model is called; the folder knows its space alone.
            language: that of the texts, for a model that takes one.
        """
        manifest = read_manifest(folder)
        self.spec = replace(EncoderSpec.from_json(manifest["spec"]), model=name or folder.name)
        agreement, verdicts = manifest["agreement"], read_verdicts(folder)
        about = self.spec.model, agreement, verdicts
        self.precision = choose_precision(precision, *about, capabilities())
        self.doubt = doubt(self.precision, *about)
        """Why its vectors are less exact than one would take; None where they are not."""
        # Int8 is for image towers; what is left of such a model runs in what it would without.
        rest = choose_precision("auto", self.spec.model, agreement, {}, capabilities())
        self._hint = _HINTS[rest if self.precision == "int8" else self.precision]
        self._cuts_texts = bool(manifest["cuts_texts"])
        self._takes_language = bool(manifest.get("takes_language"))
        self.folder = folder
        """Where the converted model lies."""
        self._streams, self._language = streams, language
        self._tokenizer: Tokenize | None = None
        self._loading = threading.Lock()
        self._table = _read_table(folder, manifest)
        super().__init__(f"'{self.spec.model}'")

    def with_streams(self, count: int) -> OpenVinoEncoder:
        if count == self._streams:
            return self
        return self._again(streams=count)

    def with_language(self, code: str) -> OpenVinoEncoder:
        if code == self._language or not self._takes_language:
            return self
        found = self._again(language=code)
        found.tokenize  # noqa: B018 - says now whether it knows the language
        return found

    def _again(self, **changed: Any) -> OpenVinoEncoder:
        same = {"streams": self._streams, "name": self.spec.model, "language": self._language}
        return OpenVinoEncoder(self.folder, self.precision, **{**same, **changed})

    def warm_up(self, modality: Modality, *, wait: bool = True) -> None:
        if modality in self._towers:
            return
        if wait:
            self.encode(modality, self._blank(modality))
        else:
            threading.Thread(target=self._warm_up_quietly, args=(modality,)).start()

    def _warm_up_quietly(self, tower: str) -> None:
        # Whoever encodes meets the same error, in a thread where it can be caught. What is going
        # to be encoded comes sooner than a blank would be done.
        with contextlib.suppress(Exception):
            self.ready(tower)

    def _blank(self, tower: str) -> Batch:
        """A batch as most will be: the first of a shape takes longer."""
        if tower == TEXT:
            return ["a photo"]
        count = self.batch if self._streams > 1 else 1
        return np.zeros((count, *self.spec.preprocess.size, 3), np.uint8)

    def encode(self, modality: Modality, batch: Batch) -> Vectors:
        if len(batch) == 0:
            return np.empty((0, self.spec.dim), dtype=np.float32)
        if modality == TEXT:
            ids = self.tokenize(list(batch))
            return self._run(modality, trimmed(ids) if self._cuts_texts else ids)
        return self._run(modality, np.ascontiguousarray(batch))

    def _run(self, tower: str, batch: NDArray[Any]) -> Vectors:
        (found,) = self.run(tower, batch, *(self.embeddings(batch) if tower == TEXT else ()))
        with np.errstate(invalid="ignore"):
            unit = found / np.linalg.norm(found, axis=1, keepdims=True)
        return usable(unit, self.spec.model, self.precision)

    def embeddings(self, ids: NDArray[Any]) -> list[Vectors]:
        """What the text tower is given besides ids: the embeddings of tokens, or nothing."""
        if self._table is None:
            return []
        rows, scales = self._table
        if ids.max() >= len(rows):
            raise UsageError(f"a text holds a token that '{self.spec.model}' does not know")
        return [rows[ids] if scales is None else rows[ids] * scales[ids]]

    def compile(self, tower: str) -> Graph:
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self._hint,
            # One for each precision. Where the towers of two are kept in one folder, what is
            # compiled second can be wrong: on CPUs with AMX, bf16 after fp32 gave no numbers. With
            # all weights in it: without (OPTIMIZE_SIZE), constants came back wrong in 2026.4.
            "CACHE_DIR": str(self.folder / "compiled" / self.precision),
            **NOT_QUANTISED,
        }
        if self._streams == 1:
            options["PERFORMANCE_HINT"] = "LATENCY"
        else:
            # A stream for each caller, so that no core waits for another in the midst of a batch.
            options |= {
                "NUM_STREAMS": self._streams,
                "INFERENCE_NUM_THREADS": max(self._streams, available_cores()),
            }
        name = f"{tower}.xml"
        if tower == "image" and self.precision == "int8":
            name = INT8_IMAGE
            if not (self.folder / name).is_file():
                raise UsageError(
                    f"'{self.spec.model}' has no int8 here yet: 'mmsearch index --precision int8' "
                    "makes it from the pictures that it indexes"
                )
        return Graph(self.folder / name, options, threads=self._streams)

    @property
    def tokenize(self) -> Tokenize:
        """Texts to ids, (n, context_length), zero where nothing is."""
        with self._loading:  # not the lock under which a tower is compiled meanwhile
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer()
            return self._tokenizer

    def _load_tokenizer(self) -> Tokenize:
        tokenizer, clean = self.folder / "tokenizer.json", self.spec.tokenizer_clean
        if self.spec.tokenizer == "json":
            return JsonTokenizer(tokenizer, clean, self._language)
        if self.spec.tokenizer == "clip":
            few = FewWords(self.folder / "merges.npy")
            whole = functools.partial(read_tokenizer, tokenizer)
            return ClipTokenizer(whole, self.spec.context_length, clean, few)
        with extra("torch", f"the tokenizer of '{self.spec.model}'"):
            from mmsearch.encoders.open_clip import own_tokenizer

        return own_tokenizer(parse_model(self.spec.model), self.spec.context_length)


def _read_table(
    folder: Path, manifest: Mapping[str, Any]
) -> tuple[NDArray[Any], Vectors | None] | None:
    """The table whose rows a text tower is given, mapped, and what they are multiplied by."""
    if (folder / EMBEDDINGS).is_file():
        return np.load(folder / EMBEDDINGS, mmap_mode="r"), None
    if ROWS not in manifest:
        return None
    rows_at, scales_at, count, width = manifest[ROWS]
    weights = folder / "text.bin"
    return (
        np.memmap(weights, np.int8, "r", rows_at, (count, width)),
        np.memmap(weights, np.float32, "r", scales_at, (count, 1)),
    )


def takes_embeddings(folder: Path) -> bool:
    """Whether a converted text tower is given embeddings besides ids."""
    return _read_table(folder, read_manifest(folder)) is not None


@contextlib.contextmanager
def _explaining(model: str) -> Iterator[None]:
    """OpenVINO's errors as one line."""
    try:
        yield
    except RuntimeError as error:
        reason = in_a_line(error, -200)
        raise UnreadableError(
            f"{model} cannot be run here, perhaps for want of memory; OpenVINO says: {reason}"
        ) from error


def convert_graph(network: Any, example: Any, shapes: Sequence[Any]) -> Any:
    """A torch network as OpenVINO's, also where the program did without its converter so far.

    Args:
        example: an input to trace it with, or a tuple of several. Of two rows: with one, tracing
            would take the batch for a constant.
        shapes: that of the input, or those of several; -1 for what varies.
    """
    import torch

    if sys.modules.get("openvino.tools.ovc", "") is None:
        del sys.modules["openvino.tools.ovc"]
    root = logging.getLogger()
    before = root.level, list(root.handlers), list(root.filters)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks on Python control flow
            with without_telemetry():
                from openvino.tools.ovc import convert_model

            return convert_model(network, example_input=example, input=shapes)
    finally:  # its converter takes the root logger for its own
        root.setLevel(before[0])
        root.handlers[:], root.filters[:] = before[1:]


@functools.cache
def capabilities() -> tuple[str, ...]:
    """What OpenVINO says that this CPU computes in."""
    with _explaining("any model"):
        return tuple(openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What is known of the towers that were converted into a folder."""
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def comes_as_onnx(folder: Path) -> bool:
    """Whether a converted model was made of ONNX graphs."""
    try:
        return bool(read_manifest(folder).get("onnx"))
    except (OSError, ValueError, TypeError):
        return False


def has_graphs(folder: Path, version: int = EXPORT_VERSION) -> bool:
    """Whether a folder describes converted towers; what they read may have gone or changed."""
    try:
        return bool(read_manifest(folder).get("version") == version)
    except (OSError, ValueError, TypeError):
        return False


def is_exported(folder: Path, version: int = EXPORT_VERSION) -> bool:
    """Whether usable converted towers lie there."""
    try:
        manifest = read_manifest(folder)
        linked = manifest.get(_LINKED)
        is_whole = linked is None or linked == stamp(Path(linked[0]))
    except (OSError, ValueError, TypeError):  # or the weights that they link to are gone
        return False
    return bool(manifest.get("version") == version) and is_whole


def link_towers(folder: Path, weights: Path, target: Path) -> None:
    """Makes converted towers of graphs that lie beside their model's weights, which stay there.

    What else lies in the target stays too: it depends on what the weights are, not where.

    Args:
        folder: the graphs, as scripts/bundle_model.py makes them.
        weights: the file that their constants lie in.
        target: it counts as converted towers once its manifest is there, which comes last.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.xml"):
        shutil.copyfile(path, target / path.name)
        link = target / path.with_suffix(".bin").name
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(weights)
        except OSError:  # a file system without links
            shutil.copyfile(weights, link)
    manifest = read_manifest(folder)
    if (folder / "tokenizer.json").is_file():
        spec = EncoderSpec.from_json(manifest["spec"])
        if spec.tokenizer == "json":  # the model's own
            JsonTokenizer.save(
                target / "tokenizer.json", folder / "tokenizer.json", spec.context_length
            )
        else:
            shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
            FewWords.save(target / "merges.npy", target / "tokenizer.json")
    write_json(target / "manifest.json", {**manifest, _LINKED: stamp(weights)})


@contextlib.contextmanager
def whole_or_not(folder: Path) -> Iterator[Path]:
    """A draft of a folder, which takes the folder's place at the end, and is gone on an error.

    To be called under the lock of the folder's space: what a killed process left goes first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".draft-{folder.name}-"
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True
    ) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir(0o700)
        yield draft
        # What was compiled to try it is known by the draft's name, and no use to anybody else.
        shutil.rmtree(draft / "compiled", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)


def save_towers(
    folder: Path,
    towers: Mapping[str, ImageTower | TextTower],
    manifest: Mapping[str, Any],
    *,
    take_table: bool = True,
) -> None:
    """Converts towers into a folder.

    Args:
        take_table: put the embeddings of tokens into a file of their own, where a tower allows it.

    Raises:
        ExportError: OpenVINO cannot convert one.
    """
    from mmsearch.encoders.batching import take_embeddings
    from mmsearch.encoders.open_clip import MaskedTextTower

    try:
        for name, tower in towers.items():
            graph = convert_graph(tower.eval(), *tower.inputs())
            if take_table and isinstance(tower, MaskedTextTower):
                table = take_embeddings(graph)
                if table is not None:
                    np.save(folder / EMBEDDINGS, table)
            ov.save_model(graph, folder / f"{name}.xml", compress_to_fp16=False)
    except Exception as error:  # whatever OpenVINO raises for an operation it lacks
        raise ExportError(in_a_line(error)) from error
    write_json(folder / "manifest.json", manifest)


def export(model: LoadedModel, folder: Path) -> None:
    """Converts a model into `folder`, which appears whole or not at all.

    Raises:
        ExportError: OpenVINO cannot convert the model, or computes something else than torch.
    """
    from mmsearch.encoders.open_clip import (
        VOCABULARY,
        CausalTextTower,
        ImageTower,
        MaskedTextTower,
        TextTower,
        TorchEncoder,
        own_tokenizer_file,
    )
    from mmsearch.encoders.tokenizer import build_tokenizer, read_merges

    fitting = (kind for kind in (CausalTextTower, MaskedTextTower) if kind.fits(model))
    text_tower: type[TextTower] = next(fitting, TextTower)
    cuts_texts = text_tower is not TextTower
    towers: dict[str, ImageTower | TextTower] = {
        "image": ImageTower(model),
        "text": text_tower(model),
    }
    manifest: dict[str, Any] = {
        "version": EXPORT_VERSION,
        "spec": {**model.spec.to_json(), "model": ""},  # names are looked up from the space
        "cuts_texts": cuts_texts,
        "agreement": {},
    }
    with whole_or_not(folder) as draft:
        save_towers(draft, towers, manifest)
        if model.spec.tokenizer == "clip":
            build_tokenizer(read_merges(VOCABULARY)).save(
                str(draft / "tokenizer.json"), pretty=False
            )
            FewWords.save(draft / "merges.npy", draft / "tokenizer.json")
        elif model.spec.tokenizer == "json":
            own = own_tokenizer_file(model.source)
            try:
                JsonTokenizer.save(draft / "tokenizer.json", own, model.spec.context_length)
            except (OSError, ValueError) as error:
                raise ExportError(f"{own}: {in_a_line(error)}") from error
        agreement = agreement_with(probe(TorchEncoder(model)), draft)
        if agreement["fp32"] < AGREEMENT["fp32"]:
            raise ExportError(f"cosine with torch is only {agreement['fp32']:.5f}")
        write_json(draft / "manifest.json", {**manifest, "agreement": agreement})


class ExportError(Exception):
    """Towers cannot be converted; never leaves this package."""


def probe(encoder: Encoder) -> tuple[Vectors, Vectors]:
    """What an encoder makes of a few pictures and texts, to compare encoders of one space on."""
    pixels = probe_pixels(encoder.spec.preprocess.size)
    return encoder.encode("image", pixels), encoder.encode("text", _PROBE_TEXTS)


def agreement_with(
    expected: tuple[Vectors, Vectors], folder: Path, precisions: Iterable[str] = _HINTS
) -> dict[str, float]:
    """The lowest cosine with what was expected of the probes, by precision."""
    found = {}
    for precision in precisions:
        try:
            got = probe(OpenVinoEncoder(folder, precision))
        except UsageError:  # no numbers
            found[precision] = 0.0
            continue
        found[precision] = float(
            min((a * b).sum(axis=1).min() for a, b in zip(expected, got, strict=True))
        )
    return found


def probe_pixels(size: tuple[int, int]) -> Pixels:
    """Pictures to compare on: noisy waves, nearer to photos, and flat shapes, which are harder."""
    height, width = size
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][..., None]
    pictures = []
    for number in range(_PROBES):
        blob = np.hypot(x - rng.random(), y - rng.random()) < rng.uniform(0.1, 0.4)
        if number % 2:
            ground, colour = rng.uniform(0, 255, (2, 3))
            pictures.append(np.where(blob, colour, np.broadcast_to(ground, (height, width, 3))))
        else:
            slope, phase = rng.uniform(-9, 9, (2, 3)), rng.uniform(0, 6, 3)
            waves = np.sin(slope[0] * x + slope[1] * y + phase) * 80 + 128
            noise = rng.normal(0, 6, (height, width, 3))
            pictures.append(waves + blob * rng.uniform(-120, 120, 3) + noise)
    found: Pixels = np.clip(pictures, 0, 255).astype(np.uint8)
    return found


_PROBE_TEXTS = (
    "a dog runs over the grass",
    "two people on a beach at sunset",
    "a red car",
    "snowy mountains under a clear blue sky with a small wooden house in front of them",
    "a man",
    "crowded street at night, neon signs",
    "three yellow circles",
    "a child in a pink dress is climbing up a set of stairs in an entry way",
)

"""Models as immich publishes them: ONNX graphs, prepared once for OpenVINO, without torch.

    config.json                    the architecture, as open_clip describes it
    visual/model.onnx              normalised pixels (1, 3, h, w) to a vector (1, dim)
    visual/preprocess_cfg.json     open_clip's preprocessing
    textual/model.onnx             token ids (1, l) to a vector (1, dim)
    textual/tokenizer.json         of the `tokenizers` library
    textual/tokenizer_config.json  with the token that pads

Their graphs take one picture or text at a time: torch's exporter wrote that into them. Those of
transformers of pictures, of ResNets and of CLIP's and SigLIP's texts are changed to take any number
(`mmsearch.encoders.batching`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import opset13 as op
from openvino._offline_transformations import apply_moc_transformations
from openvino.passes import ConstantFolding, Manager

from mmsearch.encoders.batching import NotFollowed, replace_node, take_batches, take_embeddings
from mmsearch.encoders.openvino import (
    EMBEDDINGS,
    EXPORT_VERSION,
    Graph,
    OpenVinoEncoder,
    agreement_with,
    openvino_core,
    ov,
    probe,
    probe_pixels,
    whole_or_not,
)
from mmsearch.encoders.registry import (
    KNOWN,
    NOTHING_KNOWN,
    ModelSource,
    file_hash,
    write_json,
)
from mmsearch.encoders.tokenizer import (
    ClipTokenizer,
    FewWords,
    JsonTokenizer,
    Tokenize,
    build_tokenizer,
    clip_merges,
    read_tokenizer,
    takes_language,
)
from mmsearch.errors import MmsearchError, ModelNotFound, in_a_line
from mmsearch.types import IMAGE, TEXT, EncoderSpec, Preprocess

log = logging.getLogger(__name__)

#: Bumped when what goes into a space's hash changes.
_IDENTITY_VERSION = 1
_PROBE_TEXTS = ("a dog runs over the grass", "two", "a small wooden house, 3 trees and a bird")


def read_spec(source: ModelSource, folder: Path, files: list[Path]) -> EncoderSpec:
    """What a folder says of its model.

    Args:
        files: all that make the model what it is, for the identity of its space.

    Raises:
        ModelNotFound: something that mmsearch does not read.
    """
    try:
        config = _read_json(folder / "config.json")
        text = config["text_cfg"]
        is_clip = clip_merges(folder / "textual/tokenizer.json") is not None
        options = {
            "clean": "lower" if is_clip else "whitespace",
            **text.get("tokenizer_kwargs", {}),
        }
        if set(options) != {"clean"} or text.get("tokenizer_mode"):
            raise ValueError("a tokenizer that mmsearch does not know")
        inputs = {
            IMAGE: asdict(_read_preprocess(folder / "visual/preprocess_cfg.json")),
            TEXT: {
                "context_length": int(text.get("context_length", 77)),
                "tokenizer": "clip" if is_clip else "json",
                "clean": str(options["clean"]),
            },
        }
        dim = int(config["embed_dim"])
    except KeyError as error:
        raise ModelNotFound(f"{folder}: cannot be used: its files lack {error}") from error
    except _UNUSABLE as error:
        raise ModelNotFound(f"{folder}: cannot be used: {in_a_line(error)}") from error
    # The tokenizer and the preprocessing are in `inputs`, or among the files.
    hashes = sorted((str(path.relative_to(folder)), file_hash(path)) for path in files)
    known = KNOWN.get(source.name, NOTHING_KNOWN)
    return EncoderSpec(
        model=source.name,
        space=hashlib.sha256(json.dumps([_IDENTITY_VERSION, hashes]).encode()).hexdigest()[:32],
        dim=dim,
        inputs=inputs,
        parameters=known.parameters,
        licence=known.licence or "see the model's card",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error


def _read_preprocess(path: Path) -> Preprocess:
    wanted = _read_json(path)
    size, colour = wanted["size"], wanted.get("fill_color", 0)
    known = {
        "interpolation": ("bicubic", "bilinear", "lanczos", "nearest"),
        "resize_mode": ("shortest", "longest", "squash"),
        "mode": ("RGB",),
    }
    for name, choices in known.items():
        if wanted.get(name, choices[0]) not in choices:
            raise ValueError(f"{path.name}: {name} is one of {', '.join(choices)}")
    if not all(value > 0 for value in wanted["std"]):
        raise ValueError(f"{path.name}: std is three numbers above 0")
    if colour != 0:
        raise ValueError(f"{path.name}: fill_color is 0")
    names = ("mean", "std", "interpolation", "resize_mode")
    how = {name: wanted[name] for name in names if name in wanted}
    return Preprocess.from_json(how | {"size": (size, size) if isinstance(size, int) else size})


#: What a file of another content makes fail, in one place or another.
_UNUSABLE = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, StopIteration,
             TypeError, ValueError)  # fmt: skip


def convert_folder(folder: Path, spec: EncoderSpec, target: Path) -> None:
    """Makes a converted model of a folder; it appears whole or not at all.

    Raises:
        ModelNotFound: graphs or a tokenizer that cannot be read, or do not fit what the folder
            says of them.
    """
    try:
        with whole_or_not(target) as draft:
            _convert(folder, spec, draft)
    except (*_UNUSABLE, MmsearchError) as error:
        raise ModelNotFound(f"{folder}: cannot be used: {in_a_line(error, 300)}") from error


def _convert(folder: Path, spec: EncoderSpec, draft: Path) -> None:
    tokenize, pad = _save_tokenizer(folder / "textual/tokenizer.json", spec, draft)
    image = _image_graph(folder / "visual/model.onnx", spec.preprocess)
    ov.save_model(image, draft / "image.xml", compress_to_fp16=False)
    del image  # each takes as much memory as its file, and more
    text = _text_graph(folder / "textual/model.onnx", tokenize, pad, draft / EMBEDDINGS)
    ov.save_model(text, draft / "text.xml", compress_to_fp16=False)
    del text
    manifest = {
        "version": EXPORT_VERSION,
        "spec": {**spec.to_json(), "model": ""},  # names are looked up from the space
        "cuts_texts": False,
        "onnx": True,
        "takes_language": takes_language(draft / "tokenizer.json"),
        "agreement": {},
    }
    write_json(draft / "manifest.json", manifest)
    # The graphs are what there is: what is faster is held against them in fp32.
    expected = probe(OpenVinoEncoder(draft, "fp32", name=folder.name))
    for vectors in expected:
        if vectors.shape[1] != spec.dim:
            raise ValueError(f"vectors of {vectors.shape[1]} numbers, not {spec.dim}")
    agreement = {"fp32": 1.0, **agreement_with(expected, draft, ("bf16",))}
    write_json(draft / "manifest.json", {**manifest, "agreement": agreement})


def _save_tokenizer(tokenizer: Path, spec: EncoderSpec, target: Path) -> tuple[Tokenize, int]:
    """Writes what encodes texts; returns that, and the id that stands where there is no token."""
    path, clean = target / "tokenizer.json", spec.tokenizer_clean
    merges = clip_merges(tokenizer)
    if merges is None:
        pad = JsonTokenizer.save(path, tokenizer, spec.context_length)
        return JsonTokenizer(path, clean), pad
    build_tokenizer(merges).save(str(path), pretty=False)
    FewWords.save(target / "merges.npy", path)
    return ClipTokenizer(lambda: read_tokenizer(path), spec.context_length, clean), 0


def _read(path: Path) -> Any:
    try:
        graph = openvino_core().read_model(path)
    except RuntimeError as error:
        raise ValueError(f"{path.parent.name}/{path.name} is damaged, or no ONNX") from error
    passes = Manager()
    passes.register_pass(ConstantFolding())  # of the shapes that torch's exporter computes
    passes.run_passes(graph)
    return graph


def _simplified(read: Callable[[], Any], probes: Sequence[NDArray[Any]]) -> Any:
    """A graph that is compiled sooner at every start, and takes any number of rows if it can.

    Args:
        read: gives the graph as it is; again, rather than a second one in memory.
        probes: several rows for each of its inputs, on which that is tried.
    """
    (expected,) = Graph(read())(*probes)
    graph = read()
    try:
        if all(one.get_partial_shape()[0].is_static for one in graph.inputs):
            take_batches(graph)
        apply_moc_transformations(graph, cf=True)
        (found,) = Graph(graph)(*probes)
        if found.shape == expected.shape and _is_as_good_as(found, expected):
            return graph
        reason = "rows are mixed"
    except (NotFollowed, *_UNUSABLE) as error:
        reason = in_a_line(error)
    log.info("one row at a time: %s", reason)
    del graph
    graph = read()
    apply_moc_transformations(graph, cf=True)
    return graph


def _is_as_good_as(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Whether rows differ from what was expected far less than from each other."""
    pairs = itertools.combinations(expected, 2)
    apart = min(float(np.abs(one - other).max()) for one, other in pairs)
    return bool(np.abs(found - expected).max() < apart / 100)


def _image_graph(path: Path, how: Preprocess) -> Any:
    """The image tower for pixels as bytes, (n, h, w, 3)."""

    def read() -> Any:
        graph = _read(path)
        (pixels,) = graph.inputs
        sides = [pixels.get_partial_shape()[axis] for axis in (2, 3)]
        if not all(map(_fits, sides, how.size)):
            found, wanted = (" x ".join(map(str, size)) for size in (sides, how.size))
            raise ValueError(f"its pictures are {found}, not {wanted}")
        return graph

    rows = (probe_pixels(how.size)[:3] / 255 - how.mean) / how.std
    probes = [rows.transpose(0, 3, 1, 2).astype(np.float32)]
    steps = ov.preprocess.PrePostProcessor(_simplified(read, probes))
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    scaled = steps.input().preprocess().convert_element_type(ov.Type.f32)
    scaled.mean([255 * value for value in how.mean]).scale([255 * value for value in how.std])
    return steps.build()


def _text_graph(path: Path, tokenize: Tokenize, pad: int, embeddings: Path) -> Any:
    """The text tower for token ids (n, l).

    The table of their embeddings, (tokens, width), goes into a file of its own: looked up there, a
    search reads the rows that it needs, not all, which are the greater part of a multilingual
    model. The graph then takes the rows, (n, l, width), beside the ids. A graph without such a
    table stays as it is.
    """
    ids = tokenize(_PROBE_TEXTS)

    def read(keep: Path | None = None) -> Any:
        graph = _text_inputs(path, ids.shape[1], pad)
        table = take_embeddings(graph)
        if keep is not None and table is not None:
            np.save(keep, table)
        return graph

    kind = read(embeddings).inputs[0].get_element_type().to_dtype()
    probes = [ids.astype(kind)]
    if embeddings.is_file():
        probes.append(np.load(embeddings, mmap_mode="r")[ids])
    graph = _simplified(read, probes)
    steps = ov.preprocess.PrePostProcessor(graph)
    for place, one in enumerate(graph.inputs):
        if one.get_element_type() != ov.Type.f32:
            steps.input(place).tensor().set_element_type(ov.Type.i64)
    return steps.build()


def _text_inputs(path: Path, length: int, pad: int) -> Any:
    """A text tower that takes ids alone."""
    graph = _read(path)
    named = {one.get_any_name(): one.get_node() for one in graph.inputs}
    mask = named.pop("attention_mask", None)  # M-CLIP's
    if len(named) != 1:
        raise ValueError(f"{path.parent.name}/{path.name} takes {', '.join(named)}")
    (ids,) = named.values()
    side = ids.get_partial_shape()[1]
    if not _fits(side, length):
        raise ValueError(f"its texts have {side} tokens, not {length}")
    if mask is not None:
        there = op.not_equal(ids, op.constant(np.array(pad, ids.get_element_type().to_dtype())))
        replace_node(mask, op.convert(there, mask.get_element_type().get_type_name()))
        graph.remove_parameter(mask)
    return graph


def _fits(side: Any, wanted: int) -> bool:
    return bool(side.is_dynamic or side.get_length() == wanted)

"""Models as immich publishes them: ONNX graphs, prepared once for OpenVINO, without torch.

    config.json                    the architecture, as open_clip describes it
    visual/model.onnx              normalised pixels (1, 3, h, w) to a vector (1, dim)
    visual/preprocess_cfg.json     open_clip's preprocessing
    textual/model.onnx             token ids (1, l) to a vector (1, dim)
    textual/tokenizer.json         of the `tokenizers` library
    textual/tokenizer_config.json  with the token that pads

Their graphs take one picture or text at a time: torch's exporter wrote that into them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from openvino import opset13 as op
from openvino._offline_transformations import apply_moc_transformations

from mmsearch.encoders.openvino import (
    EMBEDDINGS,
    EXPORT_VERSION,
    OpenVinoEncoder,
    agreement_with,
    openvino_core,
    ov,
    probe,
    whole_or_not,
)
from mmsearch.encoders.registry import (
    KNOWN,
    NOTHING_KNOWN,
    ModelSource,
    file_hash,
    write_json,
)
from mmsearch.encoders.tokenizer import FewWords, JsonTokenizer, build_tokenizer, clip_merges
from mmsearch.errors import ModelNotFound, in_a_line
from mmsearch.types import IMAGE, TEXT, EncoderSpec, Preprocess

#: Bumped when what goes into a space's hash changes.
_IDENTITY_VERSION = 1


def read_spec(source: ModelSource, folder: Path, files: list[Path]) -> EncoderSpec:
    """What a folder says of its model.

    Args:
        files: all that make the model what it is, for the identity of its space.

    Raises:
        ModelNotFound: something that mmsearch does not read.
    """
    try:
        config = _read_json(folder / "config.json")
        wanted = _read_json(folder / "visual/preprocess_cfg.json")
        text = config["text_cfg"]
        is_clip = clip_merges(folder / "textual/tokenizer.json") is not None
        options = {
            "clean": "lower" if is_clip else "whitespace",
            **text.get("tokenizer_kwargs", {}),
        }
        if set(options) != {"clean"} or text.get("tokenizer_mode"):
            raise ValueError("a tokenizer that mmsearch does not know")
        size = wanted["size"]
        preprocess = Preprocess.from_json(
            {
                name: wanted[name]
                for name in ("mean", "std", "interpolation", "resize_mode", "fill_color")
                if name in wanted
            }
            | {"size": (size, size) if isinstance(size, int) else size}
        )
        inputs = {
            IMAGE: asdict(preprocess),
            TEXT: {
                "context_length": int(text.get("context_length", 77)),
                "tokenizer": "clip" if is_clip else "json",
                "clean": str(options["clean"]),
            },
        }
        dim = int(config["embed_dim"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    return dict(json.loads(path.read_text(encoding="utf-8")))


def convert_folder(folder: Path, spec: EncoderSpec, target: Path) -> None:
    """Makes a converted model of a folder; it appears whole or not at all.

    Raises:
        ModelNotFound: graphs or a tokenizer that cannot be read.
    """
    try:
        with whole_or_not(target) as draft:
            pad = _save_tokenizer(folder / "textual/tokenizer.json", spec, draft)
            image = _image_graph(folder / "visual/model.onnx", spec.preprocess)
            ov.save_model(image, draft / "image.xml", compress_to_fp16=False)
            del image  # each takes as much memory as its file, and more
            text, table = _text_graph(folder / "textual/model.onnx", pad)
            ov.save_model(text, draft / "text.xml", compress_to_fp16=False)
            if table is not None:
                np.save(draft / EMBEDDINGS, table)
            del text, table
            manifest = {
                "version": EXPORT_VERSION,
                "spec": {**spec.to_json(), "model": ""},  # names are looked up from the space
                "cuts_texts": False,
                "agreement": {},
            }
            write_json(draft / "manifest.json", manifest)
            # The graphs are what there is: what is faster is held against them in fp32.
            expected = probe(OpenVinoEncoder(draft, "fp32"))
            agreement = {"fp32": 1.0, **agreement_with(expected, draft, ("bf16",))}
            write_json(draft / "manifest.json", {**manifest, "agreement": agreement})
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelNotFound(f"{folder}: cannot be used: {in_a_line(error, 300)}") from error


def _save_tokenizer(tokenizer: Path, spec: EncoderSpec, target: Path) -> int:
    """Writes what encodes texts; returns the id that stands where a text has no token."""
    merges = clip_merges(tokenizer)
    if merges is None:
        return JsonTokenizer.save(target / "tokenizer.json", tokenizer, spec.context_length)
    build_tokenizer(merges).save(str(target / "tokenizer.json"), pretty=False)
    FewWords.save(target / "merges.npy", target / "tokenizer.json")
    return 0


def _read(path: Path) -> Any:
    """A graph, simplified: so it is compiled sooner at every start."""
    graph = openvino_core().read_model(path)
    apply_moc_transformations(graph, cf=True)
    return graph


def _image_graph(path: Path, how: Preprocess) -> Any:
    """The image tower for pixels as bytes, (1, h, w, 3)."""
    graph = _read(path)
    steps = ov.preprocess.PrePostProcessor(graph)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    pixels = steps.input().preprocess().convert_element_type(ov.Type.f32)
    pixels.mean([255 * value for value in how.mean]).scale([255 * value for value in how.std])
    return steps.build()


def _text_graph(path: Path, pad: int) -> tuple[Any, np.ndarray | None]:
    """The text tower for token ids (1, l), and the table of their embeddings, (tokens, width).

    Where the table is looked up outside of the graph, a search reads the rows that it needs, not
    all: they are the greater part of a multilingual model. The graph then takes the rows, (1, l,
    width), beside the ids. None where the graph has no such table.
    """
    graph = _read(path)
    ids, *others = (one.get_node() for one in graph.inputs)
    if others:  # the attention mask of M-CLIP's
        (mask,) = others
        there = op.convert(op.not_equal(ids, np.int32(pad)), mask.get_element_type().to_string())
        _replace(mask, there)
        graph.remove_parameter(mask)
    table = None
    for gather in graph.get_ops():
        if gather.get_type_name() != "Gather" or gather.input_value(1).get_node() != ids:
            continue
        weights = gather.input_value(0).get_node()
        if weights.get_type_name() == "Constant" and weights.get_element_type() == ov.Type.f32:
            table = weights.data
            rows = op.parameter(gather.get_output_shape(0), np.float32, name="rows")
            _replace(gather, rows)
            graph.add_parameters([rows])
            break
    graph.validate_nodes_and_infer_types()
    steps = ov.preprocess.PrePostProcessor(graph)
    for place, one in enumerate(graph.inputs):
        if one.get_element_type() != ov.Type.f32:
            steps.input(place).tensor().set_element_type(ov.Type.i64)
    return steps.build(), table


def _replace(node: Any, by: Any) -> None:
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(by.output(0))

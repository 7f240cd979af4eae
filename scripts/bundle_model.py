"""Puts a model's OpenVINO graphs beside its weights, so that it runs without torch.

The graphs' constants point into the one file of weights. Conversion changes weights: it makes
single precision of half and of rows in int8, and multiplies a batch norm's scale into a
convolution. Operations in the graphs do the same again, from the weights as they are. Other
constants, some kilobytes, are added to that file as one more tensor. A table of token embeddings
that the text tower is given rows of is read from that file too.

    python scripts/bundle_model.py MODEL

MODEL is a name or a path, as --model takes it, of an open_clip folder (`open_clip_config.json`,
`open_clip_model.safetensors`) whose weights are in half precision or in int8. It is read as
before, and stays the same space. It can be run again.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tempfile
import xml.etree.ElementTree as ET
from contextlib import suppress
from pathlib import Path

import numpy as np

from mmsearch.encoders import openvino
from mmsearch.encoders.int8_rows import SCALE
from mmsearch.encoders.open_clip import BEFORE, CONSTANTS, load_model
from mmsearch.encoders.openvino import ROWS
from mmsearch.encoders.patch_encoder import PATCHES
from mmsearch.encoders.patch_towers import export_patch_towers
from mmsearch.encoders.registry import cached_files, file_hash, parse_model, write_json
from mmsearch.errors import UsageError

WEIGHTS = "open_clip_model.safetensors"
DTYPES = {
    "f32": np.float32,
    "i8": np.int8,
    "i64": np.int64,
    "i32": np.int32,
    "u8": np.uint8,
    "boolean": np.uint8,
}


class Weights:
    """A file of weights, as its parts: the header, where each tensor lies, and the rest."""

    def __init__(self, path):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        self.header = json.loads(content[8 : 8 + length])
        self.data = content[8 + length :]
        # By it the file's hash, and with it the space, stay what they were.
        before = self.header.get("__metadata__", {}).get(BEFORE)
        if before is not None:  # it has been here before
            self.data = self.data[: self.header[CONSTANTS]["data_offsets"][0]]
            self.header = json.loads(before)
        before = before or content[8 : 8 + length].decode()
        self.header.setdefault("__metadata__", {})[BEFORE] = before
        self.constants = bytearray()
        self.tensors = {
            name: np.frombuffer(self.data[slice(*about["data_offsets"])], np.float16)
            .reshape(about["shape"])
            for name, about in self.header.items()
            if about.get("dtype") == "F16"
        }  # fmt: skip
        self.by_content = {t.astype(np.float32).tobytes(): n for n, t in self.tensors.items()}
        for name, about in self.header.items():
            if about.get("dtype") == "I8":
                rows = self.read(name, np.int8) * self.read(name + SCALE, np.float32)
                self.by_content[rows.tobytes()] = name
        self.places = {}

    def read(self, name, kind):
        about = self.header[name]
        return np.frombuffer(self.data[slice(*about["data_offsets"])], kind).reshape(about["shape"])

    def table_named(self, table):
        """The tensor of int8 rows that a table of token embeddings is."""
        name = self.by_content.get(table.tobytes())
        if name is None or name + SCALE not in self.header:
            raise SystemExit(
                "the text tower's table has to be in int8: int8 = ['text'] in a recipe"
            )
        return name

    def place(self, name, data_at):
        """Where a tensor begins in the file that is written."""
        return data_at + self.header[name]["data_offsets"][0]

    def add(self, content):
        """The place of a constant among those that are added."""
        if content not in self.places:
            self.constants += b"\0" * (-len(self.constants) % 64)
            self.places[content] = len(self.constants)
            self.constants += content
        return self.places[content]

    def scaled(self, folded):
        """The tensor that was multiplied, channel by channel, and by what; None if none was."""
        flat = folded.reshape(len(folded), -1)
        for name, tensor in self.tensors.items():
            if tensor.size != folded.size or len(tensor) != len(folded):
                continue
            own = tensor.reshape(len(tensor), -1).astype(np.float32)
            row, top = np.arange(len(own)), np.abs(own).argmax(axis=1)
            with np.errstate(all="ignore"):
                scale = (flat[row, top] / own[row, top]).astype(np.float32)
            scale[~np.isfinite(scale)] = 0
            best = np.full(len(own), np.inf)
            found = scale.copy()
            for step in (0, 1, -1, 2, -2):  # of the numbers around it, which rounds as it did
                tried = scale.copy()
                for _ in range(abs(step)):
                    tried = np.nextafter(tried, np.float32(np.sign(step) * np.inf))
                error = np.abs(own * tried[:, None] - flat).max(axis=1)
                found, best = np.where(error < best, tried, found), np.minimum(error, best)
            if best.max() <= 1e-6 * np.abs(flat).max():
                return name, found
        return None

    def write(self, path):
        """Writes the file with its constants, which begin at a multiple of 64."""
        start = len(self.data) + (-len(self.data) % 64)
        content = bytes(start - len(self.data)) + bytes(self.constants)
        self.header[CONSTANTS] = {
            "dtype": "U8", "shape": [len(content)],
            "data_offsets": [len(self.data), len(self.data) + len(content)],
        }  # fmt: skip
        text = json.dumps(self.header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        path.write_bytes(struct.pack("<Q", len(text)) + text + self.data + content)
        return 8 + len(text), 8 + len(text) + start


class Graph:
    """OpenVINO's XML of a graph, whose constants are to lie in other places."""

    def __init__(self, path, weights):
        self.root = ET.parse(path).getroot()
        self.layers, self.edges = self.root.find("layers"), self.root.find("edges")
        self.next = 1 + max(int(layer.get("id")) for layer in self.layers)
        self.weights = weights
        self.in_tensors, self.added = [], []
        content = path.with_suffix(".bin").read_bytes()
        for layer in [one for one in self.layers if one.get("type") == "Const"]:
            data = layer.find("data")
            start, size = int(data.get("offset")), int(data.get("size"))
            self.move(layer, data, content[start : start + size])

    def move(self, layer, data, content):
        name = self.weights.by_content.get(content)
        kind = data.get("element_type")
        if name is not None and kind == "f32":
            self.convert(layer, data, name)
            return
        values = np.frombuffer(content, DTYPES[kind])
        shape = [int(n) for n in data.get("shape").split(",") if n]
        scaled = self.weights.scaled(values.reshape(shape)) if len(content) > 1024 else None
        if scaled is None or kind != "f32":
            self.added.append((data, self.weights.add(content)))
            return
        name, scale = scaled
        single = self.convert(layer, data, name)
        dims = [len(scale), *[1] * (len(shape) - 1)]
        about = {"element_type": "f32", "shape": ", ".join(map(str, dims)), "offset": "0",
                 "size": str(scale.nbytes)}  # fmt: skip
        place = self.weights.add(scale.tobytes())
        self.multiplied(
            layer, single, shape, dims, about, lambda made: self.added.append((made, place))
        )

    def convert(self, layer, data, name):
        """Lets a constant be a tensor of the file, in half precision or int8, and converts it."""
        port = layer.find("output/port")
        shape = [int(dim.text) for dim in port.findall("dim")]
        is_rows = self.weights.header[name]["dtype"] == "I8"
        data.set("element_type", "i8" if is_rows else "f16")
        port.set("precision", "I8" if is_rows else "FP16")
        self.in_tensors.append((data, name))
        single = self.layer("Convert", f"{layer.get('name')}/single", [shape], shape)
        single.insert(0, ET.Element("data", {"destination_type": "f32"}))
        single.find("input/port").set("precision", port.get("precision"))
        self.follow(layer, single, "1")
        self.edge(layer, port.get("id"), single, "0")
        if not is_rows:
            return single
        dims = [shape[0], 1]
        about = {"element_type": "f32", "shape": ", ".join(map(str, dims)), "offset": "0",
                 "size": str(4 * shape[0])}  # fmt: skip
        return self.multiplied(
            layer,
            single,
            shape,
            dims,
            about,
            lambda made: self.in_tensors.append((made, name + SCALE)),
        )

    def multiplied(self, layer, single, shape, dims, about, note):
        """Multiplies what was converted by a constant, which `note` is told of."""
        by = self.layer("Const", f"{layer.get('name')}/scale", [], dims)
        note(ET.SubElement(by, "data", about))
        by[:] = [by[1], by[0]]  # data comes first
        product = self.layer("Multiply", f"{layer.get('name')}/scaled", [shape, dims], shape)
        product.insert(0, ET.Element("data", {"auto_broadcast": "numpy"}))
        self.follow(single, product, "2")
        self.edge(single, "1", product, "0")
        self.edge(by, "0", product, "1")
        return product

    def layer(self, kind, name, inputs, output):
        about = {"id": str(self.next), "name": name, "type": kind, "version": "opset1"}
        self.next += 1
        made = ET.SubElement(self.layers, "layer", about)
        place = 0
        for side, shapes in (("input", inputs), ("output", [output])):
            if shapes:
                ports = ET.SubElement(made, side)
            for shape in shapes:
                port = ET.SubElement(ports, "port", {"id": str(place), "precision": "FP32"})
                for dim in shape:
                    ET.SubElement(port, "dim").text = str(dim)
                place += 1
        return made

    def follow(self, before, after, port):
        """Whoever took what one layer gives takes what another gives."""
        for edge in self.edges:
            if edge.get("from-layer") == before.get("id"):
                edge.set("from-layer", after.get("id"))
                edge.set("from-port", port)

    def edge(self, before, out, after, into):
        about = {"from-layer": before.get("id"), "from-port": out,
                 "to-layer": after.get("id"), "to-port": into}  # fmt: skip
        ET.SubElement(self.edges, "edge", about)

    def write(self, path, data_at, constants_at):
        for data, name in self.in_tensors:
            first, last = self.weights.header[name]["data_offsets"]
            data.set("offset", str(self.weights.place(name, data_at)))
            data.set("size", str(last - first))
        for data, place in self.added:
            data.set("offset", str(constants_at + place))
        rt_info = self.root.find("rt_info")
        if rt_info is not None:  # how and where it was converted
            self.root.remove(rt_info)
        ET.ElementTree(self.root).write(path)


def main():
    model = load_model(parse_model(sys.argv[1]))
    folder = Path(model.source.location)
    weights = Weights(folder / WEIGHTS)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        openvino.export(model, made)
        with suppress(UsageError):  # a model without patches
            export_patch_towers(model, made)
        graphs = {
            path.relative_to(made): Graph(path, weights) for path in sorted(made.rglob("*.xml"))
        }
        table = made / openvino.EMBEDDINGS
        rows = weights.table_named(np.load(table)) if table.is_file() else None
        (folder / "manifest.json").unlink(missing_ok=True)  # without it the graphs are not used
        data_at, constants_at = weights.write(folder / WEIGHTS)
        for name, graph in graphs.items():
            (folder / name).parent.mkdir(exist_ok=True)
            graph.write(folder / name, data_at, constants_at)
        copied = [f"{PATCHES}/manifest.json"]
        if model.spec.tokenizer != "json":  # then it is the model's own, which stays as it is
            copied.append("tokenizer.json")
        for name in copied:
            if (made / name).is_file():
                shutil.copyfile(made / name, folder / name)
        files = {path.name: file_hash(path) for path in cached_files(model.source)}
        manifest = {**openvino.read_manifest(made), "files": files}
        if rows is not None:
            places = [weights.place(name, data_at) for name in (rows, rows + SCALE)]
            manifest[ROWS] = [*places, *weights.header[rows]["shape"]]
        write_json(folder / "manifest.json", manifest)
    print(f"{len(weights.constants)} bytes of constants added to {folder / WEIGHTS}")


if __name__ == "__main__":
    main()

"""Opens a model by its source: finds its space, its converted form and the right runtime."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from mmsearch.encoders.base import Encoder
from mmsearch.encoders.registry import (
    ALIASES,
    KNOWN,
    NOTHING_KNOWN,
    TINY,
    ModelSource,
    cached_files,
    fetch_onnx,
    file_hash,
    full_name,
    listed_name,
    onnx_folder,
    parse_model,
    require_weights,
    stamp,
    trained_names,
    write_json,
)
from mmsearch.errors import (
    MmsearchError,
    ModelNotFound,
    UnreadableError,
    UsageError,
    extra,
    in_a_line,
)
from mmsearch.types import EncoderSpec, Notify, Pixels

if TYPE_CHECKING:
    from mmsearch.encoders.patch_encoder import PatchEncoder

log = logging.getLogger(__name__)

_PLACES = 8  # of a model's files that are remembered beside the newest


class ModelCache:
    """The folder of converted models, and which space each weights file gives.

    A space is known by the paths, sizes and times of the model's files, so that weights are
    hashed once and not at every start. A name has an entry for each place that its files were seen
    in: installations of mmsearch, each with its own `tiny`, may share the cache.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "models"
        self._known = self._folder / "weights.json"

    def folder_of(self, space: str) -> Path:
        return self._folder / space

    def lock(self, model: str) -> FileLock:
        """Held while a model is converted, so that two processes do not do it twice."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self._folder, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise UnreadableError(
                f"{self._folder}: models cannot be prepared there ({error.strerror}); set "
                "MMSEARCH_CACHE to a folder that can be written"
            ) from error
        name = hashlib.sha256(model.encode()).hexdigest()[:16]
        return FileLock(self._folder / f"{name}.lock")

    def find(self, source: ModelSource) -> dict[str, Any] | None:
        """What is remembered of the model whose files are as they are now.

        Of one that comes as ONNX graphs from the hub, also where its files are gone: what was made
        of them is all that is needed.
        """
        files = _stamps(source)
        for entry in self._read().get(source.name, ()):
            gone = not files and source.kind == "hf-hub" and self.is_onnx(entry["space"])
            if gone or entry["files"] == files:
                return dict(entry)
        return None

    def is_onnx(self, space: str) -> bool:
        """Whether a model was converted here from ONNX graphs: it runs on the CPU alone."""
        from mmsearch.encoders.openvino import comes_as_onnx

        return comes_as_onnx(self.folder_of(space))

    def names_of(self, space: str, first: str) -> list[str]:
        """The names under which a space's model may be had: `first`, then others seen here."""
        seen = [
            name for name, entries in self._read().items()
            if any(entry["space"] == space for entry in entries)
        ]  # fmt: skip
        return list(dict.fromkeys((first, *seen)))

    def name_of(self, space: str, first: str) -> str:
        """A name whose files are here and gave that space; `first` where there is none."""
        known = self._read()
        for name in self.names_of(space, first):
            for entry in known.get(name, ()):
                if entry["space"] == space and _are_here(entry["files"]):
                    return name
        return first

    def remember(self, source: ModelSource, space: str, runtime: str) -> None:
        newest = {"space": space, "runtime": runtime, "files": _stamps(source)}
        with FileLock(self._folder / "lock"):
            known = self._read()
            others = [one for one in known.get(source.name, ()) if one["files"] != newest["files"]]
            known[source.name] = [newest, *others[:_PLACES]]
            write_json(self._known, known)

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        try:
            return dict(json.loads(self._known.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def specs(self) -> dict[str, EncoderSpec]:
        """The models that were converted here, by name."""
        from mmsearch.encoders.openvino import is_exported, read_manifest

        newest = {name: entries[0]["space"] for name, entries in self._read().items()}
        folders = {name: self.folder_of(space) for name, space in newest.items()}
        return {
            name: EncoderSpec.from_json(read_manifest(path)["spec"])
            for name, path in folders.items() if is_exported(path)
        }  # fmt: skip


@dataclass(frozen=True)
class ModelRow:
    """What is known of a model without loading it; 0 and "" where that is nothing."""

    name: str
    dim: int
    parameters: int
    licence: str
    cached: bool
    """Whether its weights are on this machine."""
    indexed: str
    """The folder of the current index, where it uses this model."""


def list_models(
    cache: ModelCache, active: EncoderSpec | None, index: Path, home: Path
) -> list[ModelRow]:
    """Mmsearch's own, what was trained or used on this machine, and the index's own model."""
    known = cache.specs()
    if active is not None:
        known[active.model] = active
    trained = {full_name(name, home): name for name in trained_names(home)}
    names = dict.fromkeys((TINY, *ALIASES.values(), *trained, *known))
    rows = []
    for name in names:
        about = known.get(name) or KNOWN.get(name, NOTHING_KNOWN)
        rows.append(
            ModelRow(
                name=trained.get(name) or listed_name(name),
                dim=about.dim,
                parameters=about.parameters,
                licence=about.licence,
                cached=_is_cached(name),
                indexed=str(index) if active is not None and active.model == name else "",
            )
        )
    return rows


def _is_cached(name: str) -> bool:
    try:
        return cached_files(parse_model(name)) is not None
    except MmsearchError:
        return False


def _stamps(source: ModelSource) -> list[list[Any]]:
    return [stamp(path) for path in cached_files(source) or []]


def _are_here(stamps: list[list[Any]]) -> bool:
    """Whether files are what they were; spares a search the hub's library, which says where."""
    with suppress(OSError):
        return stamps == [stamp(Path(path)) for path, *_ in stamps]
    return False


def open_space(
    space: str, name: str, cache: ModelCache, precision: str, notify: Notify = log.info
) -> Encoder | None:
    """The converted model of a space, without looking at its weights; None if there is none.

    A precision that was asked for is obeyed, with a word where it does not agree with torch.

    Args:
        name: what the model is called here: a conversion serves all names of its space.
    """
    from mmsearch.encoders.openvino import is_exported

    folder = cache.folder_of(space)
    return _open_converted(folder, name, precision, notify) if is_exported(folder) else None


def _open_converted(folder: Path, name: str, precision: str, notify: Notify) -> Encoder:
    from mmsearch.encoders.openvino import OpenVinoEncoder

    encoder = OpenVinoEncoder(folder, precision, name=name)
    if encoder.doubt is not None:
        notify(encoder.doubt)
    return encoder


def open_encoder(
    source: ModelSource,
    cache: ModelCache,
    *,
    device: str = "cpu",
    precision: str = "auto",
    notify: Notify = log.info,
) -> Encoder:
    """The model behind `source`, converted first where that has not been done.

    Args:
        device: "cpu" for OpenVINO, or a torch device.
        notify: told, in a line, what takes time.

    Raises:
        ModelNotFound: no such model, or its weights cannot be had.
    """
    entry = cache.find(source)
    if entry and device != "cpu" and not cache.is_onnx(entry["space"]):
        entry = None
    if entry and entry["runtime"] == "torch":
        return _open_torch(source, "cpu", "fp32")
    if entry and (encoder := open_space(entry["space"], source.name, cache, precision, notify)):
        return encoder
    if (folder := _onnx_graphs(source, notify)) is not None:
        if device != "cpu":
            notify(f"'{source.name}' comes as ONNX graphs and runs on the CPU")
        prepared = _prepare_onnx(source, folder, cache, notify)
        return _open_converted(prepared, source.name, precision, notify)
    if device != "cpu":
        return _open_torch(source, device, precision)
    return _convert(source, cache, precision, notify)


def _open_torch(source: ModelSource, device: str, precision: str) -> Encoder:
    with extra("torch", f"'{source.name}' on '{device}'"):
        from mmsearch.encoders.open_clip import TorchEncoder, load_model

    if precision == "int8":
        raise UsageError(
            f"int8 is for OpenVINO on the CPU; '{source.name}' runs with torch on '{device}', in "
            "fp32 or bf16"
        )
    if precision == "auto":
        precision = "fp32"
    try:
        return TorchEncoder(load_model(source), device, precision)
    except (RuntimeError, AssertionError) as error:  # torch without that device
        reason = str(error).splitlines()[0]
        raise UsageError(f"device '{device}' cannot be used: {reason}") from error


def _link_own_graphs(
    source: ModelSource, cache: ModelCache, spec: EncoderSpec | None = None
) -> Path | None:
    """The converted folder of a model whose own folder has graphs; None where it has none.

    Args:
        spec: the space that it has to be of.
    """
    from mmsearch.encoders import openvino
    from mmsearch.encoders.patch_encoder import PATCH_VERSION, PATCHES

    own = Path(source.location)
    if source.kind != "local-dir" or not openvino.has_graphs(own):
        return None
    manifest, files = openvino.read_manifest(own), cached_files(source) or []
    # Where a file was replaced, or came, the graphs are of another model.
    if manifest.get("files") != {path.name: file_hash(path) for path in files}:
        return None
    space = manifest["spec"]["space"]
    if spec is not None and space != spec.space:
        return None
    weights = next(path for path in files if path.suffix == ".safetensors")
    folder = cache.folder_of(space)
    with cache.lock(space):
        for name, version in (("", openvino.EXPORT_VERSION), (PATCHES, PATCH_VERSION)):
            is_there = openvino.is_exported(folder / name, version)
            if not is_there and openvino.has_graphs(own / name, version):
                openvino.link_towers(own / name, weights, folder / name)
    cache.remember(source, space, "openvino")
    return folder


def _convert(source: ModelSource, cache: ModelCache, precision: str, notify: Notify) -> Encoder:
    from mmsearch.encoders import openvino

    if (linked := _link_own_graphs(source, cache)) is not None:
        return _open_converted(linked, source.name, precision, notify)
    os.getcwd()  # torch asks for it as it is imported, and says nothing useful where it is gone
    with extra("torch", f"preparing '{source.name}' for this machine"):
        from mmsearch.encoders.open_clip import TorchEncoder, load_model

    require_weights(source)
    with cache.lock(source.name):
        notify(f"preparing '{source.name}' for this machine (once)")
        model = load_model(source)
        folder = cache.folder_of(model.spec.space)
        try:
            with cache.lock(model.spec.space):  # it may be at hand by another name, too
                if not openvino.is_exported(folder):
                    openvino.export(model, folder)
        except openvino.ExportError as error:
            reason = in_a_line(error)
            notify(f"'{source.name}' stays with torch, which is slower here: {reason}")
            cache.remember(source, model.spec.space, "torch")
            return TorchEncoder(model)
        cache.remember(source, model.spec.space, "openvino")
    return _open_converted(folder, source.name, precision, notify)


def _onnx_graphs(source: ModelSource, notify: Notify) -> Path | None:
    """Where the ONNX graphs of a model are, fetched where need be; None where it has none."""
    folder = onnx_folder(source)
    if folder is not None or source.kind != "hf-hub" or cached_files(source) is not None:
        return folder
    require_weights(source)
    return fetch_onnx(source, notify)


def _prepare_onnx(source: ModelSource, folder: Path, cache: ModelCache, notify: Notify) -> Path:
    """The converted folder of a model that comes as ONNX graphs."""
    from mmsearch.encoders.onnx_folder import convert_folder, read_spec
    from mmsearch.encoders.openvino import is_exported

    spec = read_spec(source, folder, cached_files(source) or [])
    target = cache.folder_of(spec.space)
    with cache.lock(spec.space):
        if not is_exported(target):
            notify(f"preparing '{source.name}' for this machine (once)")
            convert_folder(folder, spec, target)
    cache.remember(source, spec.space, "openvino")
    return target


def open_patch_encoder(
    encoder: Encoder, cache: ModelCache, notify: Notify = log.info
) -> PatchEncoder:
    """What gives the patches and tokens of a converted model, converted first where need be.

    Raises:
        UsageError: a model whose patches cannot be read.
        ModelNotFound: its weights are needed, and cannot be had or are others by now.
    """
    from mmsearch.encoders.openvino import OpenVinoEncoder, is_exported
    from mmsearch.encoders.patch_encoder import PATCH_VERSION, PATCHES, PatchEncoder

    if not isinstance(encoder, OpenVinoEncoder):
        raise UsageError(
            f"'{encoder.spec.model}' runs with torch here, and patches are read with OpenVINO only"
        )
    if cache.is_onnx(encoder.spec.space):
        raise UsageError(
            f"'{encoder.spec.model}' comes as ONNX graphs, of which patches cannot be read: "
            "--patches and --rerank are for tiny and open_clip models"
        )
    patches, source = encoder.folder / PATCHES, parse_model(encoder.spec.model)
    if not is_exported(patches, PATCH_VERSION):
        _link_own_graphs(source, cache, encoder.spec)
    if not is_exported(patches, PATCH_VERSION):
        with cache.lock(encoder.spec.space):
            if not is_exported(patches, PATCH_VERSION):  # another process may have been at it
                with extra("torch", f"preparing the patches of '{source.name}'"):
                    from mmsearch.encoders.open_clip import load_model
                    from mmsearch.encoders.patch_towers import export_patch_towers

                notify(f"preparing the patches of '{encoder.spec.model}' for this machine (once)")
                model = load_model(source)
                if model.spec.space != encoder.spec.space:
                    raise ModelNotFound(
                        f"the weights of '{encoder.spec.model}' are not those that the index was "
                        "made with; put those back, or index into another folder"
                    )
                export_patch_towers(model, encoder.folder)
    return PatchEncoder(encoder)


def with_checked_precision(
    encoder: Encoder,
    cache: ModelCache,
    asked: str,
    count: int,
    sample: Callable[[], Pixels],
    notify: Notify = log.info,
) -> Encoder:
    """The encoder in the precision that serves a run best; looks at the faster ones first.

    Args:
        asked: the precision that was asked for, or "auto".
        count: how many pictures the run is going to embed.
        sample: gives pictures like these to compare on, (n, height, width, 3).
    """
    from mmsearch.encoders.openvino import OpenVinoEncoder
    from mmsearch.encoders.precision import INT8_IMAGE, WORTH_CHECKING, read_verdicts

    if not isinstance(encoder, OpenVinoEncoder):
        return encoder
    model, folder = encoder.spec.model, encoder.folder

    def is_due() -> bool:
        if asked == "int8":
            return count > 0 and not (folder / INT8_IMAGE).is_file()
        unknown = not KNOWN.get(model, NOTHING_KNOWN).precisions and not read_verdicts(folder)
        return asked == "auto" and count >= WORTH_CHECKING and unknown

    if not is_due():
        return encoder
    if asked == "int8":
        with extra("int8", "--precision int8"):
            metadata.version("nncf")  # to import it takes seconds, and is for another process
    from mmsearch.encoders.checking import check_precisions

    notify(f"looking which precision '{model}' is fast and exact in on this machine (once)")
    with cache.lock(encoder.spec.space):
        if is_due():  # else another process has been at it
            check_precisions(folder, sample(), notify)
    return _open_converted(folder, model, asked, notify)


def pick_device(asked: str) -> str:
    """The device to embed a corpus on: "auto" is a CUDA card where torch sees one."""
    if asked.partition(":")[0] == "cpu":  # torch's cpu:0 is the CPU like any other
        return "cpu"
    if asked != "auto":
        return asked
    if not Path("/dev/nvidiactl").exists():  # spares most machines torch's import
        return "cpu"
    with suppress(ModuleNotFoundError):  # without the extra 'torch' there is nothing for a GPU
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu"

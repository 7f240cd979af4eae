"""Models through open_clip and torch: loading, identity, and the torch runtime."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import text_global_pool
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mmsearch.encoders.base import usable
from mmsearch.encoders.int8_rows import dequantise_rows, is_scale
from mmsearch.encoders.registry import (
    ALIGNED,
    HEADS,
    KNOWN,
    NOTHING_KNOWN,
    OWN_FOLDER,
    AlignedFolder,
    ModelSource,
    base_source,
    cached_files,
    file_hash,
    own_text_files,
    read_aligned,
    require_network,
    require_weights,
    tower_source,
)
from mmsearch.encoders.tokenizer import ClipTokenizer, Tokenize, build_tokenizer, read_merges
from mmsearch.errors import ModelNotFound, in_a_line
from mmsearch.networks.aligned import AlignedHeads, AlignedModel, HeadsConfig
from mmsearch.types import IMAGE, TEXT, Batch, EncoderSpec, Modality, Preprocess, Vectors

#: Bumped when what goes into a space's hash changes.
_IDENTITY_VERSION = 1

#: The tensor that holds constants of the graphs beside a file of weights (scripts/bundle_model.py).
#: open_clip drops what has this name, which older text towers had, and reads the rest as ever.
CONSTANTS = "text.transformer.embeddings.position_ids"
#: In the metadata of such a file: its header before.
BEFORE = "before"
VOCABULARY = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"


@dataclass(frozen=True)
class LoadedModel:
    """An open_clip model in fp32 on the CPU, in eval mode, and what is known of it."""

    network: nn.Module
    spec: EncoderSpec
    source: ModelSource


def load_model(source: ModelSource) -> LoadedModel:
    """Loads a model with open_clip's own loader, fetching weights where they are not cached.

    Raises:
        ModelNotFound: weights that are missing, cannot be fetched or do not fit.
        UsageError: a model that comes as ONNX graphs.
    """
    aligned = read_aligned(Path(source.location)) if source.kind == "local-dir" else None
    if aligned is not None:
        return _load_aligned(source, aligned)
    require_network(source)
    require_weights(source)
    try:
        with quiet_open_clip():
            packed = _packed_weights(source)
            network = create_network(
                source.open_clip_name,
                pretrained=source.pretrained,
                force_quick_gelu=wants_quick_gelu(source),
                load_weights=packed is None,
                require_pretrained=packed is None,
                weights_only=True,
            )
            if packed is not None:
                network.load_state_dict(packed)
    except Exception as error:
        # open_clip and torch answer weights that do not fit with nearly any exception there is.
        reason = in_a_line(error, 300)
        raise ModelNotFound(f"model '{source.name}' cannot be loaded: {reason}") from error
    network.eval()
    return LoadedModel(network, _spec(source, network), source)


def create_network(name: str, **options: Any) -> nn.Module:
    """open_clip's `create_model` in fp32, also for a folder that holds a text tower's config.

    Its `hf_model_name` is "." there, for the folder itself; open_clip alone takes a name of the
    hub's, or a path that only one machine has.
    """
    folder = name.removeprefix("local-dir:")
    text = open_clip.get_model_config(name)["text_cfg"] if folder != name else {}
    if text.get("hf_model_name") == OWN_FOLDER:
        named = {"hf_model_name": folder, "hf_model_pretrained": False}
        options["text_cfg"] = {**text, **named}
    network: nn.Module = open_clip.create_model(name, precision="fp32", **options)
    tower: Any = getattr(network, "text", None)
    if isinstance(tower, HFTextEncoder):
        # Where every attribute is asked for, transformers warns of a loss without a name.
        tower.transformer.loss_function = None
    return network


def _packed_weights(source: ModelSource) -> dict[str, torch.Tensor] | None:
    """The weights of a folder that has some in int8, which open_clip does not read."""
    if source.kind != "local-dir":
        return None
    path = Path(source.location) / "open_clip_model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        if not any(map(is_scale, file.keys())):
            return None
    state = load_file(path)
    state.pop(CONSTANTS, None)
    return dequantise_rows(state)


def _load_aligned(source: ModelSource, aligned: AlignedFolder) -> LoadedModel:
    """A frozen model with the heads that `mmsearch train align` put on top."""
    base = load_model(base_source(source))
    if base.spec.space != aligned.space:
        raise ModelNotFound(
            f"the weights of '{aligned.base}' are not those that the heads of '{source.name}' were "
            "made for; put those back, or train the heads again"
        )
    folder = Path(source.location)
    heads = load_heads(folder)
    network = AlignedModel(base.network, heads).eval()
    identity = json.dumps([_IDENTITY_VERSION, base.spec.space, file_hash(folder / HEADS)])
    spec = replace(
        base.spec,
        model=source.name,
        space=hashlib.sha256(identity.encode()).hexdigest()[:32],
        dim=heads.config.dim,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        licence=f"that of its base ({base.spec.licence}), and of what it was trained on",
    )
    return LoadedModel(network, spec, source)


def load_heads(folder: Path) -> AlignedHeads:
    """The heads in a model's folder, to project vectors with (`encode_image`, `encode_text`).

    Raises:
        ModelNotFound: there are none.
    """
    aligned = read_aligned(folder)
    if aligned is None:
        raise ModelNotFound(f"{folder}: no {ALIGNED} there, so it holds no heads")
    try:
        heads = AlignedHeads(HeadsConfig(**aligned.heads))
        heads.load_state_dict(load_file(folder / HEADS))
    except Exception as error:
        raise ModelNotFound(
            f"{folder / HEADS}: heads that cannot be loaded: {in_a_line(error)}"
        ) from error
    return heads.eval()


@contextmanager
def quiet_open_clip() -> Any:
    """Drops what open_clip logs in this thread: errors that it also raises.

    It logs with the root logger, to which `logging` adds a handler if there is none: so there is
    one for as long. Each call takes away its own alone, so that they may overlap.
    """
    thread = threading.get_ident()

    def is_of_another(record: logging.LogRecord) -> bool:
        return record.thread != thread

    root, handler = logging.getLogger(), logging.NullHandler()
    root.addFilter(is_of_another)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(is_of_another)


def _spec(source: ModelSource, network: nn.Module) -> EncoderSpec:
    config = model_config(source)
    text = config["text_cfg"]
    wanted = open_clip.get_model_preprocess_cfg(network)
    size = wanted["size"]
    preprocess = Preprocess(
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        mean=tuple(wanted["mean"]),
        std=tuple(wanted["std"]),
        interpolation=wanted["interpolation"],
        resize_mode=wanted["resize_mode"],
        fill_color=wanted["fill_color"],
    )
    tokenizer = _tokenizer_kind(text)
    options = {
        "clean": "whitespace" if tokenizer == "json" else "lower",
        **(text.get("tokenizer_kwargs") or {}),
    }
    return EncoderSpec(
        model=source.name,
        space=_identity(source, config, preprocess, network),
        dim=int(config["embed_dim"]),
        inputs={
            IMAGE: asdict(preprocess),
            TEXT: {
                "context_length": int(text.get("context_length", 77)),
                "tokenizer": tokenizer,
                "clean": options["clean"],
            },
        },
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        licence=KNOWN.get(source.name, NOTHING_KNOWN).licence or "see the model's card",
    )


def _tokenizer_kind(text: dict[str, Any]) -> str:
    """Who makes ids of texts, as `EncoderSpec.tokenizer` has it."""
    if set(text.get("tokenizer_kwargs") or {}) - {"clean"} or "tokenizer_mode" in text:
        return "open_clip"
    if not text.get("hf_tokenizer_name"):
        return "clip"
    return "json" if text.get("hf_model_name") == OWN_FOLDER else "open_clip"


def wants_quick_gelu(source: ModelSource) -> bool:
    """OpenAI's weights need another activation; open_clip only warns where a name lacks it."""
    if source.kind != "tag":
        return False
    known = open_clip.get_pretrained_cfg(source.architecture, source.location)
    return bool(known.get("quick_gelu"))


def model_config(source: ModelSource) -> dict[str, Any]:
    """The architecture, as open_clip describes it."""
    config = open_clip.get_model_config(source.open_clip_name)
    if config is None:
        raise ModelNotFound(f"open_clip knows no architecture '{source.architecture}'")
    return {**config, "quick_gelu": True} if wants_quick_gelu(source) else dict(config)


def _identity(
    source: ModelSource, config: dict[str, Any], preprocess: Preprocess, network: nn.Module
) -> str:
    """The space: a hash over architecture, weights and preprocessing."""
    files = [path for path in cached_files(source) or [] if path.suffix != ".json"]
    weights = [_weights_hash(path) for path in files] or [_state_hash(network)]
    document = {
        "version": _IDENTITY_VERSION,
        "architecture": config,
        "weights": weights,
        "preprocess": asdict(preprocess),
        "head": None,  # heads of our own have an identity of their own: _load_aligned
    }
    if source.kind == "local-dir" and (own := own_text_files(Path(source.location))):
        document["text"] = [file_hash(path) for path in own]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _state_hash(network: nn.Module) -> str:
    """For weights whose file open_clip keeps to itself."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        found.update(name.encode() + value.cpu().numpy().tobytes())
    return found.hexdigest()


def _weights_hash(path: Path) -> str:
    """The hash of a file of weights, as it was before constants of graphs were added to it."""
    if path.suffix != ".safetensors":
        return file_hash(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        before, constants = metadata.pop(BEFORE, "").encode(), header.pop(CONSTANTS, None)
        ends = [about["data_offsets"][1] for about in header.values()]  # before what was added
        header |= {"__metadata__": metadata} if metadata else {}
        if not before or constants is None or header != json.loads(before):
            return file_hash(path)
        found = hashlib.sha256(struct.pack("<Q", len(before)) + before)
        found.update(file.read(max(ends)))
        return found.hexdigest()


class ImageTower(nn.Module):
    """u8 pixels (n, height, width, 3) to unit vectors (n, dim): normalisation is inside."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.network: Any = model.network
        how = model.spec.preprocess
        self.size = how.size
        self.register_buffer("mean", torch.tensor(how.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(how.std).view(1, 3, 1, 1))

    def inputs(self) -> tuple[torch.Tensor, list[int]]:
        """An example to trace it with, and the shape of what it takes."""
        # Two rows: with one, tracing would take the batch for a constant.
        return torch.zeros(2, *self.size, 3, dtype=torch.uint8), [-1, *self.size, 3]

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        image = pixels.permute(0, 3, 1, 2).to(self.mean.dtype) / 255
        return (image - self.mean) / self.std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.network.encode_image(self.normalised(pixels)), dim=-1)


class TextTower(nn.Module):
    """Token ids (n, context_length) to unit vectors (n, dim)."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.network: Any = model.network
        self.length = model.spec.context_length

    def inputs(self) -> tuple[torch.Tensor, list[int]]:
        """An example to trace it with, and the shape of what it takes."""
        return torch.zeros(2, self.length, dtype=torch.int64), [-1, self.length]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.network.encode_text(ids), dim=-1)


class MaskedTextTower(TextTower):
    """The same for ids that were cut after the longest text, (n, l).

    It is for text towers of transformers' that leave out what is padded with zeros.
    """

    @classmethod
    def fits(cls, model: LoadedModel) -> bool:
        """Whether a model has such a text tower."""
        return masks_padding(tower_network(model.network))

    def inputs(self) -> tuple[torch.Tensor, list[int]]:
        return super().inputs()[0] + 1, [-1, -1]


class CausalTextTower(TextTower):
    """The same for ids that were cut after the longest text, (n, l).

    It is for text towers with a causal mask: what stands behind a text's last token changes
    nothing, and takes most of the time.
    """

    @classmethod
    def fits(cls, model: LoadedModel) -> bool:
        """Whether a model has such a text tower."""
        network = tower_network(model.network)
        return (
            isinstance(network, open_clip.CLIP)
            and network.attn_mask is not None
            and network.text_pool_type in ("argmax", "eos")
        )

    def inputs(self) -> tuple[torch.Tensor, list[int]]:
        return super().inputs()[0], [-1, -1]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return _causal_text(self.network, ids)


def masks_padding(network: Any) -> bool:
    """Whether zeros behind a text change nothing, so that they can be cut off."""
    text = getattr(network, "text", None)
    return isinstance(text, HFTextEncoder) and text.config.pad_token_id == 0


def tower_network(network: Any) -> Any:
    """The network below all heads."""
    while isinstance(network, AlignedModel):
        network = network.base
    return network


def _causal_text(network: Any, ids: torch.Tensor) -> torch.Tensor:
    """Unit vectors, as `encode_text` gives them for ids of the whole context length."""
    if isinstance(network, AlignedModel):
        return network.heads.encode_text(_causal_text(network.base, ids), normalize=True)
    length = ids.shape[1]
    rows = network.token_embedding(ids) + network.positional_embedding[:length]
    rows = network.transformer(rows, attn_mask=network.attn_mask[:length, :length])
    end = getattr(network, "text_eos_id", None)
    found = text_global_pool(network.ln_final(rows), ids, network.text_pool_type, eos_token_id=end)
    return projected(network, found)


def projected(network: Any, features: torch.Tensor) -> torch.Tensor:
    """What a text tower's transformer makes of texts, or tokens, as unit vectors of the space."""
    projection = network.text_projection
    if projection is not None:
        is_layer = isinstance(projection, nn.Linear)
        features = projection(features) if is_layer else features @ projection
    return nn.functional.normalize(features, dim=-1)


def own_tokenizer_file(source: ModelSource) -> Path:
    """The `tokenizer.json` of a model that has it in its folder."""
    return Path(tower_source(source).location) / "tokenizer.json"


def own_tokenizer(source: ModelSource, context_length: int) -> Tokenize:
    """The tokenizer that open_clip picks for a model with one of its own."""
    try:
        tokenizer = open_clip.get_tokenizer(tower_source(source).open_clip_name)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ModelNotFound(
            f"'{source.name}' has a tokenizer of its own, which could not be loaded: "
            f"{in_a_line(error)}"
        ) from error
    return lambda texts: np.asarray(tokenizer(list(texts), context_length=context_length), np.int64)


class TorchEncoder:
    """The torch runtime: what OpenVINO is checked against, and what a GPU runs."""

    def __init__(self, model: LoadedModel, device: str = "cpu", precision: str = "fp32") -> None:
        self.spec = model.spec
        self.precision = precision
        self._device = torch.device(device)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._is_card = self._device.type == "cuda"
        self._images = ImageTower(model).to(self._device).eval()
        if self._is_card:  # as the pixels lie: nothing has to be turned round for a convolution
            self._images = self._images.to(memory_format=torch.channels_last)
        self._texts = TextTower(model).to(self._device).eval()
        length, clean = model.spec.context_length, model.spec.tokenizer_clean
        self._tokenize: Tokenize = (
            ClipTokenizer(lambda: build_tokenizer(read_merges(VOCABULARY)), length, clean)
            if model.spec.tokenizer == "clip"
            else own_tokenizer(model.source, length)
        )

    @property
    def batch(self) -> int:
        return 16 if self._device.type == "cpu" else 64

    def with_streams(self, count: int) -> Self:  # noqa: ARG002 - the protocol's
        """Itself: torch shares the cores, or a card, among those that call."""
        return self

    def with_language(self, code: str) -> Self:  # noqa: ARG002 - the protocol's
        return self

    def warm_up(self, modality: Modality, *, wait: bool = True) -> None:
        """Nothing to do: torch compiles nothing, and the weights are where they should be."""

    def encode(self, modality: Modality, batch: Batch) -> Vectors:
        if modality == TEXT:
            return self._run(self._texts, torch.from_numpy(self._tokenize(list(batch))))
        return self._run(self._images, torch.from_numpy(np.ascontiguousarray(batch)))

    def _run(self, tower: nn.Module, batch: torch.Tensor) -> Vectors:
        if len(batch) == 0:
            return np.empty((0, self.spec.dim), dtype=np.float32)
        half = self._dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=half):
            if self._is_card:  # copied while the card is still at what another thread gave it
                batch = batch.pin_memory()
            found = tower(batch.to(self._device, non_blocking=self._is_card))
            unit = nn.functional.normalize(found.float(), dim=-1).cpu().numpy()
        return usable(unit, self.spec.model, self.precision)

"""The network of a recipe: as it is before the first step, and as it is kept."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from mmsearch.encoders.int8_rows import dequantise_rows, is_scale, quantise_rows
from mmsearch.encoders.open_clip import (
    create_network,
    load_model,
    masks_padding,
    model_config,
    quiet_open_clip,
)
from mmsearch.encoders.registry import OWN_FOLDER, tower_source
from mmsearch.errors import UsageError, in_a_line
from mmsearch.store.files import write_durably
from mmsearch.training.losses import SIGLIP_BIAS, SIGLIP_SCALE
from mmsearch.training.recipe import ModelTable, Recipe
from mmsearch.training.runs import Place, load_weights, save_weights
from mmsearch.training.views import preprocess_of

_LENGTHS = 4  # groups of texts of about one length


def start_network(table: ModelTable, loss: str, place: Place) -> nn.Module:
    """The network as it is before the first step.

    Raises:
        UsageError: no such architecture, or weights that do not fit.
        ModelNotFound: the model to start from is not on this machine.
    """
    bias = {"init_logit_scale": math.log(SIGLIP_SCALE), "init_logit_bias": SIGLIP_BIAS}
    if table.weights is not None:
        source = place.model(table.weights)
        if tower_source(source) != source:
            raise UsageError(
                f"model.weights: '{table.weights}' is heads on a frozen model; start from that one"
            )
        network = load_model(source).network
        if loss == "siglip" and getattr(network, "logit_bias", None) is None:
            raise UsageError("model.weights: the loss 'siglip' needs a model with a logit bias")
    else:
        try:
            with quiet_open_clip():  # it warns of the weights that are not asked for
                network = create_network(
                    _architecture(table),
                    load_weights=False,
                    **(bias if loss == "siglip" else {}),
                )
        except Exception as error:
            raise UsageError(
                f"model.config: '{table.config}' cannot be made: {in_a_line(error, 300)}"
            ) from error
    for name, file in table.parts.items():
        _load_part(network, name, place.data / file)
    for name in table.int8:
        _module(network, name, "model.int8")
    return network


def _module(network: nn.Module, name: str, key: str) -> nn.Module:
    """A part of the network, which the recipe names under `key`."""
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise UsageError(f"{key}: the model has no module '{name}'") from error


def _architecture(table: ModelTable) -> str:
    """The architecture that is not trained yet, as open_clip takes it."""
    assert table.config is not None
    return f"local-dir:{table.config}" if Path(table.config).is_dir() else table.config


def _load_part(network: nn.Module, name: str, file: Path) -> None:
    part = _module(network, name, "model.parts")
    try:
        is_safe = file.suffix == ".safetensors"
        state = load_weights(file) if is_safe else torch.load(file, "cpu", weights_only=True)
        missing, unexpected = part.load_state_dict(state, strict=False)
    except Exception as error:
        raise UsageError(
            f"{file}: weights that do not fit '{name}': {in_a_line(error, 300)}"
        ) from error
    # Folded batch norms lack the counter that only training would use.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        odd = ", ".join([*missing, *unexpected][:5])
        raise UsageError(f"{file}: weights that do not fit '{name}': {odd}")


def tokenizer_of(recipe: Recipe, place: Place, network: nn.Module) -> Any:
    """The model's own tokenizer, as open_clip picks it: texts to token ids (n, length).

    Raises:
        UsageError: it cannot be loaded, or the recipe does something that it cannot.
    """
    weights = recipe.model.weights
    name = place.model(weights).open_clip_name if weights else _architecture(recipe.model)
    length = int(getattr(network, "context_length", 77))
    try:
        tokenizer = open_clip.get_tokenizer(name, context_length=length)
    except Exception as error:
        raise UsageError(
            f"the tokenizer of '{Path(name).name}' cannot be loaded: {in_a_line(error)}"
        ) from error
    if recipe.word_drop and not _pads_with_zeros(tokenizer):
        raise UsageError("word_drop: only for tokenizers of CLIP's and BERT's kinds")
    return tokenizer


def _pads_with_zeros(tokenizer: Any) -> bool:
    """Whether ids are a first token, the text's, a last token, and zeros."""
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return True
    own = getattr(tokenizer, "tokenizer", None)
    return own is not None and own.pad_token_id == 0 and own.cls_token_id is not None


def is_below(name: str, tops: Sequence[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


class Shift(nn.Module):
    """What is left of a batch norm in eval mode that only adds a number to each channel."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.bias = norm.bias
        self.then = getattr(norm, "act", nn.Identity())  # timm's have their activation inside

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.then(rows + self.bias[:, None, None])
        return found


def drop_folded_norms(network: nn.Module, modules: Sequence[str]) -> None:
    """Takes batch norms whose scale is folded into the layer before, and which stay in eval mode.

    A convolution learns its scale itself.

    Args:
        modules: those below which norms are in eval mode.
    """
    for name, norm in list(network.named_modules()):
        if isinstance(norm, nn.BatchNorm2d) and is_below(name, modules) and _only_adds(norm):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, Shift(norm))


def _only_adds(norm: nn.BatchNorm2d) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None or not norm.affine:
        return False
    one = torch.ones_like(variance)
    return bool(
        torch.equal(norm.weight, one)
        and not mean.any()
        and torch.allclose(variance + norm.eps, one, rtol=1e-6, atol=0)
    )


def check_size(network: Any, size: int) -> None:
    """Looks whether an image tower takes pictures of that many pixels a side.

    Raises:
        UsageError: it takes those of its own size alone, as transformers with positions do.
    """
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval().encode_image(torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever the tower raises
        raise UsageError(f"train_size: the image tower does not take {size} pixels") from error
    finally:
        network.train(was_training)


def encode_texts(network: Any, ids: torch.Tensor) -> torch.Tensor:
    """The unit vectors of token ids (n, l), in their order, (n, dim).

    Where zeros behind a text change nothing, texts of about one length go through the network
    together, cut after the longest: most are half as long as the longest of a batch.
    """
    if not masks_padding(network):
        found: torch.Tensor = network.encode_text(ids, normalize=True)
        return found
    order = (ids != 0).sum(dim=1).argsort()
    parts = [
        network.encode_text(part[:, : int((part != 0).any(dim=0).sum())], normalize=True)
        for part in ids[order].chunk(_LENGTHS)
    ]
    return torch.cat(parts)[order.argsort()]


def kept_state(network: nn.Module, table: ModelTable) -> dict[str, torch.Tensor]:
    """The weights as they are kept: in fp16 or int8 where the recipe says so."""
    state = quantise_rows(network.state_dict(), table.int8)
    return {
        name: value.half() if table.half and value.is_floating_point() and not is_scale(name)
        else value
        for name, value in state.items()
    }  # fmt: skip


def round_to_kept(network: nn.Module, table: ModelTable) -> None:
    """Makes the weights what they are once they were kept, so that this is what is measured."""
    network.load_state_dict(dequantise_rows(kept_state(network, table)))


def save_model(network: nn.Module, table: ModelTable, tokenizer: Any, place: Place) -> None:
    """Writes an open_clip `local-dir:` folder; its config, without which it is none, last."""
    if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):  # not open_clip's own
        tokenizer.save_pretrained(str(place.folder))
    save_weights(place.folder / "open_clip_model.safetensors", kept_state(network, table))
    if table.weights is not None:
        config = model_config(place.model(table.weights))
    else:
        config = dict(open_clip.get_model_config(_architecture(table)))
    if config["text_cfg"].get("hf_model_name") == OWN_FOLDER:
        text: Any = network.text
        text.config.to_json_file(place.folder / "config.json")
    for part, key in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        if key in config[part]:  # or open_clip would fetch weights only to replace them
            config[part] = {**config[part], key: False}
    if getattr(network, "logit_bias", None) is not None:
        config["init_logit_bias"] = SIGLIP_BIAS
    document = {
        "model_cfg": config,
        "preprocess_cfg": dataclasses.asdict(preprocess_of(network)),
    }
    write_durably(
        place.folder / "open_clip_config.json", (json.dumps(document, indent=2) + "\n").encode()
    )

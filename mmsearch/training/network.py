"""The network of a recipe: as it is before the first step, and as it is kept."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from mmsearch.encoders.open_clip import load_model, model_config, quiet_open_clip
from mmsearch.encoders.registry import tower_source
from mmsearch.errors import UsageError, in_a_line
from mmsearch.store.files import write_durably
from mmsearch.training.losses import SIGLIP_BIAS, SIGLIP_SCALE
from mmsearch.training.recipe import ModelTable, Recipe
from mmsearch.training.runs import Place, State, load_weights, save_weights
from mmsearch.training.views import preprocess_of
from mmsearch.training.words import give_meanings


def start_network(table: ModelTable, loss: str, place: Place) -> nn.Module:
    """The network as it is before the first step.

    Raises:
        UsageError: no such architecture, or weights that do not fit.
        ModelNotFound: the model to start from is not at hand.
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
                network = open_clip.create_model(
                    _architecture(table),
                    load_weights=False,
                    precision="fp32",
                    **(bias if loss == "siglip" else {}),
                )
        except Exception as error:
            raise UsageError(
                f"model.config: '{table.config}' cannot be made: {in_a_line(error, 300)}"
            ) from error
    for name, file in table.parts.items():
        _load_part(network, name, place.data / file)
    if table.words is not None:
        give_meanings(network, place.data / table.words)
    return network


def _architecture(table: ModelTable) -> str:
    """The architecture that is not trained yet, as open_clip takes it."""
    assert table.config is not None
    return f"local-dir:{table.config}" if Path(table.config).is_dir() else table.config


def _load_part(network: nn.Module, name: str, file: Path) -> None:
    try:
        part = network.get_submodule(name)
    except AttributeError as error:
        raise UsageError(f"model.parts: the model has no module '{name}'") from error
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


def merge_state(network: nn.Module, state: State) -> None:
    """Puts what a stage learned into the whole network; what it did not hold stays."""
    network.load_state_dict({**network.state_dict(), **state})


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
            f"the tokenizer of '{Path(name).name}' cannot be loaded: {in_a_line(error)}; models "
            "with one of their own need the hf extra: pip install 'mmsearch[hf]'"
        ) from error
    if recipe.word_drop and not isinstance(tokenizer, open_clip.SimpleTokenizer):
        raise UsageError("word_drop: only for models with CLIP's byte-pair tokenizer")
    return tokenizer


def save_model(network: nn.Module, table: ModelTable, tokenizer: Any, place: Place) -> None:
    """Writes an open_clip `local-dir:` folder; its config, without which it is none, last."""
    if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):  # not open_clip's own
        tokenizer.save_pretrained(str(place.folder))
    state = {
        name: value.half() if table.half and value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    save_weights(place.folder / "open_clip_model.safetensors", state)
    if table.weights is not None:
        config = model_config(place.model(table.weights))
    else:
        config = dict(open_clip.get_model_config(_architecture(table)))
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

"""The patch and token towers of an open_clip model in torch, and their conversion."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.timm_model import TimmModel
from torch import nn

from mmsearch.encoders.open_clip import LoadedModel
from mmsearch.encoders.openvino import convert_graph
from mmsearch.encoders.patch_encoder import larger_size, write_patch_towers
from mmsearch.errors import UsageError


class PatchTower(nn.Module):
    """Pixels (n, height, width, 3) as bytes to the vector (n, dim) and the patches (n, p, dim).

    Patches pass through what follows the pooling in the model itself, so that they lie in its
    space (as in MaskCLIP, Zhou et al. 2022). The picture is mirrored first.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: LoadedModel) -> None:
        """Takes a model with an image tower of open_clip's own or of timm's convolutional ones.

        Raises:
            UsageError: another model.
        """
        super().__init__()
        network, how = model.network, model.spec.preprocess
        self.visual: Any = network.visual if isinstance(network, CLIP) else None
        self.is_grid = isinstance(self.visual, TimmModel)
        self.register_buffer("mean", torch.tensor(how.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(how.std).view(1, 3, 1, 1))
        self.size = how.size
        try:
            with torch.inference_mode():
                _, patches = self(torch.zeros(1, *how.size, 3, dtype=torch.uint8))
            if patches.ndim != 3 or patches.shape[1] < 2 or patches.shape[2] != model.spec.dim:
                raise ValueError(f"patches of the shape {tuple(patches.shape)}")
        except Exception as error:  # whatever a tower of another kind raises
            raise UsageError(
                f"'{model.spec.model}' has no patches that mmsearch can read: --rerank and "
                "--patches are for open_clip's own image towers and timm's convolutional ones"
            ) from error
        if self.is_grid:  # a transformer's positions are those of its own size
            stride = round((how.size[0] * how.size[1] / patches.shape[1]) ** 0.5)
            self.size = larger_size(how.size, stride)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image = pixels.permute(0, 3, 1, 2).float().flip(3) / 255
        image = (image - self.mean) / self.std
        if self.is_grid:
            features = self.visual.trunk.forward_features(image)
            vectors = self.visual.head(self.visual.trunk.forward_head(features))
            patches = self.visual.head(features.flatten(2).transpose(1, 2))
        else:
            found = self.visual.forward_intermediates(
                image, indices=1, normalize_intermediates=True, output_fmt="NLC"
            )
            vectors = found["image_features"]
            patches = found["image_intermediates"][0] @ self.visual.proj
        return nn.functional.normalize(vectors, dim=-1), nn.functional.normalize(patches, dim=-1)


class TokenTower(nn.Module):
    """Token ids (n, context_length) to tokens in the space, (n, context_length, dim)."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.network: Any = model.network

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.network.forward_intermediates(
            text=ids, text_indices=1, normalize_intermediates=True, intermediates_only=True
        )["text_intermediates"][0]
        projection = self.network.text_projection
        if projection is not None:
            linear = isinstance(projection, nn.Linear)
            found = projection(found) if linear else found @ projection
        return nn.functional.normalize(found, dim=-1)


def export_patch_towers(model: LoadedModel, folder: Path) -> None:
    """Converts a model's patch and token towers into the folder of its converted model.

    Raises:
        UsageError: not a model whose patches can be read.
    """
    patches, tokens = PatchTower(model).eval(), TokenTower(model).eval()
    height, width = patches.size
    length = model.spec.context_length
    graphs = {
        # Two rows: with one, tracing would take the batch for a constant.
        "patches": (
            patches,
            torch.zeros(2, height, width, 3, dtype=torch.uint8),
            [-1, height, width, 3],
        ),
        "tokens": (tokens, torch.zeros(2, length, dtype=torch.int64), [-1, length]),
    }
    converted = {}
    for name, (tower, example, shape) in graphs.items():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks on Python control flow
            try:
                converted[name] = convert_graph(tower, example_input=example, input=shape)
            except Exception as error:  # whatever OpenVINO raises for an operation it lacks
                raise UsageError(
                    f"the patches of '{model.spec.model}' cannot be converted: "
                    f"{' '.join(str(error).split())[:200]}"
                ) from error
    write_patch_towers(folder, converted, (height, width))

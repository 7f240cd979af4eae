"""The patch and token towers of an open_clip model in torch, and their conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.timm_model import TimmModel
from torch import nn

from mmsearch.encoders.open_clip import (
    ImageTower,
    LoadedModel,
    MaskedTextTower,
    TextTower,
    masks_padding,
    projected,
)
from mmsearch.encoders.openvino import (
    EMBEDDINGS,
    ExportError,
    save_towers,
    takes_embeddings,
    whole_or_not,
)
from mmsearch.encoders.patch_encoder import PATCH_VERSION, PATCHES
from mmsearch.errors import UsageError


class PatchTower(ImageTower):
    """Pixels (n, height, width, 3) as bytes to the vector (n, dim) and the patches (n, p, dim).

    Patches pass through what follows the pooling in the model itself, so that they lie in its
    space (as in MaskCLIP, Zhou et al. 2022). The picture is mirrored first.
    """

    def __init__(self, model: LoadedModel) -> None:
        """Takes a model with towers whose parts can be read.

        The image tower is open_clip's own or one of timm's convolutional ones, the text tower
        open_clip's own or one of transformers' that pads with zeros.

        Raises:
            UsageError: another model.
        """
        super().__init__(model)
        has_tokens = isinstance(self.network, CLIP) or masks_padding(self.network)
        self.visual: Any = self.network.visual if has_tokens else None
        self.is_grid = isinstance(self.visual, TimmModel)
        height, width = self.size
        try:
            with torch.inference_mode():
                _, patches = self(torch.zeros(1, height, width, 3, dtype=torch.uint8))
            if patches.ndim != 3 or patches.shape[1] < 2 or patches.shape[2] != model.spec.dim:
                raise ValueError(f"patches of the shape {tuple(patches.shape)}")
        except Exception as error:  # whatever a tower of another kind raises
            raise UsageError(
                f"'{model.spec.model}' has no patches that mmsearch can read: --rerank and "
                "--patches are for CLIP models of open_clip's own, with timm's convolutional image "
                "towers too, and with text towers of BERT's kind"
            ) from error
        if self.is_grid:  # a transformer's positions are those of its own size
            stride = round((height * width / patches.shape[1]) ** 0.5)
            # Nine sevenths of its size, in whole patches.
            height, width = (max(1, round(side * 9 / 7 / stride)) * stride for side in self.size)
            self.size = height, width

    def forward(self, pixels: torch.Tensor) -> Any:
        image = self.normalised(pixels.flip(2))
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


class TokenTower(TextTower):
    """Token ids (n, context_length) to tokens in the space, (n, context_length, dim)."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.network.forward_intermediates(
            text=ids, text_indices=1, normalize_intermediates=True, intermediates_only=True
        )["text_intermediates"][0]
        return projected(self.network, found)


class MaskedTokenTower(MaskedTextTower):
    """The same for ids that were cut after the longest text, (n, l), and towers that allow it."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        text = self.network.text
        found = text.transformer(input_ids=ids, attention_mask=(ids != 0).long())
        return nn.functional.normalize(text.proj(found.last_hidden_state), dim=-1)


def export_patch_towers(model: LoadedModel, folder: Path) -> None:
    """Converts a model's patch and token towers into the folder of its converted model.

    Raises:
        UsageError: not a model whose patches can be read.
    """
    patches = PatchTower(model)
    cuts_texts = MaskedTextTower.fits(model)
    tokens = MaskedTokenTower(model) if cuts_texts else TokenTower(model)
    towers: dict[str, ImageTower | TextTower] = {"patches": patches, "tokens": tokens}
    manifest = {"version": PATCH_VERSION, "size": list(patches.size), "cuts_texts": cuts_texts}
    try:
        with whole_or_not(folder / PATCHES) as draft:
            save_towers(draft, towers, manifest, take_table=takes_embeddings(folder))
            (draft / EMBEDDINGS).unlink(missing_ok=True)  # the model's own are the same
    except ExportError as error:
        raise UsageError(
            f"the patches of '{model.spec.model}' cannot be converted: {error}"
        ) from error

"""Local towers against open_clip itself."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from mmsearch.config import load_settings
from mmsearch.encoders.encoder_provider import EncoderProvider
from mmsearch.encoders.loading import ModelCache, open_encoder, open_patch_encoder
from mmsearch.encoders.open_clip import LoadedModel, TorchEncoder, load_model
from mmsearch.encoders.openvino import Towers
from mmsearch.encoders.patch_towers import PatchTower, TokenTower
from mmsearch.encoders.registry import parse_model
from mmsearch.errors import ModelNotFound, UnreadableError, UsageError

pytestmark = pytest.mark.slow

TEXTS = ["a dog :!(", "two people on a beach at sunset", ""]  # "!" is token 0
ARCHITECTURE = "ViT-S-32-alt"


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A model of open_clip's own kind, with random weights."""
    torch.manual_seed(1)
    network = open_clip.create_model(ARCHITECTURE)
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    torch.save(network.state_dict(), path)
    return parse_model(f"{ARCHITECTURE}:{path}")


def pixels_for(size):
    return np.random.default_rng(5).integers(0, 256, (3, *size, 3), dtype=np.uint8)


def by_torch(network, spec, pixels):
    """Mirrored and normalised, as open_clip takes it."""
    image = torch.from_numpy(pixels[:, :, ::-1].copy()).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (spec.preprocess.mean, spec.preprocess.std))  # fmt: skip # noqa: E501
    return (image - mean) / std


def unit(rows):
    return nn.functional.normalize(rows, dim=-1).numpy()


def patch_encoder_of(source, cache):
    encoder = open_encoder(source, cache, precision="fp32")
    told = []
    local = open_patch_encoder(encoder, cache, told.append)
    return encoder, local, told


def test_a_convolutional_tower_looks_closer(tiny):
    encoder, local, _ = patch_encoder_of(parse_model("tiny"), ModelCache(load_settings().cache))
    height, width = local.preprocess.size
    assert height > encoder.spec.preprocess.size[0]
    pixels = pixels_for((height, width))
    network = load_model(parse_model("tiny")).network
    image = by_torch(network, local.spec, pixels)
    looks = local.encode(pixels)
    with torch.inference_mode():
        # Their own pooling and head, on a larger picture.
        np.testing.assert_allclose(looks.vectors, unit(network.encode_image(image)), atol=1e-4)
        grid = network.visual.trunk.forward_features(image)
        assert grid.shape[2:] == (height // 32, width // 32)
        expected = [unit(network.visual.head(grid[:, :, y, x]))
                    for y in range(height // 32) for x in range(width // 32)]  # fmt: skip
    np.testing.assert_allclose(looks.patches, np.stack(expected, axis=1), atol=1e-4)


def test_a_transformer_looks_as_in_a_mirror(transformer, tmp_path):
    encoder, local, told = patch_encoder_of(transformer, ModelCache(tmp_path))
    assert "preparing the patches" in told[0]
    assert local.preprocess == encoder.spec.preprocess
    pixels = pixels_for(local.preprocess.size)
    network = load_model(transformer).network
    image = by_torch(network, local.spec, pixels)
    looks = local.encode(pixels)
    visual = network.visual
    with torch.inference_mode():
        np.testing.assert_allclose(looks.vectors, unit(network.encode_image(image)), atol=1e-4)
        seen = []
        visual.transformer.register_forward_hook(lambda module, given, out: seen.append(out))
        network.encode_image(image)
        expected = unit(visual.ln_post(seen[0][:, 1:]) @ visual.proj)
    np.testing.assert_allclose(looks.patches, expected, atol=1e-4)
    _, _, told = patch_encoder_of(transformer, ModelCache(tmp_path))
    assert told == []  # once


def test_tokens_hold_the_text_that_open_clip_pools(transformer, tmp_path):
    encoder, local, _ = patch_encoder_of(transformer, ModelCache(tmp_path))
    tokens = local.tokens(TEXTS)
    ids = encoder.tokenize(TEXTS)
    lengths = ids.argmax(axis=1) + 1  # the end of a text has the highest id
    assert (ids[0, : lengths[0]] == 0).any()
    assert tokens.there.sum(axis=1).tolist() == lengths.tolist()
    assert tokens.rows.shape[:2] == (3, lengths.max())
    # What is pooled is the last token.
    last = tokens.rows[np.arange(3), lengths - 1]
    np.testing.assert_allclose(last, encoder.encode("text", TEXTS), atol=1e-4)
    alone = local.tokens(TEXTS[:1])
    np.testing.assert_allclose(alone.rows[0], tokens.rows[0, : lengths[0]], atol=1e-4)


def test_tokens_of_tiny_are_those_of_torch(tiny):
    encoder, local, _ = patch_encoder_of(parse_model("tiny"), ModelCache(load_settings().cache))
    tokens = local.tokens(TEXTS)
    text = load_model(parse_model("tiny")).network.text
    ids = torch.from_numpy(encoder.tokenize(TEXTS))
    assert tokens.there.sum(axis=1).tolist() == (ids != 0).sum(dim=1).tolist()
    with torch.inference_mode():
        for row, length in enumerate((ids != 0).sum(dim=1)):
            own = text.transformer(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
            expected = unit(text.proj(own))
            np.testing.assert_allclose(tokens.rows[row, :length], expected, atol=1e-4)


def test_models_without_patches_are_refused(transformer, tmp_path):
    loaded = load_model(transformer)
    with pytest.raises(UsageError, match="has no patches that mmsearch can read"):
        PatchTower(LoadedModel(nn.Linear(2, 2), loaded.spec, loaded.source))
    own_text = open_clip.create_model("coca_ViT-B-32").eval()  # neither CLIP nor BERT
    with pytest.raises(UsageError, match="has no patches that mmsearch can read"):
        PatchTower(LoadedModel(own_text, loaded.spec, loaded.source))
    with pytest.raises(UsageError, match="runs with torch here"):
        open_patch_encoder(TorchEncoder(loaded), ModelCache(tmp_path))
    tower = TokenTower(loaded)
    assert tower(torch.zeros(1, 77, dtype=torch.int64)).shape == (1, 77, loaded.spec.dim)


def test_weights_that_have_changed_are_not_taken(transformer, tmp_path):
    from pathlib import Path

    encoder = open_encoder(transformer, ModelCache(tmp_path), precision="fp32")
    path = Path(transformer.location)
    before = path.read_bytes()
    try:
        torch.manual_seed(2)
        torch.save(open_clip.create_model(ARCHITECTURE).state_dict(), path)
        with pytest.raises(ModelNotFound, match="not those that the index was made with"):
            open_patch_encoder(encoder, ModelCache(tmp_path))
    finally:
        path.write_bytes(before)


def test_a_choice_opens_it_once(tiny):
    choice = EncoderProvider(load_settings(), print, None)
    assert choice.patch_encoder_of(tiny.spec) is choice.patch_encoder_of(tiny.spec)


class SlowTowers(Towers):
    compiled = 0

    def compile(self, tower):
        self.compiled += 1
        time.sleep(0.05)
        return lambda batch: [batch + len(tower)]


def test_a_tower_is_compiled_once_for_all_threads():
    towers = SlowTowers("'a model'")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: towers.run("abc", np.full(2, n)), range(8)))
    assert towers.compiled == 1
    np.testing.assert_array_equal(found, [[[n + 3] * 2] for n in range(8)])


def test_damaged_towers_are_one_line(transformer, tmp_path):
    encoder, local, _ = patch_encoder_of(transformer, ModelCache(tmp_path))
    tokens = encoder.folder / "patches" / "tokens.xml"
    tokens.write_bytes(tokens.read_bytes()[:100])
    with pytest.raises(UnreadableError, match=r"re-ranking with '.*' cannot be run here"):
        local.tokens(TEXTS)

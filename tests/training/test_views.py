"""Cached views: the same as computed on the spot, and resumable."""

from __future__ import annotations

import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from toys import ARCHITECTURE

from mmsearch.errors import LabelsError, UsageError
from mmsearch.training.views import (
    Pictures,
    compute_views,
    plain_transform,
    preprocess_of,
    split_network,
    training_transform,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network():
    """A small MobileNet, whose first layers can be parted from the rest."""
    torch.manual_seed(0)
    text = ARCHITECTURE["model_cfg"]["text_cfg"]
    vision = {"timm_model_name": "mobilenetv2_035", "timm_pool": "", "timm_proj": "mlp",
              "image_size": 32}  # fmt: skip
    return open_clip.model.CustomTextCLIP(16, vision, text).eval()


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    found = []
    for number in range(5):
        found.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(found[-1])
    return found


FIRST = ["visual.trunk.conv_stem", "visual.trunk.bn1", "visual.trunk.blocks.0"]


def test_both_parts_together_are_the_whole(network):
    prefix, rest = split_network(network, FIRST)
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(rest.encode_image(prefix(image)), network.encode_image(image))
    assert rest.visual.trunk.blocks[1] is not network.visual.trunk.blocks[1]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["visual.trunk.blocks.1"], "not the beginning"),
        (["visual.trunk.bn1", "visual.trunk.conv_stem"], "not the beginning"),
        (["visual.trunk.nothing"], "no module 'visual.trunk.nothing'"),
        (["token_embedding"], "no module|not the beginning"),
    ],
)
def test_other_modules_are_refused(network, modules, message):
    with pytest.raises(UsageError, match=message):
        split_network(network, modules)


def test_a_cached_view_is_what_torch_computes_on_the_spot(network, files, tmp_path):
    """OpenVINO and a file between them; fp16 is all that is lost."""
    prefix, _ = split_network(network, FIRST)
    pictures = Pictures(files, plain_transform(preprocess_of(network)), 32)
    cached = compute_views(prefix, pictures, 2, 0, tmp_path / "c", "toy", lambda progress: None)
    assert len(cached) == 5
    for place in range(5):
        with torch.no_grad():
            expected = prefix(pictures.load(place, 0)[None])[0]
        torch.testing.assert_close(cached.load(place, 1), expected, atol=5e-3, rtol=5e-3)


def test_views_differ_and_depend_on_the_seed_alone(network, files, tmp_path):
    prefix, _ = split_network(network, FIRST)
    transform = training_transform(preprocess_of(network), {"scale": [0.5, 1.0]}, flip=True)
    pictures = Pictures(files, transform, 32)
    quiet = lambda progress: None  # noqa: E731
    first = compute_views(prefix, pictures, 3, 0, tmp_path / "a", "toy", quiet)
    again = compute_views(prefix, pictures, 3, 0, tmp_path / "b", "toy", quiet)
    other = compute_views(prefix, pictures, 3, 1, tmp_path / "a", "toy", quiet)
    assert torch.equal(first.load(2, 1), again.load(2, 1))
    assert not torch.equal(first.load(2, 1), first.load(2, 2))
    assert not torch.equal(first.load(2, 1), other.load(2, 1))


def test_computing_views_resumes_where_it_was_stopped(network, files, tmp_path):
    prefix, _ = split_network(network, FIRST)
    pictures = Pictures(files * 30, plain_transform(preprocess_of(network)), 32)

    def views_of(folder, on_progress=lambda progress: None):
        return compute_views(prefix, pictures, 2, 0, folder, "toy", on_progress, portion=40)

    def stop(progress):
        if progress.done > 2 * 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        views_of(tmp_path / "c", stop)
    told = []
    whole = views_of(tmp_path / "c", told.append)
    assert [one.done for one in told] == [2 * 120 + 60]  # the last portion alone
    fresh = views_of(tmp_path / "d")
    assert len(whole) == 150
    for place in range(150):
        for view in range(2):
            assert torch.equal(whole.load(place, view), fresh.load(place, view))


def test_the_plain_transform_is_what_a_search_does(network, files):
    """The pixels of mmsearch's own preprocessing, normalised."""
    from mmsearch.media.fit import fit
    from mmsearch.types import Preprocess

    how = preprocess_of(network)
    found = plain_transform(how)(Image.open(files[0]).convert("RGB"))
    own = fit(
        Image.open(files[0]).convert("RGB"),
        Preprocess((32, 32), how.mean, how.std, how.interpolation, how.resize_mode),
    )
    mean, std = np.array(how.mean, np.float32), np.array(how.std, np.float32)
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), (own / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize(
    ("augment", "message"),
    [({"scael": [1, 1]}, "scael"), ({"ratio": [1, 1]}, "use_timm"), ({"re_prob": 0.5}, "use_timm")],
)
def test_augmentation_that_would_not_happen_is_an_error(network, augment, message):
    with pytest.raises(UsageError, match=message):
        training_transform(preprocess_of(network), augment, flip=False)


def test_a_damaged_picture_is_named(tmp_path, network):
    (tmp_path / "bad.jpg").write_bytes(b"not a picture")
    pictures = Pictures([tmp_path / "bad.jpg"], plain_transform(preprocess_of(network)), 32)
    with pytest.raises(LabelsError, match=r"bad\.jpg: cannot be trained on"):
        pictures.load(0, 0)


def test_loading_leaves_torch_s_random_numbers_alone(network, files):
    """The network's dropout draws from the same generator."""
    transform = training_transform(preprocess_of(network), {"scale": [0.5, 1.0]}, flip=True)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Pictures(files, transform, 32).load(0, 9)
    assert torch.equal(torch.rand(4), expected)


def test_a_seed_decides_all_of_an_augmentation(network, files):
    """open_clip's jitter draws from Python, timm's from NumPy: neither is disturbed by it."""
    how = preprocess_of(network)
    for augment in (
        {"scale": [0.4, 1.0], "color_jitter": [0.4, 0.4, 0.4, 0.1], "color_jitter_prob": 0.5,
         "gray_scale_prob": 0.3},
        {"use_timm": True, "scale": [0.4, 1.0], "color_jitter": 0.4, "re_prob": 0.5},
    ):  # fmt: skip
        pictures = Pictures(files, training_transform(how, augment, flip=True), 32)
        random.seed(1), np.random.seed(1)  # noqa: NPY002
        drawn = (random.random(), np.random.random())  # noqa: NPY002
        first = [pictures.load(0, seed) for seed in range(12)]
        for _ in range(3):
            again = [pictures.load(0, seed) for seed in range(12)]
            assert all(map(torch.equal, first, again))
        assert len({picture.sum().item() for picture in first}) > 6
        random.seed(1), np.random.seed(1)  # noqa: NPY002
        pictures.load(0, 5)
        assert (random.random(), np.random.random()) == drawn  # noqa: NPY002


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_file_of_views_is_made_again(network, files, tmp_path, keep):
    prefix, _ = split_network(network, FIRST)
    pictures = Pictures(files, plain_transform(preprocess_of(network)), 32)

    def views_of():
        return compute_views(prefix, pictures, 2, 0, tmp_path / "v", "toy", lambda p: None)

    whole = views_of().load(3, 1)
    (done,) = (tmp_path / "v").glob("*.safetensors")
    done.write_bytes(done.read_bytes()[:keep])
    assert torch.equal(views_of().load(3, 1), whole)

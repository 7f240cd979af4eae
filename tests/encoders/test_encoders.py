"""Encoders against open_clip and torch."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from fakes import paint
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmsearch.config import load_settings
from mmsearch.encoders import openvino
from mmsearch.encoders.int8_rows import dequantise_rows
from mmsearch.encoders.loading import ModelCache, open_encoder, open_space
from mmsearch.encoders.open_clip import CONSTANTS, TorchEncoder, load_model
from mmsearch.encoders.patch_encoder import PATCH_VERSION, PATCHES
from mmsearch.encoders.registry import cached_files, file_hash, parse_model
from mmsearch.errors import ModelNotFound, UsageError
from mmsearch.media.fit import fit
from mmsearch.media.image import decode

pytestmark = pytest.mark.slow

TEXTS = ["a dog runs over the grass", "Two people, one red car!", "", "x " * 300]
#: A small architecture of open_clip's own, for weights that are random but shaped like real ones.
ARCHITECTURE = "ViT-S-32-alt"


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(3)
    small = [Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)) for _ in range(6)]
    sizes = [(224, 224), (500, 375), (375, 500), (640, 200), (90, 300), (1000, 1000)]
    return [image.resize(size, Image.Resampling.BICUBIC)
            for image, size in zip(small, sizes, strict=True)]  # fmt: skip


def cosines(a, b):
    return (np.asarray(a) * np.asarray(b)).sum(axis=1)


def by_open_clip(name, pretrained, pictures, texts):
    """The whole of it by open_clip alone: its loader, its transform, its tokenizer."""
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(i) for i in pictures]), normalize=True)
        return images.numpy(), model.encode_text(tokenizer(texts), normalize=True).numpy()


def agrees(encoder, source, pictures, least):
    pixels = np.stack([fit(image, encoder.spec.preprocess) for image in pictures])
    images, texts = by_open_clip(source.open_clip_name, source.pretrained, pictures, TEXTS)
    assert cosines(encoder.encode("image", pixels), images).min() > least
    assert cosines(encoder.encode("text", TEXTS), texts).min() > least


def test_tiny_is_what_open_clip_makes_of_its_weights_in_full(tiny, pictures, tmp_path):
    """open_clip alone reads no int8, and takes no "." for the folder of a text tower."""
    bundled, folder = parse_model("tiny"), tmp_path / "tiny"
    shutil.copytree(bundled.location, folder)
    state = load_file(folder / "open_clip_model.safetensors")
    del state[CONSTANTS]
    save_file(dequantise_rows(state), folder / "open_clip_model.safetensors")
    config = folder / "open_clip_config.json"
    config.write_text(config.read_text().replace('"."', json.dumps(str(folder))))
    agrees(tiny, parse_model(str(folder)), pictures, 0.9999)


def test_bf16_is_close_on_real_photos(tiny, data):
    encoder = open_space(tiny.spec.space, "tiny", ModelCache(load_settings().cache), "bf16")
    files = sorted((data / "photos").glob("*.jpg"))[:40]
    how = tiny.spec.preprocess
    pixels = np.stack([fit(decode(file.read_bytes()).image, how) for file in files])
    assert cosines(encoder.encode("image", pixels), tiny.encode("image", pixels)).min() > 0.98
    assert cosines(encoder.encode("text", TEXTS), tiny.encode("text", TEXTS)).min() > 0.98


def test_tiny_squashes_as_its_training_photos_were(tiny):
    assert tiny.spec.preprocess.resize_mode == "squash"
    assert tiny.spec.preprocess.mean == (0.5, 0.5, 0.5)


def test_vectors_are_float32_of_length_one(tiny):
    vectors = tiny.encode("text", ["a", "b"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_nothing_gives_no_vectors(tiny):
    dim, size = tiny.spec.dim, tiny.spec.preprocess.size
    assert tiny.encode("text", []).shape == (0, dim)
    assert tiny.encode("image", np.empty((0, *size, 3), np.uint8)).shape == (0, dim)


def test_batches_do_not_mix(tiny, pictures):
    pixels = np.stack([fit(image, tiny.spec.preprocess) for image in pictures])
    alone = np.concatenate([tiny.encode("image", one[None]) for one in pixels])
    assert cosines(tiny.encode("image", pixels), alone).min() > 0.99999


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE)
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(model.state_dict(), path)
    return path


def test_bf16_agrees_after_fp32_was_compiled(checkpoint, tmp_path):
    """In one cache folder, on CPUs with AMX, OpenVINO gave NaN for what was compiled second."""
    if "BF16" not in openvino.capabilities():
        pytest.skip("this CPU has no bf16")
    source = parse_model(f"{ARCHITECTURE}:{checkpoint}")
    exported = open_encoder(source, ModelCache(tmp_path), precision="fp32").folder
    agreement = json.loads((exported / "manifest.json").read_text())["agreement"]
    assert agreement["bf16"] > 0.99
    pixels = np.random.default_rng(1).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    found = [openvino.OpenVinoEncoder(exported, name).encode("image", pixels)
             for name in ("fp32", "bf16", "fp32", "bf16")]  # fmt: skip
    assert all(cosines(one, found[0]).min() > 0.99 for one in found)


def test_vectors_that_are_no_numbers_are_refused(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder, ignore=shutil.ignore_patterns("compiled", "image.*"))
    graph = openvino.openvino_core().read_model(tiny.folder / "image.xml")
    result = graph.get_results()[0].input_value(0)
    nothing = openvino.ov.opset13.multiply(result, np.float32(np.nan))
    openvino.ov.save_model(
        openvino.ov.Model([nothing], graph.get_parameters()), folder / "image.xml"
    )
    for precision, remedy in (("bf16", "use '--precision fp32'"), ("fp32", "weights are damaged")):
        broken = openvino.OpenVinoEncoder(folder, precision)
        with pytest.raises(UsageError, match=remedy):
            broken.encode("image", np.zeros((1, *tiny.spec.preprocess.size, 3), np.uint8))


def test_a_local_checkpoint_runs_on_both_runtimes_as_in_open_clip(checkpoint, pictures, tmp_path):
    source = parse_model(f"{ARCHITECTURE}:{checkpoint}")
    encoder = open_encoder(source, ModelCache(tmp_path), precision="fp32")
    assert isinstance(encoder, openvino.OpenVinoEncoder)
    agrees(encoder, source, pictures, 0.9999)
    agrees(TorchEncoder(load_model(source)), source, pictures, 0.9999)


def test_other_weights_are_another_space(checkpoint, tmp_path):
    other = tmp_path / "other.pt"
    state = torch.load(checkpoint, weights_only=True)
    state["logit_scale"] = state["logit_scale"] + 1
    torch.save(state, other)
    spaces = {
        load_model(parse_model(f"{ARCHITECTURE}:{p}")).spec.space for p in (checkpoint, other)
    }
    assert len(spaces) == 2


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        load_model(parse_model(f"{ARCHITECTURE}:{path}"))
    assert not (tmp_path / "sprung").exists()


def test_weights_of_another_architecture_are_refused(checkpoint):
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        load_model(parse_model(f"ViT-B-32:{checkpoint}"))


def test_weights_are_hashed_once(tiny, tmp_path):
    """The second start knows the space by the files' sizes and times: not by what is in them."""
    bundled = parse_model("tiny")
    shutil.copytree(bundled.location, tmp_path / "tiny")
    own = dataclasses.replace(bundled, location=str(tmp_path / "tiny"))
    shutil.copytree(tiny.folder, ModelCache(tmp_path / "cache").folder_of(tiny.spec.space))
    assert open_encoder(own, ModelCache(tmp_path / "cache"), precision="fp32").spec == tiny.spec
    weights = tmp_path / "tiny/open_clip_model.safetensors"
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_encoder(own, ModelCache(tmp_path / "cache"), precision="fp32").spec == tiny.spec
    assert load_model(own).spec.space != tiny.spec.space


def test_graphs_of_weights_that_were_replaced_are_not_used(tiny, tmp_path):
    """As after training further into the same folder: they would read something else there."""
    bundled, folder = parse_model("tiny"), tmp_path / "tiny"
    shutil.copytree(bundled.location, folder)
    state = load_file(folder / "open_clip_model.safetensors")
    state["logit_scale"] = state["logit_scale"] + 1
    save_file(state, folder / "open_clip_model.safetensors")
    said = []
    own = dataclasses.replace(bundled, name=f"local-dir:{folder}", location=str(folder))
    encoder = open_encoder(
        own, ModelCache(tmp_path / "cache"), precision="fp32", notify=said.append
    )
    assert encoder.spec.space not in ("", tiny.spec.space)
    assert "preparing" in said[0]


def test_weights_that_have_moved_are_found_again(tiny, tmp_path):
    """Converted models link to the weights of an installation, which may go."""
    bundled, cache = parse_model("tiny"), ModelCache(tmp_path / "cache")
    shutil.copytree(bundled.location, tmp_path / "first")
    shutil.copytree(bundled.location, tmp_path / "second")
    for place in ("first", "second"):
        own = dataclasses.replace(bundled, location=str(tmp_path / place))
        encoder = open_encoder(own, cache, precision="fp32", notify=pytest.fail)
        assert encoder.encode("text", ["a dog"]).shape == (1, tiny.spec.dim)
        if place == "first":
            shutil.rmtree(tmp_path / "first")
            assert open_space(tiny.spec.space, "tiny", cache, "fp32") is None


def test_a_link_to_weights_that_were_replaced_is_not_followed(tiny, tmp_path):
    """Two folders of one content share a cache; one of them is trained further."""
    bundled, cache, copy = parse_model("tiny"), ModelCache(tmp_path / "cache"), tmp_path / "copy"
    shutil.copytree(bundled.location, copy)
    own = dataclasses.replace(bundled, location=str(copy))
    open_encoder(own, cache, precision="fp32").encode("text", ["a dog"])
    weights = copy / "open_clip_model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    shutil.rmtree(cache.folder_of(tiny.spec.space) / "compiled")
    found = open_encoder(bundled, cache, precision="fp32").encode("text", ["a dog"])
    fresh = ModelCache(tmp_path / "fresh")
    expected = open_encoder(bundled, fresh, precision="fp32").encode("text", ["a dog"])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_graphs_of_another_config_are_not_used(tiny, tmp_path):
    bundled, folder = parse_model("tiny"), tmp_path / "tiny"
    shutil.copytree(bundled.location, folder)
    config = folder / "open_clip_config.json"
    document = json.loads(config.read_text())
    document["preprocess_cfg"]["mean"] = [0.4, 0.4, 0.4]
    config.write_text(json.dumps(document))
    own = dataclasses.replace(bundled, name=f"local-dir:{folder}", location=str(folder))
    encoder = open_encoder(own, ModelCache(tmp_path / "cache"), precision="fp32")
    assert encoder.spec.preprocess.mean == (0.4, 0.4, 0.4)
    assert encoder.spec.space == load_model(own).spec.space != tiny.spec.space


def test_constants_of_graphs_do_not_hide_other_weights(tiny, tmp_path):
    """The space is that of the file before they were added, if all else is as it was."""
    bundled, folder = parse_model("tiny"), tmp_path / "tiny"
    assert load_model(bundled).spec.space == tiny.spec.space
    shutil.copytree(bundled.location, folder)
    own = dataclasses.replace(bundled, location=str(folder))
    weights = folder / "open_clip_model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    state = load_file(weights)
    first, second = (f"text.transformer.encoder.layer.{n}.output.dense.weight" for n in (0, 1))
    state[first], state[second] = state[second], state[first]
    for kept in (state, {name: value for name, value in state.items() if name != CONSTANTS}):
        save_file({name: value.clone() for name, value in kept.items()}, weights, metadata)
        assert load_model(own).spec.space != tiny.spec.space


def test_the_bundled_graphs_are_those_of_the_bundled_files(tiny):
    """Else nobody without torch could use them, and an index that was made could not be read."""
    assert tiny.spec.space == "615f6b03f7cedf6a3abba98153f9445d"
    bundled = parse_model("tiny")
    folder = Path(bundled.location)
    assert openvino.has_graphs(folder)
    assert openvino.has_graphs(folder / PATCHES, PATCH_VERSION)
    files = {path.name: file_hash(path) for path in cached_files(bundled)}
    assert openvino.read_manifest(folder)["files"] == files


def test_installations_that_share_a_cache_do_not_take_turns(tiny, tmp_path):
    """Each has a `tiny` of its own, of one content."""
    bundled = parse_model("tiny")
    shutil.copytree(bundled.location, tmp_path / "tiny")
    other = dataclasses.replace(bundled, location=str(tmp_path / "tiny"))
    shutil.copytree(tiny.folder, ModelCache(tmp_path / "cache").folder_of(tiny.spec.space))
    said = []
    for source in (bundled, other, bundled, other):
        cache = ModelCache(tmp_path / "cache")
        found = open_encoder(source, cache, precision="fp32", notify=said.append)
        assert found.spec == tiny.spec
    assert not said  # each brings its graphs
    assert list(cache.specs()) == ["tiny"]


def test_a_precision_that_does_not_agree_is_obeyed_with_a_word(tiny, tmp_path):
    cache = ModelCache(tmp_path)
    copy = cache.folder_of(tiny.spec.space)
    shutil.copytree(ModelCache(load_settings().cache).folder_of(tiny.spec.space), copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["agreement"]["bf16"] = 0.9
    (copy / "manifest.json").write_text(json.dumps(manifest))
    said = []
    name = "another/one"  # tiny's own precisions were measured
    assert open_space(tiny.spec.space, name, cache, "bf16", said.append).precision == "bf16"
    assert "differs from fp32 (cosine down to 0.900)" in said[0]
    assert open_space(tiny.spec.space, name, cache, "auto", said.append).precision == "fp32"
    assert len(said) == 1


def test_converting_a_model_tells_nobody(tmp_path):
    """OpenVINO would report to its makers, and leave an id in the home folder."""
    code = (
        "import socket, sys\n"
        "def refuse(*args, **options): raise AssertionError(f'looked up {args}')\n"
        "socket.getaddrinfo = refuse\n"
        "from mmsearch import Engine\n"
        "with Engine.open('i', model='tiny') as engine:\n"
        "    engine.index(['p'])\n"
        "    assert engine.search('red')\n"
        "import openvino\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
    )
    paint(tmp_path / "p" / "a.png", "red")
    environment = {**os.environ, "HOME": str(tmp_path), "MMSEARCH_CACHE": str(tmp_path / "c")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "intel").exists()


def test_a_process_outlives_its_encoders_when_a_signal_comes(tmp_path):
    """OpenVINO's plugins change the signal stack; a handler must still have one afterwards."""
    script = (
        "import gc, os, signal\n"
        "from mmsearch.config import load_settings\n"
        "from mmsearch.encoders.loading import ModelCache, open_encoder\n"
        "from mmsearch.encoders.registry import parse_model\n"
        "encoder = open_encoder(parse_model('tiny'), ModelCache(load_settings().cache))\n"
        "encoder.warm_up('image'); encoder.warm_up('text')\n"
        "del encoder; gc.collect()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"handled\n"), done.stderr


def test_a_model_is_gone_with_its_last_name(tiny):
    """What OpenVINO holds for it is large, and Python's collector does not see it."""
    encoder = openvino.OpenVinoEncoder(tiny.folder)
    encoder.encode("text", ["a word", "antidisestablishmentarianism 1 2 3"])
    encoder.encode("image", np.zeros((1, *tiny.spec.preprocess.size, 3), np.uint8))
    gone = weakref.ref(encoder)
    gc.disable()
    try:
        del encoder
        assert gone() is None
    finally:
        gc.enable()


def test_models_that_load_at_once_leave_the_locale_alone(tiny):
    """OpenVINO sets it, for the whole process, while it looks into its cache."""
    script = (
        "import locale, sys, threading\n"
        "from pathlib import Path\n"
        "from mmsearch.encoders.openvino import OpenVinoEncoder\n"
        "before = locale.setlocale(locale.LC_ALL)\n"
        "assert 'UTF-8' in before\n"
        "def load(tower): OpenVinoEncoder(Path(sys.argv[1])).warm_up(tower)\n"
        "for _ in range(5):\n"
        "    towers = ('image', 'text') * 2\n"
        "    threads = [threading.Thread(target=load, args=(t,)) for t in towers]\n"
        "    for thread in threads: thread.start()\n"
        "    for thread in threads: thread.join()\n"
        "assert locale.setlocale(locale.LC_ALL) == before\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny.folder)], capture_output=True, check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_model_that_openvino_cannot_convert_stays_with_torch(tmp_path, monkeypatch):
    def fail(*_, **options):
        raise RuntimeError("no such operation")

    monkeypatch.setattr("openvino.tools.ovc.convert_model", fail)
    said = []
    bundled, folder = parse_model("tiny"), tmp_path / "without graphs"
    shutil.copytree(bundled.location, folder, ignore=shutil.ignore_patterns("manifest.json"))
    source = dataclasses.replace(bundled, location=str(folder))
    cache = ModelCache(tmp_path)
    for _ in range(2):
        encoder = open_encoder(source, cache, notify=said.append)
        assert isinstance(encoder, TorchEncoder)
    assert sum("stays with torch" in line for line in said) == 1

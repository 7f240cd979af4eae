"""ONNX folders against open_clip, which they were exported from."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnx_models
import open_clip
import pytest
import torch
from fakes import paint
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tokenizers import Tokenizer

from mmsearch.config import load_settings
from mmsearch.encoders.loading import ModelCache, open_encoder, open_patch_encoder
from mmsearch.encoders.openvino import EMBEDDINGS, openvino_core
from mmsearch.encoders.registry import ONNX_FILES, cached_files, parse_model
from mmsearch.engine import Engine
from mmsearch.errors import ModelNotFound, UsageError
from mmsearch.media.fit import fit
from mmsearch.types import Query, Term

pytestmark = pytest.mark.slow

TOWERS = ("image", "text")
TEXTS = [
    "a dog runs over the grass", "Two people, one red car!", "", "x " * 300, "ein Hund am Strand",
    "собака 狗在草地上跑",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for each of the architectures, and what it was exported from."""
    top = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    return {name: (top / name, *make(top / name)) for name, make in onnx_models.MODELS.items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return ModelCache(tmp_path_factory.mktemp("cache"))


def opened(folder, cache, precision="fp32", **options):
    return open_encoder(parse_model(f"onnx:{folder}"), cache, precision=precision, **options)


def tokens_of(folder, spec):
    if spec.tokenizer == "clip":
        return open_clip.SimpleTokenizer(context_length=spec.context_length)
    return open_clip.tokenizer.HFTokenizer(
        str(folder / "textual"), spec.context_length, spec.tokenizer_clean
    )


def cosines(a, b):
    return (np.asarray(a) * np.asarray(b)).sum(axis=1)


@pytest.mark.parametrize("name", onnx_models.MODELS)
def test_it_gives_what_open_clip_gives(models, cache, name):
    folder, network, config = models[name]
    encoder = opened(folder, cache)
    assert encoder.spec.dim == config["embed_dim"]
    rng = np.random.default_rng(3)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize(size)
        for size in [(224, 224), (500, 375), (90, 300)]
    ]
    transform = image_transform_v2(
        PreprocessCfg(**open_clip.get_model_preprocess_cfg(network)), is_train=False
    )
    with torch.no_grad():
        images = network.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True)
        ids = tokens_of(folder, encoder.spec)(TEXTS)
        texts = network.encode_text(ids, normalize=True)
    pixels = np.stack([fit(picture, encoder.spec.preprocess) for picture in pictures])
    np.testing.assert_array_equal(encoder.tokenize(TEXTS), ids.numpy())
    assert cosines(encoder.encode("image", pixels), images.numpy()).min() > 0.9999
    assert cosines(encoder.encode("text", TEXTS), texts.numpy()).min() > 0.9999
    assert encoder.encode("image", pixels[:0]).shape == (0, encoder.spec.dim)
    for again in (encoder.with_streams(2), encoder.with_streams(2), opened(folder, cache)):
        # Once compiled, and once from what is kept of that.
        np.testing.assert_allclose(again.encode("image", pixels), images.numpy(), atol=1e-4)
        np.testing.assert_allclose(again.encode("text", TEXTS), texts.numpy(), atol=1e-4)
    # The table of embeddings is not in the graph a second time.
    table = np.load(encoder.folder / EMBEDDINGS, mmap_mode="r")
    assert table.shape[0] >= config["text_cfg"]["vocab_size"]
    heads = ("visual", "token_embedding", "word_embeddings", "embed_tokens", "logit")
    rest = sum(p.numel() for n, p in network.named_parameters() if not any(h in n for h in heads))
    assert (encoder.folder / "text.bin").stat().st_size < 4 * rest + table.nbytes / 2


def test_most_take_many_at_once(models, cache):
    """What cannot be changed for that is run one by one: the test above covers both."""
    taken = {}
    for name, (folder, _, _) in models.items():
        encoder = opened(folder, cache)
        towers = [
            openvino_core().read_model(encoder.folder / f"{t}.xml") for t in ("image", "text")
        ]
        taken[name] = [tower.inputs[0].partial_shape[0].is_dynamic for tower in towers]
    assert all(image for image, _ in taken.values())
    assert [name for name, (_, text) in taken.items() if text] == ["vit", "resnet", "siglip"]


@pytest.mark.parametrize(
    "names", [("attention_mask", "input_ids"), ("input_ids", "token_type_ids")]
)
def test_the_inputs_of_a_text_tower_are_known_by_their_names(tmp_path, names):
    torch.manual_seed(0)
    tokenizer = onnx_models.unigram_tokenizer()
    tower = onnx_models.MaskedText(tokenizer.get_vocab_size(), 64, 32).eval()
    network = open_clip.CLIP(32, onnx_models.VIT, onnx_models.CLIP_TEXT)
    config = {"embed_dim": 32, "vision_cfg": onnx_models.VIT,
              "text_cfg": {"context_length": 20, "vocab_size": 49408}}  # fmt: skip
    folder = onnx_models.export(
        network, config, tokenizer, "<pad>", tmp_path / "m", masked=tower, inputs=names
    )
    if names[1] == "token_type_ids":
        with pytest.raises(ModelNotFound, match="takes input_ids, token_type_ids"):
            opened(folder, ModelCache(tmp_path))
        return
    encoder = opened(folder, ModelCache(tmp_path))
    ids = tokens_of(folder, encoder.spec)(TEXTS[:3])
    with torch.no_grad():
        expected = tower(ids, (ids != 1).long())
    assert cosines(encoder.encode("text", TEXTS[:3]), expected.numpy()).min() > 0.9999


def test_a_text_tower_with_an_attention_mask(tmp_path, cache):
    """M-CLIP's: the mask follows from the ids."""
    torch.manual_seed(0)
    tokenizer = onnx_models.unigram_tokenizer()
    tower = onnx_models.MaskedText(tokenizer.get_vocab_size(), 64, 32).eval()
    config = {"embed_dim": 32, "vision_cfg": onnx_models.VIT,
              "text_cfg": {"context_length": 20, "vocab_size": 49408}}  # fmt: skip
    network = open_clip.CLIP(32, onnx_models.VIT, onnx_models.CLIP_TEXT)
    folder = onnx_models.export(network, config, tokenizer, "<pad>", tmp_path / "m", masked=tower)
    encoder = opened(folder, cache)
    ids = tokens_of(folder, encoder.spec)(TEXTS[:3])
    with torch.no_grad():
        expected = tower(ids, (ids != 1).long())
    assert cosines(encoder.encode("text", TEXTS[:3]), expected.numpy()).min() > 0.9999


def test_an_index_is_made_and_searched_with_it(models, tmp_path):
    for number, colour in enumerate(("red", "green", "blue")):
        paint(tmp_path / "photos" / f"{colour}.png", colour, mark=number + 1)
    index = tmp_path / "index"
    name = f"onnx:{models['siglip'][0]}"
    with Engine.open(index, model=name) as engine:
        assert engine.index([tmp_path / "photos"]).added == 3
        (own, *_) = engine.search(Query((Term(image=tmp_path / "photos/red.png"),)))
        assert own.path.name == "red.png"
        assert len(engine.search("red")) == 3
        with pytest.raises(UsageError, match="comes as ONNX graphs"):
            engine.index(patches=True)


def test_it_is_prepared_once_and_then_its_files_may_go(models, tmp_path):
    folder, said = tmp_path / "gone", []
    shutil.copytree(models["vit"][0], folder)
    cache = ModelCache(tmp_path / "cache")
    first = opened(folder, cache, notify=said.append)
    assert [line for line in said if "preparing" in line]
    said.clear()
    again = opened(folder, cache, notify=said.append)
    assert (said, again.spec) == ([], first.spec)
    same = tmp_path / "same"
    folder.rename(same)
    assert opened(same, cache, notify=said.append).spec.space == first.spec.space
    assert not said
    paint(tmp_path / "photos/a.png", "red")
    settings = load_settings(index=tmp_path / "index", cache=tmp_path / "cache")
    with Engine(settings, model=f"onnx:{same}") as engine:
        engine.index([tmp_path / "photos"])
    shutil.rmtree(same)
    with Engine(settings) as engine:
        assert engine.search("red")


def test_another_tokenizer_or_size_is_another_space(models, tmp_path, cache):
    spaces = {opened(models["vit"][0], cache).spec.space}
    for file, change in (
        ("visual/preprocess_cfg.json", {"resize_mode": "squash"}),
        ("textual/tokenizer_config.json", {"padding_side": "left"}),
    ):
        folder = tmp_path / file.replace("/", "-")
        shutil.copytree(models["vit"][0], folder)
        stored = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(stored | change))
        spaces.add(opened(folder, cache).spec.space)
    assert len(spaces) == 3


@pytest.mark.parametrize("missing", ONNX_FILES)
def test_what_a_folder_lacks_is_named(models, tmp_path, missing):
    folder = tmp_path / "incomplete"
    shutil.copytree(models["vit"][0], folder)
    (folder / missing).unlink()
    with pytest.raises(ModelNotFound, match=missing):
        cached_files(parse_model(f"onnx:{folder}"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("visual/model.onnx", "no graph"),
        ("textual/model.onnx", ""),
        ("config.json", "{}"),
        ("config.json", "[1"),
        ("textual/tokenizer.json", '{"model": {"type": "BPE"}}'),
        ("textual/tokenizer_config.json", "{}"),
        ("textual/tokenizer_config.json", "[]"),
        ("visual/preprocess_cfg.json", '{"size": 32}'),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(models, tmp_path, file, content):
    folder = tmp_path / "broken"
    shutil.copytree(models["siglip"][0], folder)
    (folder / file).write_text(content)
    with pytest.raises(ModelNotFound, match="cannot be used") as raised:
        opened(folder, ModelCache(tmp_path / "cache"))
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("config.json", {"embed_dim": 999}, "vectors of 192 numbers, not 999"),
        ("config.json", {"text_cfg": {"context_length": 9}}, "texts have 16 tokens, not 9"),
        ("visual/preprocess_cfg.json", {"size": [224, 48]}, "224 x 224, not 224 x 48"),
        ("visual/preprocess_cfg.json", {"std": [0, 0, 0]}, "three numbers above 0"),
        ("visual/preprocess_cfg.json", {"resize_mode": "foo"}, "resize_mode is one of"),
        ("visual/preprocess_cfg.json", {"interpolation": "random"}, "interpolation is one of"),
        ("visual/preprocess_cfg.json", {"fill_color": [9, 0, 0]}, "fill_color is 0"),
    ],
)
def test_what_does_not_fit_its_graphs_is_one_line(models, tmp_path, file, change, told):
    folder = tmp_path / "unfit"
    shutil.copytree(models["siglip"][0], folder)
    stored = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(stored | change))
    with pytest.raises(ModelNotFound, match=told) as raised:
        opened(folder, ModelCache(tmp_path / "cache"))
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def test_a_token_that_the_graph_does_not_know_is_told(models, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(models["siglip"][0], folder)
    tokenizer = Tokenizer.from_file(str(folder / "textual/tokenizer.json"))
    tokenizer.add_tokens(["another"])
    tokenizer.save(str(folder / "textual/tokenizer.json"))
    encoder = opened(folder, ModelCache(tmp_path / "cache"))
    assert encoder.encode("text", ["a dog"]).shape == (1, 192)
    with pytest.raises(UsageError, match=r"a token that .* does not know"):
        encoder.encode("text", ["another dog"])


def test_what_lies_beside_the_files_changes_no_space(models, tmp_path, cache):
    folder = tmp_path / "same"
    shutil.copytree(models["vit"][0], folder)
    for name in ("visual/.DS_Store", "textual/vocab.json", "textual/merges.txt", "README.md"):
        (folder / name).write_text("whatever")
    assert opened(folder, cache).spec.space == opened(models["vit"][0], cache).spec.space
    (folder / "visual/weights").write_text("a part of a graph")
    assert opened(folder, cache).spec.space != opened(models["vit"][0], cache).spec.space


def test_what_a_killed_preparation_left_is_taken_away(models, tmp_path):
    folder = models["vit"][0]
    cache = ModelCache(tmp_path)
    space = opened(folder, cache).spec.space
    shutil.rmtree(cache.folder_of(space))
    left = cache.folder_of(space).parent / f".draft-{space}-killed"
    left.mkdir()
    opened(folder, cache)
    assert not left.exists()


def test_a_language_is_given_to_those_that_take_one(models, tmp_path):
    said = []
    paint(tmp_path / "photos/a.png", "red")
    (tmp_path / "photos/a.txt").write_text("ein hund am strand")

    def engine(name, language):
        settings = load_settings(index=tmp_path / name, cache=tmp_path / "cache", language=language)
        return Engine(settings, model=f"onnx:{models[name][0]}", notify=said.append)

    with engine("nllb", "deu_Latn") as german:
        german.index([tmp_path / "photos"])
        (hit,) = german.search("ein hund am strand", to="caption")
        assert hit.score > 0.9999
    with engine("nllb", None) as english:
        (hit,) = english.search("ein hund am strand", to="caption")
        assert hit.score < 0.9999
    with engine("nllb", "de") as wrong, pytest.raises(UsageError, match="no language 'de'"):
        wrong.search("hund")
    assert not [line for line in said if "language" in line]
    with engine("vit", "deu_Latn") as other:
        other.index([tmp_path / "photos"])
        other.search("hund")
    assert len([line for line in said if "'deu_Latn' has no effect" in line]) == 1


def test_a_tokenizer_of_a_kind_that_is_not_known_is_refused(models, tmp_path, cache):
    folder = tmp_path / "strange"
    shutil.copytree(models["siglip"][0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_cfg"]["tokenizer_kwargs"] = {"strip_sep_token": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotFound, match="a tokenizer that mmsearch does not know"):
        opened(folder, cache)


def test_what_needs_torch_says_that_it_comes_as_onnx(models, tmp_path, cache):
    from mmsearch.encoders.open_clip import load_model

    folder, said = models["vit"][0], []
    with pytest.raises(UsageError, match="comes as ONNX graphs"):
        load_model(parse_model(f"onnx:{folder}"))
    with pytest.raises(UsageError, match="of which patches cannot be read"):
        open_patch_encoder(opened(folder, cache), cache)
    with pytest.raises(ModelNotFound, match=f"name it as onnx:{folder}"):
        cached_files(parse_model(f"local-dir:{folder}"))
    for _ in range(2):
        found = opened(folder, ModelCache(tmp_path), device="cuda", notify=said.append)
        assert found.encode("text", ["a"]).shape == (1, 32)
    assert len([line for line in said if "runs on the CPU" in line]) == 1


def test_its_image_tower_runs_in_int8(models, tmp_path):
    from mmsearch.encoders.checking import check_precisions

    encoder = opened(models["vit"][0], ModelCache(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (96, 32, 32, 3), dtype=np.uint8)
    verdicts = check_precisions(encoder.folder, pixels, print)
    assert verdicts["fp32"].overlap == 1
    assert "int8" in verdicts
    assert opened(models["vit"][0], ModelCache(tmp_path), "int8").encode("image", pixels).shape


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for one repository."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder, log, breaks, *rest):
        self.folder, self.log, self.breaks = folder, log, breaks
        super().__init__(*rest)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.partition("?")[0]
        self.log.append((self.command, name, self.headers.get("Range")))
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        files = [str(path.relative_to(self.folder)) for path in paths]
        if name.startswith("/api/models/org/name/tree"):
            tree = [{"type": "file", "path": file, "oid": file, "size": path.stat().st_size}
                    for file, path in zip(files, paths, strict=True)]  # fmt: skip
            self._answer(json.dumps(tree).encode(), 200)
            return
        if name.startswith("/api/models/org/name"):
            document = {"id": "org/name", "modelId": "org/name", "sha": "c" * 40, "private": False,
                        "siblings": [{"rfilename": file} for file in files],
                        "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
            self._answer(json.dumps(document).encode(), 200)
            return
        _, _, file = name.partition(f"/resolve/{'c' * 40}/")
        path = self.folder / file
        if name == "/" or not file:
            self._answer(b"", 200)
        elif path.is_file():
            content, start = path.read_bytes(), 0
            if self.headers.get("Range"):
                start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            self._answer(content[start:], 206 if start else 200, {
                "ETag": f'"{len(content)}-{file}"'.replace("/", "-"), "X-Repo-Commit": "c" * 40,
                "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
            }, file)  # fmt: skip
        else:
            self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})

    def _answer(self, content, status, headers=None, file=""):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if file in self.breaks:  # the connection goes in the midst of the file
            self.breaks.remove(file)
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def hub(folder, breaks=()):
    log = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, folder, log, list(breaks)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()


def mmsearch(tmp_path, endpoint, *arguments, code=0):
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1", "MMSEARCH_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "mmsearch", *map(str, arguments)], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_a_repository_is_fetched_resumed_and_then_not_asked_for(models, tmp_path):
    folder, broken = tmp_path / "repository", "visual/model.onnx"
    shutil.copytree(models["siglip"][0], folder)
    (folder / "visual" / "model.armnn").write_text("for another runtime")
    for number in range(3):
        paint(tmp_path / "photos" / f"{number}.png", "red", mark=number + 1)
    index = ("index", tmp_path / "photos", "--index", tmp_path / "index")
    named = (*index, "--model", "hf-hub:org/name")

    def fetched(log):
        return [(name, part) for what, name, part in log if what == "GET" and "/resolve/" in name]

    with hub(folder, breaks=[broken] * 50) as (endpoint, _):
        told = mmsearch(tmp_path, endpoint, *named, code=3)
        assert "run the same command to resume" in told
        assert "Traceback" not in told
    with hub(folder, breaks=[broken]) as (endpoint, log):
        told = mmsearch(tmp_path, endpoint, *named)
        assert "fetching 'hf-hub:org/name'" in told
        assert "3 added" in told
        assert not [name for name, _ in fetched(log) if "textual" in name]  # they had come
        assert not [name for name, _ in fetched(log) if "armnn" in name]
        # Where the connection breaks once, the rest of the file is asked for.
        assert [part for name, part in fetched(log) if broken in name and part]
        log.clear()
        assert "3 unchanged" in mmsearch(tmp_path, endpoint, *index)
        assert "0.png" in mmsearch(tmp_path, endpoint, "search", "red", *index[2:])
        assert not log
    nowhere = "http://127.0.0.1:9"
    assert "0.png" in mmsearch(tmp_path, nowhere, "search", "red", *index[2:])
    shutil.rmtree(tmp_path / "hf")  # what was prepared is all that is needed
    assert "3 unchanged" in mmsearch(tmp_path, nowhere, *named)
    again = ("index", tmp_path / "photos", "--index", tmp_path / "new", *named[-2:])
    assert "3 added" in mmsearch(tmp_path, nowhere, *again)


def test_a_hub_without_such_a_repository_is_one_line(tmp_path):
    paint(tmp_path / "photos" / "a.png", "red")
    (tmp_path / "empty").mkdir()
    with hub(tmp_path / "empty") as (endpoint, _):
        told = mmsearch(tmp_path, endpoint, "index", tmp_path / "photos", "--index",
                        tmp_path / "index", "--model", "hf-hub:org/other", code=3)  # fmt: skip
    assert told.count("\n") <= 2
    assert "'hf-hub:org/other': the hub" in told

"""What the tests share. No test touches the user's data, cache or config folders."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes import FakeEncoder, paint
from PIL import Image

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory):
    """Cache, home and config of a user who has never run mmsearch, and no network."""
    top = tmp_path_factory.mktemp("user")
    settings = {
        "MMSEARCH_CACHE": str(top / "cache"),
        "MMSEARCH_HOME": str(top / "home"),
        "MMSEARCH_CONFIG": str(top / "config.toml"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(top / "huggingface"),
        "IR_DATASETS_HOME": str(top / "ir_datasets"),
        "MPLCONFIGDIR": str(top / "matplotlib"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("MMSEARCH_") and name != "MMSEARCH_DATA":
                patch.delenv(name)
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real photos and labelled sets."""
    folder = Path(os.environ.get("MMSEARCH_DATA", "."))
    if "MMSEARCH_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("no data sets here: set MMSEARCH_DATA (docs/datasets.md)")
    return folder


@pytest.fixture(scope="session")
def tiny():
    """The bundled model, converted once for all tests, in fp32."""
    from mmsearch.config import load_settings
    from mmsearch.encoders.loading import ModelCache, open_encoder
    from mmsearch.encoders.registry import parse_model

    cache = ModelCache(load_settings().cache)
    return open_encoder(parse_model("tiny"), cache, precision="fp32")


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of six small pictures, two of them in a subfolder."""
    folder = tmp_path / "photos"
    for name, colour in {
        "red.png": "red",
        "green.png": "green",
        "blue.jpg": "blue",
        "yellow.bmp": "yellow",
        "more/white.png": "white",
        "more/black.webp": "black",
    }.items():
        paint(folder / name, colour)
    return folder


@dataclass
class Hanging:
    """A program whose decoder never ends with files that hold "hang" and nothing else."""

    flag: Path
    environment: dict[str, str]

    def wait(self):
        """Returns when a decoder has begun with such a file."""
        deadline = time.monotonic() + 100
        while not self.flag.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def hanging(tmp_path_factory):
    """Makes decoders of a process of its own hang: in its environment lies what does it."""
    top = tmp_path_factory.mktemp("hanging")
    (top / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'mmsearch.media.decoder' in sys.orig_argv:\n"
        "    from mmsearch.media import image\n"
        "    real = image.decode\n"
        "    def decode(content, **options):\n"
        "        if content == b'hang':\n"
        f"            open({str(top / 'hangs')!r}, 'w')\n"
        "            while True: pass\n"
        "        return real(content, **options)\n"
        "    image.decode = decode\n"
    )
    return Hanging(top / "hangs", {"PYTHONPATH": str(top)})


@pytest.fixture
def picture(tmp_path):
    """Makes a one-coloured picture of some size in memory."""

    def make(size=(40, 30), colour="red", mode="RGB") -> Image.Image:
        return Image.new(mode, size, colour)

    return make

"""What the tests share. No test touches the user's data, cache or config folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fakes import FakeEncoder, paint
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
_DEFAULT_DATA = REPOSITORY.parent / "shared" / "data"


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
    folder = Path(os.environ.get("MMSEARCH_DATA", _DEFAULT_DATA))
    if not folder.is_dir():
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


@pytest.fixture
def picture(tmp_path):
    """Makes a one-coloured picture of some size in memory."""

    def make(size=(40, 30), colour="red", mode="RGB") -> Image.Image:
        return Image.new(mode, size, colour)

    return make

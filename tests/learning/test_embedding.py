"""What is embedded once is kept."""

from __future__ import annotations

import numpy as np
from fakes import FakeEncoder
from PIL import Image

from mmsearch.learning.embedding import embed_pictures, embed_texts


class Listening(FakeEncoder):
    """Remembers the texts that it was asked to encode."""

    seen = ()

    def encode_texts(self, texts):
        self.seen = (*self.seen, *texts)
        return super().encode_texts(texts)


def quiet(_progress):
    pass


def test_a_text_that_comes_again_is_encoded_once(tmp_path):
    encoder = Listening("x")
    texts = ["red", "green", "red", "a red thing", "green"]
    found = embed_texts(encoder, texts, tmp_path / "cache", "job", quiet)
    np.testing.assert_array_equal(found, FakeEncoder("x").encode_texts(texts))
    assert encoder.seen == ("red", "green", "a red thing")


def test_vectors_are_kept_until_a_picture_or_the_model_changes(tmp_path):
    files = []
    for place in range(3):
        files.append(tmp_path / f"{place}.png")
        Image.new("RGB", (8, 8), (80 * place, 0, 0)).save(files[-1])
    files[1].write_bytes(b"damaged")

    def embed(name):
        encoder = FakeEncoder(name)
        vectors, good = embed_pictures(encoder, files, tmp_path / "cache", "job", quiet)
        assert good.tolist() == [True, False, True]
        return vectors, encoder.images_encoded

    first, encoded = embed("x")
    assert encoded == 2
    again, encoded = embed("x")
    assert encoded == 0
    np.testing.assert_array_equal(again, first)
    assert embed("another")[1] == 2
    Image.new("RGB", (9, 9), "white").save(files[2])
    changed, encoded = embed("x")
    assert encoded == 2
    assert not np.array_equal(changed, first)

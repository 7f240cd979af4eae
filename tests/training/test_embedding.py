"""What is embedded once is kept."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from fakes import FakeEncoder
from PIL import Image

from mmsearch.errors import LabelsError
from mmsearch.training.sets import embed_pictures, embed_texts, unusable


class Listening(FakeEncoder):
    """Remembers the texts that it was asked to encode."""

    seen = ()

    def texts(self, texts):
        self.seen = (*self.seen, *texts)
        return super().texts(texts)


class Stopping(FakeEncoder):
    """Is stopped after some pictures."""

    def images(self, pixels):
        if self.images_encoded >= 3:
            raise KeyboardInterrupt
        return super().images(pixels)


def quiet(_progress):
    pass


def test_a_text_that_comes_again_is_encoded_once(tmp_path):
    encoder = Listening("x")
    texts = ["red", "green", "red", "a red thing", "green"]
    found = embed_texts(encoder, texts, tmp_path / "cache", "job", quiet)
    np.testing.assert_array_equal(found, FakeEncoder("x").encode("text", texts))
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


def pictures(folder, count):
    files = [folder / f"{place}.png" for place in range(count)]
    for place, file in enumerate(files):
        Image.new("RGB", (8, 8), (20 * place, 0, 0)).save(file)
    return files


def test_embedding_goes_on_where_it_was_stopped(tmp_path):
    files = pictures(tmp_path, 8)
    with pytest.raises(KeyboardInterrupt):
        embed_pictures(Stopping("x"), files, tmp_path / "cache", "job", quiet, portion=3)
    told, encoder = [], FakeEncoder("x")
    vectors, _ = embed_pictures(encoder, files, tmp_path / "cache", "job", told.append, portion=3)
    assert encoder.images_encoded == 5
    assert told[-1].done == told[-1].total == 8
    at_once, _ = embed_pictures(FakeEncoder("x"), files, tmp_path / "other", "job", quiet)
    np.testing.assert_array_equal(vectors, at_once)
    assert embed_pictures(encoder, [], tmp_path / "cache", "job", quiet)[0].shape[0] == 0


def test_a_file_that_cannot_be_read_now_is_said_and_not_remembered(tmp_path):
    files = pictures(tmp_path, 3)
    content = files[1].read_bytes()
    files[1].unlink()
    files[1].symlink_to(files[1].name)  # a link that loops is there, and cannot be read
    cache = tmp_path / "cache"
    for look in (unusable, functools.partial(embed_pictures, FakeEncoder("x"))):
        with pytest.raises(LabelsError, match=r"1\.png: cannot be read: Too many levels"):
            look(files, cache, "job", quiet)
    files[1].unlink()
    files[1].write_bytes(content)
    assert embed_pictures(FakeEncoder("x"), files, cache, "job", quiet)[1].all()
    assert unusable(files, cache, "job", quiet) == set()


def test_what_is_damaged_in_the_cache_is_made_anew(tmp_path):
    files = pictures(tmp_path, 3)
    files[2].write_bytes(b"damaged")
    cache = tmp_path / "cache"

    def made():
        texts = embed_texts(FakeEncoder("x"), ["red", "green"], cache, "job", quiet)
        return [*embed_pictures(FakeEncoder("x"), files, cache, "job", quiet), texts,
                unusable(files, cache, "job", quiet)]  # fmt: skip

    first = made()
    kept = sorted(cache.glob("*.safetensors"))
    assert len(kept) == 3
    for file in kept:
        file.write_bytes(file.read_bytes()[:20])
    for one, other in zip(first, made(), strict=True):
        np.testing.assert_array_equal(one, other)

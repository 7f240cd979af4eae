"""A media type and a modality that no code of mmsearch knows: poems, embedded by their words."""

import hashlib

import numpy as np

from mmsearch.media.media_types import Caption, Facts, Segment
from mmsearch.types import EncoderSpec

DIM = 64


class Poem:
    """A poem is one segment for each verse; its first line is its title."""

    kind = "poem"
    suffixes = (".poem",)

    def read(self, file, inputs):
        title, _, verses = file.read().decode("utf-8").partition("\n")
        yield Facts()
        yield Caption(title)
        for place, verse in enumerate(filter(None, map(str.strip, verses.split("\n\n")))):
            letters = np.frombuffer(verse.encode()[: inputs["poem"]["longest"]], np.uint8)
            yield Segment("poem", letters, start_ms=place, end_ms=place + 1)


POEM = Poem()


class WordHashes:
    """Every word is a direction: poems and texts that share words are near."""

    precision, batch = "fp32", 8
    spec = EncoderSpec("hashes", "0" * 32, DIM, {"poem": {"longest": 999}, "text": {}})

    def with_streams(self, count):
        return self

    def warm_up(self, modality, *, wait=True):
        pass

    def encode(self, modality, batch):
        texts = batch if modality == "text" else [bytes(one).decode() for one in batch]
        rows = np.full((len(texts), DIM), 0.01, np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[hashlib.sha256(word.strip(".,").encode()).digest()[0] % DIM] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

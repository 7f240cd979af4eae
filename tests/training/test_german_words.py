"""German words in the places of a vocabulary that are not used."""

from __future__ import annotations

import gzip
import json
import sys

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

sys.path.insert(0, str(REPOSITORY / "scripts"))
from german_words import ROWS, add_german, translate

PAIRS = [
    ("ein Hund", "a dog"), ("ein Hund im Schnee", "a dog in snow"),
    ("Schnee", "snow"), ("eine Katze", "a cat"), ("Katze im Haus", "cat in house"),
]  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["a", "dog", "in", "snow", "cat", "ho", "##use", "h", "s", "k"]
VOCABULARY = ["[PAD]", "[unused0]", "[UNK]", "[unused1]", *WORDS, *(f"##{one}" for one in LETTERS)]


def write_lines(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def place(tmp_path):
    pairs = [{"de": german, "en": english} for german, english in PAIRS]
    captions = ["Hund Hund Hund", "Schnee Schnee", "Katze", "dog dog dog dog"]
    write_lines(tmp_path / "parallel_text.jsonl.gz", pairs * 5)
    write_lines(tmp_path / "multilingual.jsonl.gz", [
        {"split": split, "de": captions, "parallel": pairs[0]} for split in ("train", "test")
    ])  # fmt: skip
    words = {word: place for place, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    save_file({ROWS: torch.randn(len(VOCABULARY), 8)}, tmp_path / "weights.safetensors")
    return tmp_path


def test_words_are_translated_by_the_sentences_that_hold_them():
    found = translate([(german.split(), english.split()) for german, english in PAIRS])
    best = {word: max(meant, key=meant.get) for word, meant in found.items()}
    assert best["Hund"] == "dog"
    assert best["Katze"] == "cat"
    assert best["Schnee"] == "snow"
    assert all(0.1 <= share <= 1 for meant in found.values() for share in meant.values())


def test_the_most_frequent_words_become_tokens_that_mean_what_they_are_translated_with(place):
    file, weights, out = place / "tokenizer.json", place / "weights.safetensors", place / "out"
    add_german(place, weights, file, out)
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    assert tokenizer.encode("Hund").ids == [1]  # the most frequent that was in pieces
    assert tokenizer.encode("Schnee").ids == [3]
    assert len(tokenizer.encode("katze").ids) > 1  # no place is left
    assert tokenizer.encode("a dog").ids == [4, 5]
    before, after = load_file(weights)[ROWS], load_file(out)[ROWS]
    own = [1, 3]
    others = [row for row in range(len(VOCABULARY)) if row not in own]
    assert torch.equal(before[others], after[others])
    for row, meant in ((1, "dog"), (3, "snow")):
        like = torch.cosine_similarity(after[row], before[others], dim=1)
        assert VOCABULARY[others[int(like.argmax())]] == meant

"""Gives a vocabulary of BERT's German words, in the places that it leaves unused.

MiniLM reads English: it cuts a German word into many pieces that mean nothing to it. The most
frequent words of German captions become tokens of their own instead, and each starts as the mean of
the English words that translate it.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

ROWS = "embeddings.word_embeddings.weight"
#: A translation is believed from this probability on.
LEAST = 0.1
ROUNDS = 6
_MOST = 1 << 20  # words of a language


def add_german(folder: Path, weights: Path, tokenizer_file: Path, out: Path) -> None:
    """Writes weights with German words, and puts the words into the tokenizer's file.

    Args:
        folder: of the German captions and the translated sentences.
        weights: the transformer's.
        tokenizer_file: `tokenizer.json`, into which the words are put.
        out: where the weights go.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()

    def split(text: str) -> list[str]:
        text = tokenizer.normalizer.normalize_str(text)
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def pieces(word: str) -> list[int]:
        return list(tokenizer.encode(word, add_special_tokens=False).ids)

    captions, pairs = read_sentences(folder)
    vocabulary = tokenizer.get_vocab()
    unused = sorted(number for name, number in vocabulary.items() if name.startswith("[unused"))
    counts = Counter(word for text in captions for word in split(text))
    words = [word for word, _ in counts.most_common() if len(pieces(word)) > 1][: len(unused)]

    state = load_file(weights)
    rows = state[ROWS]
    meanings = translate([(split(german), split(english)) for german, english in pairs])
    written = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    ids = written["model"]["vocab"]
    names = {number: name for name, number in ids.items()}
    for number, word in zip(unused, words, strict=False):
        rows[number] = meaning(rows, pieces, meanings.get(word, {}) or {word: 1.0})
        del ids[names[number]]
        ids[word] = number
    written["model"]["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
    tokenizer_file.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
    save_file(state, out)


def meaning(
    rows: torch.Tensor, pieces: Callable[[str], list[int]], words: dict[str, float]
) -> torch.Tensor:
    """The mean of some words, each of them the mean of its pieces."""
    found = [share * rows[pieces(word)].mean(0) for word, share in words.items()]
    return torch.stack(found).sum(0) / sum(words.values())


def read_sentences(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """German captions to learn from, and sentences in German and English."""
    captions, pairs = [], []
    for row in read_lines(folder / "multilingual.jsonl.gz"):
        if row["split"] in ("train", "restval"):
            captions += [*row["de"], row["parallel"]["de"]]
            pairs.append((row["parallel"]["de"], row["parallel"]["en"]))
    pairs += [(row["de"], row["en"]) for row in read_lines(folder / "parallel_text.jsonl.gz")]
    return captions, pairs


def read_lines(path: Path) -> Iterable[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def translate(
    pairs: Sequence[tuple[Sequence[str], Sequence[str]]],
) -> dict[str, dict[str, float]]:
    """The likely translations of each word, with their probabilities.

    Words are aligned by IBM's Model 1 (Brown et al. 1993): each English word of a sentence comes
    from one of the German words beside it, or from none.
    """
    german: dict[str, int] = {"": 0}
    english: dict[str, int] = {}
    pairs_of_words, positions, position = [], [], 0
    for ours, theirs in pairs:
        sources = [0, *(german.setdefault(word, len(german)) for word in ours)]
        for word in theirs:
            target = english.setdefault(word, len(english))
            pairs_of_words += [source * _MOST + target for source in sources]
            positions += [position] * len(sources)
            position += 1
    kinds, kind = np.unique(pairs_of_words, return_inverse=True)
    origins, targets = np.divmod(kinds, _MOST)
    likely = np.ones(len(kinds))
    for _ in range(ROUNDS):
        share = likely[kind] / np.bincount(positions, likely[kind])[positions]
        likely = np.bincount(kind, share)
        likely /= np.bincount(origins, likely)[origins]
    german_words, english_words = list(german), list(english)
    found: dict[str, dict[str, float]] = {}
    for one in np.flatnonzero((likely >= LEAST) & (origins > 0)):
        translations = found.setdefault(german_words[origins[one]], {})
        translations[english_words[targets[one]]] = float(likely[one])
    return found

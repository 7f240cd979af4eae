"""CLIP's byte-pair encoding without torch: open_clip's ids, from Hugging Face tokenizers."""

from __future__ import annotations

import functools
import gzip
import html
import itertools
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import regex
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_START_ID, _END_ID = 49406, 49407
_FEW = 64  # words
TEXT_STEP = 8
START, END = "<start_of_text>", "<end_of_text>"
_MERGES = 49152 - 256 - 2  # how many of the file's merges CLIP uses
#: How CLIP splits a text into words. Done here rather than by `tokenizers`, whose own engine
#: knows another version of Unicode and so splits rare characters elsewhere than open_clip.
_WORDS = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes, of Latin-1
#: The bytes in the order of their ids, printable ones first (GPT-2's table).
_BYTES = (*_PRINTABLE, *(byte for byte in range(256) if byte not in _PRINTABLE))
_PRINTABLE_ASCII = frozenset(map(chr, range(32, 127)))


Tokenize = Callable[[Sequence[str]], NDArray[np.int64]]
"""Texts to ids, (n, context_length), zero where nothing is."""


class ClipTokenizer:
    """Texts to rows of ids, padded with zeros and cut at the context length."""

    def __init__(
        self,
        load: Callable[[], Tokenizer],
        context_length: int,
        clean: str = "lower",
        few: FewWords | None = None,
    ) -> None:
        """Takes what loads the tokenizer when it is needed.

        Args:
            few: encodes a few words without it.
        """
        self._load = functools.cache(load)
        self._few = few
        self._clean = _CLEANERS[clean]
        self._length = context_length

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Ids of shape (n, context_length)."""
        rows = np.zeros((len(texts), self._length), dtype=np.int64)
        words = [_WORDS.findall(self._clean(text)) for text in texts]
        for row, encoded in zip(rows, self._encode(words), strict=True):
            ids = encoded[: self._length - 2]
            row[0] = _START_ID
            row[1 : 1 + len(ids)] = ids
            row[1 + len(ids)] = _END_ID
        return rows

    def _encode(self, texts: list[list[str]]) -> list[list[int]]:
        if self._few is not None and sum(map(len, texts)) <= _FEW:
            return [[number for word in words for number in self._few(word)] for words in texts]
        encodings = self._load().encode_batch(texts, is_pretokenized=True)
        return [encoding.ids for encoding in encodings]


class FewWords:
    """CLIP's byte-pair encoding from a table that is mapped rather than read.

    Loading the whole tokenizer takes a sixth of a search. This is slower by the word, and there
    at once.
    """

    def __init__(self, path: Path) -> None:
        table = np.load(path, mmap_mode="r")
        self._pairs, self._merged = table[0], table[1]
        self._special = {START: _START_ID, END: _END_ID}
        self._bytes = {byte: place for place, byte in enumerate(_BYTES)}

    @staticmethod
    def save(path: Path, tokenizer: Path) -> None:
        """Writes a `tokenizer.json`'s merges: pairs of ids as one number each, and what they make.

        The pairs ascend.
        """
        model = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]
        ids, merges = model["vocab"], model["merges"]  # "l r", or ["l", "r"]
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
        rows = sorted((ids[left] << 32 | ids[right], ids[left + right]) for left, right in pairs)
        np.save(path, np.array(rows, np.int64).T.copy())

    def __call__(self, word: str) -> list[int]:
        """The ids of one word, as `_WORDS` finds them."""
        if word in self._special:
            return [self._special[word]]
        ids = [self._bytes[byte] for byte in word.encode("utf-8")]
        ids[-1] += 256  # the last one closes the word
        while len(ids) > 1:
            pairs = [left << 32 | right for left, right in itertools.pairwise(ids)]
            places = np.searchsorted(self._pairs, pairs)
            places[places == len(self._pairs)] = 0
            # What was merged first when the vocabulary was made has the lowest id.
            made = np.where(self._pairs[places] == pairs, self._merged[places], _END_ID)
            best = int(made.argmin())
            if made[best] == _END_ID:
                break
            ids[best : best + 2] = [int(made[best])]
        return ids


def lengths_of(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many tokens each text has, (n,), of ids (n, l) that are padded with zeros at the end.

    Within a text a zero may be a token ("!" is); its last token is none.
    """
    found: NDArray[np.int64] = ids.shape[1] - (ids[:, ::-1] != 0).argmax(axis=1)
    return found


def trimmed(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids up to the end of the longest text, in steps: few shapes to compile for."""
    longest = int(lengths_of(ids).max(initial=1))
    return np.ascontiguousarray(ids[:, : -(-longest // TEXT_STEP) * TEXT_STEP])


def build_tokenizer(vocabulary: Path) -> Tokenizer:
    """The tokenizer of CLIP's vocabulary file, `bpe_simple_vocab_16e6.txt.gz`.

    It can be saved as JSON and read again with `Tokenizer.from_file`.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    merges = _merges(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: place for place, token in enumerate(_tokens(merges))},
            merges=merges,
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
    return tokenizer


def _merges(vocabulary: Path) -> list[tuple[str, str]]:
    lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
    return [(left, right) for left, _, right in (m.partition(" ") for m in lines[1 : _MERGES + 1])]


def _tokens(merges: list[tuple[str, str]]) -> list[str]:
    # The first 512 ids are the bytes in the order of CLIP's table, which is not the sorted one.
    others = range(256, 512 - len(_PRINTABLE))
    alphabet = [chr(place) for place in (*_PRINTABLE, *others)]  # a character for each byte
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    return [*tokens, *(left + right for left, right in merges), START, END]


def _basic(text: str) -> str:
    # ftfy leaves printable ASCII as it is but for HTML entities, which the next line undoes
    # anyway; it takes a while to import, so plain texts do without.
    if not _PRINTABLE_ASCII.issuperset(text):
        import ftfy

        text = ftfy.fix_text(text.encode("utf-8", "replace").decode("utf-8"))
    return html.unescape(html.unescape(text)).strip()


def _whitespace(text: str) -> str:
    return " ".join(_basic(text).split())


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _canonicalize(text: str) -> str:
    plain = _basic(text).replace("_", " ").translate(_WITHOUT_PUNCTUATION)
    return " ".join(plain.lower().split())


_CLEANERS: dict[str, Callable[[str], str]] = {
    "lower": lambda text: _whitespace(text).lower(),
    "whitespace": _whitespace,
    "canonicalize": _canonicalize,
}

"""CLIP's byte-pair encoding without torch: open_clip's ids, from Hugging Face tokenizers."""

from __future__ import annotations

import gzip
import html
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import regex
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

START, END = "<start_of_text>", "<end_of_text>"
_MERGES = 49152 - 256 - 2  # how many of the file's merges CLIP uses
#: How CLIP splits a text into words. Done here rather than by `tokenizers`, whose own engine
#: knows another version of Unicode and so splits rare characters elsewhere than open_clip.
_WORDS = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)
_PRINTABLE_ASCII = frozenset(map(chr, range(32, 127)))


class ClipTokenizer:
    """Texts to rows of ids, padded with zeros and cut at the context length."""

    def __init__(self, tokenizer: Tokenizer, context_length: int, clean: str = "lower") -> None:
        self._tokenizer = tokenizer
        self._clean = _CLEANERS[clean]
        self._length = context_length
        ids = tokenizer.get_vocab()
        self._start, self._end = ids[START], ids[END]

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Ids of shape (n, context_length)."""
        rows = np.zeros((len(texts), self._length), dtype=np.int64)
        words = [_WORDS.findall(self._clean(text)) for text in texts]
        encodings = self._tokenizer.encode_batch(words, is_pretokenized=True)
        for row, encoding in zip(rows, encodings, strict=True):
            ids = encoding.ids[: self._length - 2]
            row[0] = self._start
            row[1 : 1 + len(ids)] = ids
            row[1 + len(ids)] = self._end
        return rows


def lengths_of(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many tokens each text has, (n,), of ids (n, l) that are padded with zeros at the end.

    Within a text a zero may be a token ("!" is); its last token is none.
    """
    found: NDArray[np.int64] = ids.shape[1] - (ids[:, ::-1] != 0).argmax(axis=1)
    return found


def trimmed(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids up to the end of the longest text, in steps of eight: few shapes to compile for."""
    longest = int(lengths_of(ids).max(initial=1))
    return np.ascontiguousarray(ids[:, : -(-longest // 8) * 8])


def build_tokenizer(vocabulary: Path) -> Tokenizer:
    """The tokenizer of CLIP's vocabulary file, `bpe_simple_vocab_16e6.txt.gz`.

    It can be saved as JSON and read again with `Tokenizer.from_file`.
    """
    lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
    merges = [
        (left, right) for left, _, right in (m.partition(" ") for m in lines[1 : _MERGES + 1])
    ]
    # The first 512 ids are the bytes in the order of CLIP's table, which is not the sorted one.
    alphabet = list(_byte_characters())
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [left + right for left, right in merges] + [START, END]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: place for place, token in enumerate(tokens)},
            merges=merges,
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
    return tokenizer


def _byte_characters() -> list[str]:
    """A printable character for each byte, printable bytes first (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _basic(text: str) -> str:
    # ftfy leaves printable ASCII as it is but for HTML entities, which the next line undoes
    # anyway; it takes a while to import, so plain texts do without.
    if not _PRINTABLE_ASCII.issuperset(text):
        import ftfy

        text = ftfy.fix_text(text.encode("utf-8", "replace").decode("utf-8"))
    return html.unescape(html.unescape(text)).strip()


def _whitespace(text: str) -> str:
    return " ".join(_basic(text).split())


def _lower(text: str) -> str:
    return _whitespace(text).lower()


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _canonicalize(text: str) -> str:
    plain = _basic(text).replace("_", " ").translate(_WITHOUT_PUNCTUATION)
    return " ".join(plain.lower().split())


_CLEANERS: dict[str, Callable[[str], str]] = {
    "lower": _lower,
    "whitespace": _whitespace,
    "canonicalize": _canonicalize,
}

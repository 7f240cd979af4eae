"""Texts to a model's ids without torch: open_clip's ids, from Hugging Face tokenizers."""

from __future__ import annotations

import functools
import gzip
import html
import itertools
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
from numpy.typing import NDArray

from mmsearch.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_START_ID, _END_ID = 49406, 49407
_FEW, _FEW_LETTERS = 64, 400  # words and letters that are encoded without the whole tokenizer
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
"""Texts to ids, (n, context_length)."""


class JsonTokenizer:
    """Runs a `tokenizer.json` that pads and cuts texts to the context length itself."""

    def __init__(self, path: Path, clean: str, language: str = "") -> None:
        """Takes what `save` wrote.

        Args:
            language: that of the texts, where the model takes one (NLLB's): FLORES-200's code.

        Raises:
            UsageError: the model does not know the language.
        """
        self._load = functools.cache(functools.partial(read_tokenizer, path))
        self._few = FewTexts.beside(path)
        self._clean = _CLEANERS[clean]
        self._language = _language_ids(self._load(), language) if language else None

    @staticmethod
    def save(path: Path, tokenizer: Path, context_length: int) -> int:
        """Writes a model's tokenizer so that it pads and cuts; returns the id that it pads with.

        Args:
            tokenizer: the model's `tokenizer.json`, with `tokenizer_config.json` beside it.

        Raises:
            ValueError: the two do not say how.
        """
        config = dict(json.loads(tokenizer.with_name("tokenizer_config.json").read_text("utf-8")))
        found, token = read_tokenizer(tokenizer), config.get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        pad = found.token_to_id(token) if token else None
        if pad is None:
            raise ValueError("textual: the tokenizer has no token to pad with")
        side = config.get("padding_side", "right")
        found.enable_padding(direction=side, pad_id=pad, pad_token=token, length=context_length)
        found.enable_truncation(context_length, direction=config.get("truncation_side", "right"))
        found.save(str(path), pretty=False)
        FewTexts.save(path)
        return int(pad)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Ids of shape (n, context_length)."""
        cleaned = [self._clean(text) for text in texts]
        rows = None
        if self._few is not None and sum(map(len, cleaned)) <= _FEW_LETTERS:
            rows = [self._few(text) for text in cleaned]
        if rows is None or None in rows:
            rows = [encoding.ids for encoding in self._load().encode_batch(cleaned)]
        found = np.array(rows, np.int64)
        if self._language is not None:
            default, language = self._language
            found[np.arange(len(found)), (found == default).argmax(axis=1)] = language
        return found


_LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")


def takes_language(tokenizer: Path) -> bool:
    """Whether a `tokenizer.json` puts a language before a text."""
    return _LANGUAGE.fullmatch(_first_token(read_tokenizer(tokenizer))) is not None


def _first_token(tokenizer: Tokenizer) -> str:
    found = tokenizer.encode("")
    pairs = zip(found.tokens, found.attention_mask, strict=True)
    return next((str(token) for token, is_there in pairs if is_there), "")


def _language_ids(tokenizer: Tokenizer, language: str) -> tuple[int, int]:
    """The ids that stand before a text: the tokenizer's own, and that of the language."""
    ids = tokenizer.get_vocab()
    known = sorted(filter(_LANGUAGE.fullmatch, ids))
    if language not in known:
        near = [name for name in known if name[:2] == language[:2]] or known
        raise UsageError(
            f"the model knows no language '{language}'; it takes {_first_token(tokenizer)} or "
            f"another code of FLORES-200, such as {', '.join(near[:8])}"
        )
    return ids[_first_token(tokenizer)], ids[language]


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, as it is there.

    Raises:
        ValueError: it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no other
        raise ValueError(f"{path.name}: {error}") from error


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


class Merges:
    """The merges of a byte-pair encoding, from a table that is mapped rather than read.

    Loading a whole tokenizer takes from a sixth of a search to longer than all the rest of it.
    This is slower by the word, and there at once.
    """

    def __init__(self, path: Path) -> None:
        self._pairs, self._made, *ranks = np.load(path, mmap_mode="r")
        # Earlier programs wrote CLIP's without: what goes first there has the lowest id.
        self._ranks = ranks[0] if ranks else self._made

    @staticmethod
    def save(path: Path, model: Mapping[str, Any]) -> None:
        """Writes a `tokenizer.json`'s merges, three numbers each.

        They are the pair's ids in one, which ascend, the id that it makes, and which goes first.
        """
        ids, pairs = model["vocab"], map(_pair, model["merges"])
        rows = sorted(
            (ids[left] << 32 | ids[right], ids[left + right], rank)
            for rank, (left, right) in enumerate(pairs)
        )
        np.save(path, np.array(rows, np.int64).T.copy())

    def __call__(self, ids: list[int]) -> list[int]:
        """The ids of a word, or a text, of those of its letters or bytes."""
        none = np.iinfo(np.int64).max
        while len(ids) > 1:
            pairs = [left << 32 | right for left, right in itertools.pairwise(ids)]
            places = np.searchsorted(self._pairs, pairs)
            places[places == len(self._pairs)] = 0
            ranks = np.where(self._pairs[places] == pairs, self._ranks[places], none)
            best = int(ranks.argmin())
            if ranks[best] == none:
                break
            ids[best : best + 2] = [int(self._made[places[best]])]
        return ids


class FewWords:
    """CLIP's byte-pair encoding for the words of a query."""

    def __init__(self, path: Path) -> None:
        self._merges = Merges(path)
        self._special = {START: _START_ID, END: _END_ID}
        self._bytes = {byte: place for place, byte in enumerate(_BYTES)}

    @staticmethod
    def save(path: Path, tokenizer: Path) -> None:
        """Writes what it reads, of a `tokenizer.json`."""
        Merges.save(path, json.loads(tokenizer.read_text(encoding="utf-8"))["model"])

    def __call__(self, word: str) -> list[int]:
        """The ids of one word, as `_WORDS` finds them."""
        if word in self._special:
            return [self._special[word]]
        ids = [self._bytes[byte] for byte in word.encode("utf-8")]
        ids[-1] += 256  # the last one closes the word
        return self._merges(ids)


class FewTexts:
    """The encoding of SigLIP2's kind of `tokenizer.json` for the texts of a query.

    That is a byte-pair encoding of whole texts, spaces and all, in which letters that are unknown
    stand as their bytes.
    """

    def __init__(self, path: Path) -> None:
        about = json.loads(path.read_text(encoding="utf-8"))
        self._merges = Merges(path.with_name("merges.npy"))
        self._letters, self._ids = np.load(path.with_name("letters.npy"), mmap_mode="r")
        self._replace: tuple[str, str] = tuple(about["replace"])
        self._added: list[str] = about["added"]
        self._bytes: list[int] = about["bytes"]
        self._first, self._last = about["first"], about["last"]
        self._pad, self._length = about["pad"], about["length"]

    @classmethod
    def beside(cls, tokenizer: Path) -> FewTexts | None:
        """What `save` made of a `tokenizer.json`; None where that is of another kind."""
        path = tokenizer.with_name("few.json")
        return cls(path) if path.is_file() else None

    @staticmethod
    def save(tokenizer: Path) -> None:
        """Writes what it reads beside a `tokenizer.json` that pads, if that is of its kind."""
        stored = json.loads(tokenizer.read_text(encoding="utf-8"))
        if not _takes_whole_texts(stored):
            return
        model, normalizer = stored["model"], stored["normalizer"]
        ids = model["vocab"]
        whole = read_tokenizer(tokenizer)
        whole.no_padding()
        inner = whole.encode("a", add_special_tokens=False).ids
        ends = whole.encode("a").ids
        at = next(i for i in range(len(ends)) if ends[i : i + len(inner)] == inner)
        letters = sorted((ord(token), place) for token, place in ids.items() if len(token) == 1)
        Merges.save(tokenizer.with_name("merges.npy"), model)
        np.save(tokenizer.with_name("letters.npy"), np.array(letters, np.int64).T.copy())
        about = {
            "replace": [normalizer["pattern"]["String"], normalizer["content"]],
            "added": [token["content"] for token in stored["added_tokens"]],
            "bytes": [ids[token] for token in _BYTE_TOKENS],
            "first": ends[:at],
            "last": ends[at + len(inner) :],
            "pad": stored["padding"]["pad_id"],
            "length": stored["truncation"]["max_length"],
        }
        tokenizer.with_name("few.json").write_text(json.dumps(about), encoding="utf-8")

    def __call__(self, text: str) -> list[int] | None:
        """The ids of a text, padded and cut; None if it holds what the tokenizer treats apart."""
        replaced = text.replace(*self._replace)
        if any(token in text or token in replaced for token in self._added):
            return None
        letters = np.array([ord(letter) for letter in replaced], np.int64)
        places = np.searchsorted(self._letters, letters)
        places[places == len(self._letters)] = 0
        ids = []
        for letter, place, there in zip(
            replaced, places, self._letters[places] == letters, strict=True
        ):
            if there:
                ids.append(int(self._ids[place]))
            else:
                ids += [self._bytes[byte] for byte in letter.encode("utf-8")]
        room = self._length - len(self._first) - len(self._last)
        row = [*self._first, *self._merges(ids)[:room], *self._last]
        return row + [self._pad] * (self._length - len(row))


_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def _takes_whole_texts(stored: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` is of the kind that `FewTexts` reads."""
    model, normalizer = stored["model"], stored["normalizer"] or {}
    replaced = normalizer.get("pattern", {}).get("String", "")
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    # What it would split at is replaced before.
    split = stored["pre_tokenizer"] or {"type": "Split", "pattern": {"String": replaced}}
    return bool(
        model["type"] == "BPE"
        and model.get("byte_fallback")
        and not any(model.get(name) for name in others)
        and model["vocab"].keys() >= set(_BYTE_TOKENS)
        and normalizer.get("type") == "Replace"
        and replaced
        and (split["type"], split.get("pattern")) == ("Split", {"String": replaced})
        and stored["padding"]["direction"] == stored["truncation"]["direction"] == "Right"
    )


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


def clip_merges(tokenizer: Path) -> list[tuple[str, str]] | None:
    """The merges of a `tokenizer.json` if it is CLIP's; None if it is another."""
    model = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]
    if model.get("end_of_word_suffix") != "</w>" or "merges" not in model:  # older ones lack a type
        return None
    merges = [_pair(merge) for merge in model["merges"]]
    if len(merges) != _MERGES:
        return None
    ids = {token: place for place, token in enumerate(_tokens(merges)[:-2])}
    return merges if ids.items() <= model["vocab"].items() else None


def build_tokenizer(merges: list[tuple[str, str]]) -> Tokenizer:
    """CLIP's tokenizer.

    It can be saved as JSON and read again with `Tokenizer.from_file`.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

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


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge as `tokenizer.json` has it: "l r", or ["l", "r"]."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def read_merges(vocabulary: Path) -> list[tuple[str, str]]:
    """The merges in CLIP's vocabulary file, `bpe_simple_vocab_16e6.txt.gz`."""
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

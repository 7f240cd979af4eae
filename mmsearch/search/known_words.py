"""Words that a model has learned from captions, and those of a query that it has not.

`train clip` writes them beside a model as `words.txt`, a word a line, the most frequent first.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from mmsearch.encoders.registry import ModelSource, tower_source

WORDS = "words.txt"
#: How often a word has to come: many that come once are misspelt.
_LEAST = 2
_WORD = re.compile(r"[^\W\d_]+")
_SHORT = 2  # letters: "a", "of", "no"
_ENDINGS = ("s", "es", "d", "ed", "ing", "er", "ly", "y")
#: Words in no caption that a query has at least if it is taken to be in another language.
_FOREIGN = 3
#: A word that may have been meant is among so many: rarer ones may be misspelt themselves.
_FREQUENT = 6000
_LIKE = 0.8  # how much of two words has to be the same, for one to be taken for the other


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word for word in _WORD.findall(_plain(text)) if len(word) > _SHORT]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.lower())


def write_words(folder: Path, captions: Iterable[str], start: ModelSource | None = None) -> None:
    """Keeps the words of what a model learned from.

    Args:
        start: the model that it began with, whose words it knows too; where that names none, they
            are not known, and nothing is kept.
    """
    (folder / WORDS).unlink(missing_ok=True)
    before = KnownWords(()) if start is None else words_of_model(start)
    if before is None:
        return
    counts = Counter(word for text in captions for word in words_of(text))
    kept = [word for word, count in counts.most_common() if count >= _LEAST]
    kept = list(dict.fromkeys([*kept, *before.words]))
    if kept:  # else every word would be unknown
        (folder / WORDS).write_text("".join(f"{word}\n" for word in kept), encoding="utf-8")


def words_of_model(source: ModelSource) -> KnownWords | None:
    """The words of a model, or of that which its heads stand on; None where it names none.

    Raises:
        ModelNotFound: heads that stand on no model.
    """
    source = tower_source(source)
    return read_words(Path(source.location)) if source.kind == "local-dir" else None


def read_words(folder: Path) -> KnownWords | None:
    """The words that a model's folder names; None where it names none."""
    path = folder / WORDS
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (OSError, UnicodeDecodeError):
        return None


@functools.lru_cache(maxsize=4)
def _read(path: Path, _changed: int) -> KnownWords:
    return KnownWords(tuple(path.read_text(encoding="utf-8").split()))


@dataclass(frozen=True)
class KnownWords:
    """Words by how often they come, the most frequent first."""

    words: tuple[str, ...]

    @cached_property
    def _all(self) -> frozenset[str]:
        return frozenset(self.words)

    def unknown(self, text: str) -> dict[str, str | None]:
        """The words of a text that are in no caption, with what may have been meant.

        Another form of a word that is known is known: "giraffe" by "giraffes", "hopping" by "hop".
        """
        return {word: self._like(word) for word in self._unknown(text)}

    def reads(self, text: str) -> bool:
        """Whether a text is in a language of the captions, as far as its words and letters tell.

        It is not where at least three words and half of all are in no caption, or where most
        letters are.
        """
        letters = [letter for letter in _plain(text) if letter.isalpha()]
        strange = sum(letter not in self._letters for letter in letters)
        if self.words and 2 * strange > len(letters):
            return False
        unknown = len(self._unknown(text))
        return unknown < _FOREIGN or 2 * unknown < len(set(words_of(text)))

    def _unknown(self, text: str) -> list[str]:
        return [word for word in dict.fromkeys(words_of(text)) if not self._has(word)]

    @cached_property
    def _letters(self) -> frozenset[str]:
        return frozenset().union(*self.words)

    def _has(self, word: str) -> bool:
        stems = {word}
        for ending in _ENDINGS:
            if word.endswith(ending) and len(word) - len(ending) > _SHORT:
                stem = word[: -len(ending)]
                stems |= {stem, f"{stem}e", stem[:-1] if stem[-1:] == stem[-2:-1] else stem}
                stems.add(f"{stem[:-1]}y" if stem.endswith("i") else stem)
        forms = {f"{stem}{ending}" for stem in stems for ending in ("", "s", "es", "ing")}
        forms |= {f"{stem}{stem[-1:]}ing" for stem in stems}
        return not self._all.isdisjoint(forms)

    def _like(self, word: str) -> str | None:
        near = [one for one in self.words[:_FREQUENT] if abs(len(one) - len(word)) <= 2]
        return next(iter(get_close_matches(word, near, 1, _LIKE)), None)

"""Tokens: the same ids as open_clip's own tokenizer."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mmsearch.encoders.open_clip import VOCABULARY
from mmsearch.encoders.tokenizer import ClipTokenizer, FewWords, build_tokenizer

pytestmark = pytest.mark.slow

CLEANERS = ("lower", "whitespace", "canonicalize")
THEIRS = {clean: open_clip.SimpleTokenizer(clean=clean) for clean in CLEANERS}
BUILT = build_tokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """What encodes the words of a query, and nothing else: it is asked text by text."""
    path = tmp_path_factory.mktemp("merges") / "merges.npy"
    BUILT.save(str(path.with_name("tokenizer.json")), pretty=False)
    FewWords.save(path, path.with_name("tokenizer.json"))
    return FewWords(path)


def forbidden():
    raise AssertionError("the whole tokenizer is not needed for a few words")


def same(few, texts, clean="lower", length=77):
    theirs = THEIRS[clean](texts, length).numpy()
    whole = ClipTokenizer(lambda: BUILT, length, clean)
    np.testing.assert_array_equal(whole(texts), theirs)
    quick = ClipTokenizer(forbidden, length, clean, few)
    for text, row in zip(texts, theirs, strict=True):
        if len(text.split()) < 60:
            np.testing.assert_array_equal(quick([text])[0], row)


@pytest.mark.parametrize("clean", CLEANERS)
@pytest.mark.parametrize("length", [77, 32, 8])
def test_odd_texts_give_open_clips_ids(few, clean, length):
    texts = [
        "", " ", "a dog", "A  DOG\t\nruns.", "don't, it's, WE'RE, 'S", "a &amp;amp; b &lt;3",
        "naïve café — “quotes” … ﬁn", "İstanbul ſtraße ½ ² ①", "漢字と仮名 हिन्दी العربية",
        "👍🏽 👩‍👩‍👧 🏳️‍🌈", "<start_of_text> and <end_of_text>", "<START_OF_TEXT>", "x" * 500,
        "word " * 200, "1,000.50 12345", "\x00 \x1b[31mred\x1b[0m", "Ã©tÃ© mojibake", "_a_b_",
    ]  # fmt: skip
    same(few, texts, clean, length)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
@example("\u1e9e\u0130\u01c5")
def test_any_text_gives_open_clips_ids(few, text):
    same(few, [text])


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_plain_texts_skip_a_cleaning_that_would_change_nothing(few, text):
    same(few, [text])


def test_real_captions_give_open_clips_ids(few, data):
    document = json.loads((data / "flickr8k" / "dataset_flickr8k.json").read_text())
    same(few, [s["raw"] for image in document["images"][:1000] for s in image["sentences"]])


def test_a_saved_tokenizer_is_the_same(tmp_path):
    BUILT.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["a dog runs", "café 漢字"]
    np.testing.assert_array_equal(
        ClipTokenizer(lambda: loaded, 77)(texts), ClipTokenizer(lambda: BUILT, 77)(texts)
    )


def test_a_lone_surrogate_is_no_reason_to_fail():
    assert ClipTokenizer(lambda: BUILT, 77)(["broken \ud800 text"]).shape == (1, 77)


def test_many_words_go_through_the_whole_tokenizer(few):
    loads = []

    def load():
        loads.append(1)
        return BUILT

    tokenize = ClipTokenizer(load, 77, "lower", few)
    tokenize(["a few words"])
    assert loads == []
    texts = ["many words " * 20] * 3
    np.testing.assert_array_equal(tokenize(texts), THEIRS["lower"](texts, 77).numpy())
    tokenize(texts)
    assert loads == [1]

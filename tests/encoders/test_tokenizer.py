"""Tokens: the same ids as open_clip's own tokenizer."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx_models import (
    clip_tokenizer,
    gemma_tokenizer,
    nllb_tokenizer,
    unigram_tokenizer,
    wordpiece_tokenizer,
)
from tokenizers import Tokenizer

from mmsearch.encoders.open_clip import VOCABULARY
from mmsearch.encoders.tokenizer import (
    ClipTokenizer,
    FewTexts,
    FewWords,
    JsonTokenizer,
    build_tokenizer,
    clip_merges,
    read_merges,
    takes_language,
)
from mmsearch.errors import UsageError

pytestmark = pytest.mark.slow

CLEANERS = ("lower", "whitespace", "canonicalize")
THEIRS = {clean: open_clip.SimpleTokenizer(clean=clean) for clean in CLEANERS}
BUILT = build_tokenizer(read_merges(VOCABULARY))


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


def written(folder, tokenizer, **config):
    """A model's two files, and what `JsonTokenizer` keeps of them."""
    (folder / "textual").mkdir(parents=True)
    tokenizer.save(str(folder / "textual" / "tokenizer.json"))
    about = {"pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "textual" / "tokenizer_config.json").write_text(json.dumps(about))
    pad = JsonTokenizer.save(folder / "tokenizer.json", folder / "textual" / "tokenizer.json", 12)
    return folder / "tokenizer.json", pad


ODD = [
    "", " ", "a dog runs over the grass", "A  DOG\t\nruns.", "x" * 300, "狗在草地上跑 ▁▁ a▁b",
    "собака бежит 👍🏽 naïve", "<eos> <pad> <s> </s> <0x41> <unk>", "\x00 \x1b[31m", "ein hund am",
]  # fmt: skip


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
@pytest.mark.parametrize(
    ("kind", "token"),
    [
        (gemma_tokenizer, "<pad>"),
        (unigram_tokenizer, "<pad>"),
        (nllb_tokenizer, "<pad>"),
        (wordpiece_tokenizer, "[PAD]"),
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_tokenizer_json_gives_open_clips_ids(tmp_path, kind, token, clean, side):
    theirs = open_clip.tokenizer.HFTokenizer
    path, pad = written(tmp_path, kind(), padding_side=side, pad_token=token)
    expected = theirs(str(tmp_path / "textual"), 12, clean)(ODD).numpy()
    ours = JsonTokenizer(path, clean)
    np.testing.assert_array_equal(ours(ODD), expected)
    for text, row in zip(ODD, expected, strict=True):
        np.testing.assert_array_equal(ours([text])[0], row)
    assert expected[0, 0 if side == "left" else -1] == pad


GEMMA = gemma_tokenizer()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    path, _ = written(tmp_path_factory.mktemp("gemma"), GEMMA)
    return FewTexts.beside(path), Tokenizer.from_file(str(path))


@settings(max_examples=400, deadline=None)
@example("a dog  runs")
@example("▁▁")
@given(st.text(max_size=40) | st.text("adogrunst hei狗 ", max_size=60))
def test_few_texts_are_encoded_as_the_whole_tokenizer_does(gemma, text):
    few, whole = gemma
    found = few(text)
    if found is None:  # what is treated apart
        added = [token.content for token in GEMMA.get_added_tokens_decoder().values()]
        assert any(one in text or one in text.replace(" ", "▁") for one in added)
    else:
        assert found == whole.encode(text).ids


@pytest.mark.parametrize("kind", [unigram_tokenizer, nllb_tokenizer])
def test_other_tokenizers_are_left_to_their_library(tmp_path, kind):
    path, _ = written(tmp_path, kind())
    assert FewTexts.beside(path) is None


def test_a_tokenizer_that_pads_at_the_left_is_left_to_its_library(tmp_path):
    path, _ = written(tmp_path, gemma_tokenizer(), padding_side="left")
    assert FewTexts.beside(path) is None


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no token to pad with"):
        written(tmp_path, gemma_tokenizer(), pad_token=None)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_language_stands_before_the_text(tmp_path, side):
    from transformers import PreTrainedTokenizerFast

    path, pad = written(tmp_path, nllb_tokenizer(), padding_side=side)
    whole = PreTrainedTokenizerFast(tokenizer_file=str(path))
    english, german = (JsonTokenizer(path, "whitespace", code) for code in ("", "deu_Latn"))
    a, b = english(["ein hund"])[0], german(["ein hund"])[0]
    assert takes_language(path)
    at = int((a != pad).argmax())
    assert (at > 0) is (side == "left")
    assert whole.convert_ids_to_tokens([a[at], b[at]]) == ["eng_Latn", "deu_Latn"]
    np.testing.assert_array_equal(np.delete(a, at), np.delete(b, at))
    with pytest.raises(UsageError, match=r"no language 'de'.*deu_Latn"):
        JsonTokenizer(path, "whitespace", "de")


def test_only_some_take_a_language(tmp_path):
    for name, tokenizer in (("nllb", nllb_tokenizer()), ("gemma", gemma_tokenizer())):
        tokenizer.save(str(tmp_path / name))
    assert takes_language(tmp_path / "nllb")
    assert not takes_language(tmp_path / "gemma")


def test_clips_tokenizer_is_recognised_among_others(tmp_path):
    for name, tokenizer in (("clip", clip_tokenizer()), ("gemma", gemma_tokenizer())):
        tokenizer.save(str(tmp_path / name))
    assert clip_merges(tmp_path / "clip") == read_merges(VOCABULARY)
    assert clip_merges(tmp_path / "gemma") is None
    stored = json.loads((tmp_path / "clip").read_text())
    del stored["model"]["type"]  # as older files have it
    (tmp_path / "clip").write_text(json.dumps(stored))
    assert clip_merges(tmp_path / "clip") == read_merges(VOCABULARY)

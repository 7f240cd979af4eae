"""Words that no caption held: told, with what may have been meant."""

from __future__ import annotations

import pytest
from fakes import paint

from mmsearch import Engine
from mmsearch.encoders.encoder_provider import GivenEncoder
from mmsearch.encoders.registry import parse_model
from mmsearch.search.known_words import KnownWords, read_words, write_words

WORDS = KnownWords(
    ("dog", "début", "running", "giraffes", "puppy", "make", "frisbee", "grass", "big")
)


@pytest.mark.parametrize(
    "text",
    [
        "a dog of no grass",
        "Dogs RUN; the-giraffe's",
        "puppies making frisbees",
        "big 4711",
        "",
        "é",
        "de\N{COMBINING ACUTE ACCENT}but",
    ],
)
def test_other_forms_of_a_known_word_are_known(text):
    assert set(WORDS.unknown(text)) <= {"the"}


def test_what_is_misspelt_gets_a_suggestion():
    assert WORDS.unknown("a girafe, a frisbbe and a zeppelin") == {
        "girafe": "giraffes", "frisbbe": "frisbee", "and": None, "zeppelin": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "is_read"),
    [
        ("a dog on grass", True),
        ("a zeppelin over the grass with a dog and a puppy", True),
        ("zeppelin berlin", True),  # two names tell no language
        ("un chien court dans la neige", False),
        ("dog, собака бежит", False),
        ("a dog on the grass in Москва", True),
        ("犬", False),
        ("a dög", True),
        ("", True),
        ("12", True),
    ],
)
def test_a_text_of_words_that_no_caption_has_is_not_read(text, is_read):
    known = KnownWords((*WORDS.words, "the", "with", "and", "over"))
    assert known.reads(text) is is_read
    assert KnownWords(()).reads("chien")  # it knows no language


def test_words_are_kept_the_most_frequent_first_and_rare_ones_are_not(tmp_path):
    write_words(tmp_path, ["a dog and a dog", "the Dog's house", "a house", "a typpo"])
    assert (tmp_path / "words.txt").read_text() == "dog\nhouse\n"
    assert read_words(tmp_path).unknown("the typpo house") == {"the": None, "typpo": None}
    write_words(tmp_path, ["each word once"])
    assert read_words(tmp_path) is None


def test_a_model_without_a_list_says_nothing(tmp_path):
    assert read_words(tmp_path / "missing") is None


def test_a_model_that_began_with_another_knows_that_ones_words_too(tmp_path):
    base, further = tmp_path / "base", tmp_path / "further"
    base.mkdir()
    further.mkdir()
    write_words(base, ["helicopter helicopter"])
    source = parse_model(str(base))
    write_words(further, ["shoe shoe"], source)
    assert (further / "words.txt").read_text() == "shoe\nhelicopter\n"
    (base / "words.txt").unlink()
    write_words(further, ["shoe shoe"], source)  # what the base knows is not known
    assert read_words(further) is None


def test_an_engine_with_a_given_encoder_names_no_words(tmp_path, encoder):
    paint(tmp_path / "photos/a.png", "red")
    with Engine.open(tmp_path / "index", provider=GivenEncoder(encoder)) as engine:
        engine.index([tmp_path / "photos"])
        assert engine.reads("un chien court dans la neige")
        assert engine.unknown_words("zeppelin") == {}

"""Named pictures: captions made of names, and a stratified part held out."""

from __future__ import annotations

from collections import Counter

import pytest
from named import hold_out, plural, read_named, with_article


@pytest.mark.parametrize(
    ("one", "many"),
    [("dog", "dogs"), ("bus", "buses"), ("church", "churches"), ("butterfly", "butterflies"),
     ("toy", "toys"), ("leaf", "leaves"), ("grand piano", "grand pianos"), ("fox", "foxes")],
)  # fmt: skip
def test_plurals(one, many):
    assert plural(one) == many


def test_articles():
    assert with_article("ant") == "an ant"
    assert with_article("bee") == "a bee"


def test_equal_names_become_one_and_empty_ones_are_dropped():
    text = "file,label\na/1.jpg,Sea_Horse\nb/2.jpg,sea horse\nb/3.jpg,Images to predict\n"
    found = read_named(text, ["images to predict"])
    assert [(image.name, image.source) for image in found] == [
        ("sea horse", "a"),
        ("sea horse", "b"),
    ]


@pytest.mark.parametrize("every", [2, 5])
def test_the_same_share_of_every_name_is_held_out(every):
    rows = [f"a/{name}{i}.jpg,{name}" for name in ("x", "y") for i in range(20)]
    images = read_named("\n".join(["file,label", *rows, "b/1.jpg,x"]))
    held = hold_out(images, every, "a")
    counts = Counter(image.name for image in images if image.file in held)
    assert counts == {"x": 20 // every, "y": 20 // every}

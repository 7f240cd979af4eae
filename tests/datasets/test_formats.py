"""Readers of labelled sets: each format, and files that are broken."""

from __future__ import annotations

import json

import pytest
from fakes import paint

from mmsearch.datasets.formats import find_images, read_labelled
from mmsearch.errors import LabelsError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def captions(labelled):
    return {image.file: image.captions for image in labelled.images}


def test_karpathy(tmp_path):
    path = write(tmp_path / "dataset_x.json", {"dataset": "x", "images": [
        {"filename": "a.jpg", "filepath": "val2014", "split": "test",
         "sentences": [{"raw": "one"}, {"raw": "two, with a comma"}]},
        {"filename": "b.jpg", "split": "restval", "sentences": []},
    ]})  # fmt: skip
    labelled = read_labelled(path)
    assert labelled.name == "x"
    assert captions(labelled) == {"val2014/a.jpg": ("one", "two, with a comma"), "b.jpg": ()}
    assert labelled.splits() == ["test", "restval"]


def test_coco(tmp_path):
    path = write(tmp_path / "captions_val.json", {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}],
        "annotations": [{"image_id": 7, "caption": "one"}, {"image_id": 7, "caption": "two"}],
    })  # fmt: skip
    assert captions(read_labelled(path)) == {"7.jpg": ("one", "two"), "8.jpg": ()}


def test_flickr_tokens(tmp_path):
    path = write(tmp_path / "results.token", "a b.jpg#0\tone , two\na b.jpg#1\tthree\nc.jpg#0\tx\n")
    assert captions(read_labelled(path)) == {"a b.jpg": ("one , two", "three"), "c.jpg": ("x",)}


@pytest.mark.parametrize(
    "content",
    [
        'image,caption\na.jpg,"one, two"\na.jpg,plain\n',
        "image,caption\na.jpg,one, two\na.jpg,plain\n",
        "image_name| comment_number| comment\na.jpg| 0| one, two\na.jpg| 1| plain\n",
        "file_name\ttext\na.jpg\tone, two\na.jpg\tplain\n",
        '\ufeffFILE_NAME,Caption\r\na.jpg,"one, two"\r\n\r\na.jpg,plain\r\n',
    ],
)
def test_tables_of_captions(tmp_path, content):
    path = write(tmp_path / "captions.csv", content)
    assert captions(read_labelled(path)) == {"a.jpg": ("one, two", "plain")}


def test_a_table_may_name_splits(tmp_path):
    path = write(tmp_path / "l.csv", "image,split,caption\na.jpg,test,one\nb.jpg,train,two\n")
    assert [image.split for image in read_labelled(path).images] == ["test", "train"]


def test_hugging_face_metadata(tmp_path):
    write(
        tmp_path / "train" / "metadata.jsonl",
        '{"file_name": "a.jpg", "text": "one"}\n\n{"file_name": "b.jpg", "caption": ["x", "y"]}\n',
    )
    labelled = read_labelled(tmp_path / "train")
    assert captions(labelled) == {"a.jpg": ("one",), "b.jpg": ("x", "y")}
    assert labelled.name == "train"


@pytest.mark.parametrize("char", ["\u2028", "\u0085", "\x0b", "\x1c"])
def test_only_newlines_end_a_line(tmp_path, char):
    rows = write(tmp_path / "x.jsonl", f'{{"file_name": "a.jpg", "text": "one{char}two"}}\n')
    if char not in "\x0b\x1c":  # control characters are not valid in JSON
        assert captions(read_labelled(rows)) == {"a.jpg": (f"one{char}two",)}
    tokens = write(tmp_path / "x.token", f"a.jpg#0\tone{char}two\n")
    assert captions(read_labelled(tokens)) == {"a.jpg": (f"one{char}two",)}


def test_sidecars_in_a_folder(tmp_path):
    paint(tmp_path / "sub" / "a.png", "red")
    write(tmp_path / "sub" / "a.txt", "one\n\n two \n")
    paint(tmp_path / "b.png", "red")
    assert captions(read_labelled(tmp_path)) == {"sub/a.png": ("one", "two")}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.json", "{", "not valid JSON"),
        ("x.json", "[" * 100_000, "not valid JSON"),
        ("x.json", {"images": []}, "neither Karpathy's nor COCO's"),
        ("x.json", [1, 2], "neither Karpathy's nor COCO's"),
        ("x.json", {"images": [{"sentences": [{"raw": 5}], "filename": "a"}]}, "image 0"),
        ("x.json", {"images": [{"sentences": 3, "filename": "a"}]}, "image 0"),
        ("x.json", {"images": [], "annotations": [{"image_id": 1}]}, "annotation 0"),
        ("x.json", {"images": [{"id": 1}], "annotations": []}, "image 0"),
        ("x.csv", "", "empty"),
        ("x.csv", "a,b\n1,2\n", "no image column"),
        ("x.csv", "image,caption\na.jpg\n", "x.csv:2"),
        ("x.token", "a.jpg#0\tone\nrubbish\n", "x.token:2"),
        ("x.jsonl", '{"file_name": "a.jpg"}\n', "x.jsonl:1"),
        ("x.jsonl", "[1]\n", "x.jsonl:1"),
        ("x.jsonl", "{broken\n", "x.jsonl:1"),
    ],
)
def test_a_broken_file_is_explained(tmp_path, name, content, says):
    with pytest.raises(LabelsError, match=says):
        read_labelled(write(tmp_path / name, content))


def test_what_is_not_there_or_not_text_is_explained(tmp_path):
    with pytest.raises(LabelsError, match="cannot be read"):
        read_labelled(tmp_path / "none.json")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LabelsError, match="not a text file"):
        read_labelled(tmp_path / "binary.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(LabelsError, match="no captions there"):
        read_labelled(tmp_path / "folder")


@pytest.mark.parametrize("where", ["", "images", "../images", "Images"])
def test_images_are_looked_for_in_the_usual_places(tmp_path, where):
    labels = write(tmp_path / "set" / "x.csv", "image,caption\na.png,one\n")
    paint(tmp_path / "set" / where / "a.png", "red")
    found = find_images(labels, list(read_labelled(labels).images))
    assert (found / "a.png").is_file()


def test_images_that_are_nowhere_are_asked_for(tmp_path):
    labels = write(tmp_path / "x.csv", "image,caption\na.png,one\n")
    with pytest.raises(LabelsError, match="--images DIR"):
        find_images(labels, list(read_labelled(labels).images))


def test_flickr8k_as_published(data):
    labelled = read_labelled(data / "flickr8k")
    sizes = {split: len(list(labelled.of_split(split))) for split in labelled.splits()}
    assert sizes == {"train": 6000, "test": 1000, "val": 1000, "restval": 91}
    assert all(len(image.captions) == 5 for image in labelled.images)

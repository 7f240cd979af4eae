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
        ("x.csv", "image,caption\n", "holds no captions"),
        ("x.json", {"images": [{"id": 1, "file_name": "a"}], "annotations": []}, "holds no capt"),
        ("x.json", {"images": [{"filename": "a", "sentences": []}]}, "holds no captions"),
        ("x.csv", 'image,caption\na.jpg,"one\nb.jpg,two\n', "x.csv:2: a field begins with a quote"),
        ("x.csv", 'image,caption\na.jpg,"one\n\nand no end\n', "x.csv:2: a field begins with"),
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
    latin = b"image,caption\na.jpg,caf\xe9\n"
    others = ("image".encode("utf-16-le"), "Рыжая собака бежит по траве".encode("utf-16-be"))
    for content in (b"\xff\xfe\x00", latin, *others):
        (tmp_path / "binary.csv").write_bytes(content)
        with pytest.raises(LabelsError, match=r"not a text file in UTF-8.*iconv"):
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


TWO = {"a.png": ("one",), "b.png": ("two",)}


@pytest.mark.parametrize(
    ("content", "expected", "remarks"),
    [
        ('image\tcaption\na.png\t"one\nb.png\ttwo\n', TWO | {"a.png": ('"one',)}, []),
        ('image\tcaption\na.png\t"Say ""no"""\n', {"a.png": ('Say "no"',)}, []),
        ('image,caption\na.png,"One" way\nb.png,two\n', TWO | {"a.png": ('"One" way',)}, []),
        ('image,caption\na.png,a "big" dog, here\n', {"a.png": ('a "big" dog, here',)}, []),
        ('image,caption\na.png,"1\n2, 3"\nb.png,two\n', TWO | {"a.png": ("1\n2, 3",)}, []),
        ('image,caption\na.png,"say ""hi"", x"\n', {"a.png": ('say "hi", x',)}, []),
        ('image,caption,n\n"a.png","one","1"\nb.png,"two",\n', TWO, []),
        ("image,caption\nb.png\na.png,one\nb.png,two\n", TWO, ["x.csv:2: fewer columns"]),
        ("image,caption\na.png,one\nb.png,two\n,x\n", TWO, ["without the name of a picture"]),
        ("caption,image\n1, 2,c.png\none,a.png\ntwo,b.png,\n", TWO, ["x.csv:2: more columns"]),
        ("\n\nimage,caption\na.png,one\nb.png,two\n", TWO, []),
        ("a.png,one, too\nb.png,two\n", TWO | {"a.png": ("one, too",)}, []),
        ("a.png|0|one\nb.png|1|two\n", TWO, []),
        ("image| n| comment\na.png| 3| one\nb.png| 4   x\nb.png| 5| two\n", TWO, ["x.csv:3: "]),
        ("image,caption\na.png,one\na.png, \nb.png,two\n", TWO, ["a caption of a.png is empty"]),
        ("image,caption\nsub\\a.png,one\n", {"sub/a.png": ("one",)}, []),
        ('image;caption\na.png;one, too\nb.png;"two"\n', TWO | {"a.png": ("one, too",)}, []),
        ('image\tcaption\na.png\t"1\n2"\nb.png\ttwo\n', TWO | {"a.png": ("1\n2",)}, []),
        ('image,caption\na.png,"1"" and ""2"\n', {"a.png": ('1" and "2',)}, []),
        ('image,caption\na.png, "Hi" and "bye"\n', {"a.png": ('"Hi" and "bye"',)}, []),
        ('image, caption\n"a.png", "one"\nb.png , two\n', TWO, []),
        ("a.png\tone, two, three\nb.png\ttwo\n", TWO | {"a.png": ("one, two, three",)}, []),
        ('a.png,"1\n2"\nb.png,two\n', TWO | {"a.png": ("1\n2",)}, []),
        ('a.png,says "Stop", "Go"\n', {"a.png": ('says "Stop", "Go"',)}, []),
        ('image,caption\na.png,x, "b", y\n', {"a.png": ('x, "b", y',)}, []),
        ('image,caption\na.png,"one",\nb.png,two\n', TWO, []),
        ('image\tcaption\na.png\t "one"\nb.png\t"two" \n', TWO, []),
        (
            'caption\timage\n"one\ta.png\ntwo"\tb.png\n',
            {"a.png": ('"one',), "b.png": ('two"',)},
            [],
        ),
        ("image,caption\ra.png,one\rb.png,two\r", TWO, []),
        ("a.png#0\tone\nrubbish\nb.png#0\ttwo\n", TWO, ["x.csv:2: not 'image.jpg#0"]),
    ],
)
def test_a_row_is_what_it_says_and_a_bad_one_costs_itself(tmp_path, content, expected, remarks):
    told = []
    found = read_labelled(write(tmp_path / "x.csv", content), told.append)
    assert captions(found) == expected
    assert len(found.remarks) == len(remarks)
    for own, remark in zip(found.remarks, remarks, strict=True):
        assert remark in own
    assert len(told) == bool(remarks)
    assert all(remark in told[0] for remark in found.remarks[:1])


def test_a_bad_line_of_json_costs_itself(tmp_path):
    lines = '{"file_name": "a.jpg", "text": "one"}\n{broken\n'
    found = read_labelled(write(tmp_path / "x.jsonl", lines))
    assert captions(found) == {"a.jpg": ("one",)}
    assert "x.jsonl:2" in found.remarks[0]


def test_a_very_long_caption_is_one(tmp_path):
    long = "x" * 300_000
    path = write(tmp_path / "x.csv", f'image,caption\na.png,"{long}"\nb.png,{long}\n')
    assert captions(read_labelled(path)) == {"a.png": (long,), "b.png": (long,)}


@pytest.mark.parametrize("end", ['"', "", '" x', '"",'])
@pytest.mark.parametrize("inner", ['""', 'a"', '""" ', ' " ', "x\n"])
def test_no_field_is_gone_through_again_and_again(tmp_path, inner, end):
    """Ten seconds would be 20 lines of such a table; it takes less than one."""
    path = write(tmp_path / "x.csv", f'image,caption\na.png,"{inner * 100_000}{end}\nb.png,two\n')
    try:
        assert captions(read_labelled(path))["b.png"] == ("two",)
    except LabelsError as error:
        assert "never closed" in str(error)


def test_names_that_no_file_can_have_are_told(tmp_path):
    images = [
        {"filename": "a\0.png", "sentences": [{"raw": "one"}]},
        {"filename": "\ud800.png", "sentences": [{"raw": "two"}]},
        {"filename": "c.png", "sentences": [{"raw": "three"}]},
    ]
    found = read_labelled(write(tmp_path / "dataset_x.json", {"images": images}))
    assert captions(found) == {"c.png": ("three",)}
    assert len(found.remarks) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_in_any_encoding_that_names_itself_is_read(tmp_path, encoding):
    path = tmp_path / "x.csv"
    path.write_bytes("image,caption\na.png,a café\n".encode(encoding))
    assert captions(read_labelled(path)) == {"a.png": ("a café",)}


def test_coco_ids_are_the_same_as_numbers_and_as_text(tmp_path):
    path = write(tmp_path / "captions_x.json", {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": "2", "file_name": "b.png"},
                   {"id": 3.0, "file_name": "c.png"}, {"id": 1, "file_name": "a.png"},
                   {"id": None, "file_name": "d.png"}],
        "annotations": [{"image_id": "1", "caption": "one"}, {"image_id": 2, "caption": "two"},
                        {"image_id": "3", "caption": "three"}, {"image_id": 9, "caption": "x"},
                        {"caption": "of none"}, {"image_id": 1, "caption": None}, 7],
    })  # fmt: skip
    found = read_labelled(path)
    assert captions(found) == {"a.png": ("one",), "b.png": ("two",), "c.png": ("three",)}
    assert [remark.partition(": ")[2] for remark in found.remarks] == [
        "annotation 4 has no 'image_id' or no 'caption' text",
        "annotation 5 has no 'image_id' or no 'caption' text",
        "annotation 6 has no 'image_id' or no 'caption' text",
        "image 4 has no 'id' or no 'file_name'",
        "captions of image_id 9, which is no image",
    ]


def test_a_picture_that_is_listed_twice_has_the_captions_of_both(tmp_path):
    images = [
        {"filename": "a.png", "split": "Test", "sentences": [{"raw": "one"}]},
        {"filename": "./a.png", "split": "test", "sentences": [{"raw": "uno"}, {"raw": "un"}]},
        {"filename": "b.png", "split": "TRAIN", "sentences": [{"raw": "two"}]},
        {"filename": "b.png", "split": "test", "sentences": [{"raw": "zwei"}]},
        {"filename": "c.png", "sentences": [{}]},
    ]
    found = read_labelled(write(tmp_path / "dataset_x.json", {"images": images}))
    assert captions(found) == {"a.png": ("one", "uno", "un"), "b.png": ("two", "zwei")}
    assert found.splits() == ["test", "train"]
    assert [image.file for image in found.choose("TEST", None)[1]] == ["a.png"]
    assert len(found.remarks) == 2
    assert "b.png is in two splits" in found.remarks[0]
    assert "image 4" in found.remarks[1]


@pytest.mark.parametrize("name", ["dataset_info.json", "dataset_dict.json", "captions_config.json"])
def test_json_that_is_no_captions_does_not_hide_those_beside_it(tmp_path, name):
    write(tmp_path / name, {"features": {}})
    write(tmp_path / "captions.csv", "image,caption\na.png,one\n")
    found = read_labelled(tmp_path)
    assert captions(found) == {"a.png": ("one",)}
    assert bool(found.remarks) == name.startswith("captions")
    (tmp_path / "captions.csv").unlink()
    with pytest.raises(LabelsError, match=r"no captions there|neither Karpathy's nor COCO's"):
        read_labelled(tmp_path)


def test_sidecars_that_are_no_text_are_told(tmp_path):
    for name in "abc":
        paint(tmp_path / f"{name}.png", "red")
    (tmp_path / "a.txt").write_bytes("a red house".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes("a café".encode("cp1252"))
    (tmp_path / "c.txt").write_bytes(b"x" * ((1 << 20) - 1) + "é".encode())  # cut within a letter
    found = read_labelled(tmp_path)
    assert set(captions(found)) == {"a.png", "c.png"}
    assert captions(found)["a.png"] == ("a red house",)
    assert len(found.remarks) == 1
    assert "b.txt: not a text in UTF-8" in found.remarks[0]


def test_images_are_found_by_names_of_another_form(tmp_path):
    labels = write(tmp_path / "x.csv", "image,caption\ncaf\u00e9.png,one\n")
    paint(tmp_path / "cafe\u0301.png", "red")
    assert find_images(labels, list(read_labelled(labels).images)) == tmp_path


def test_flickr8k_as_published(data):
    labelled = read_labelled(data / "flickr8k")
    sizes = {split: len(list(labelled.of_split(split))) for split in labelled.splits()}
    assert sizes == {"train": 6000, "test": 1000, "val": 1000, "restval": 91}
    assert all(len(image.captions) == 5 for image in labelled.images)

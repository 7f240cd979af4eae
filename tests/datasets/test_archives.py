"""Sets with their pictures inside: WebDataset's tars and Parquet files become folders."""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmsearch import Engine
from mmsearch.datasets.archives import unpacked
from mmsearch.datasets.formats import find_images, read_labelled
from mmsearch.errors import LabelsError


def picture(shade, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 30, 60)).save(file, kind)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def read(path, cache):
    folder = unpacked(path, cache)
    labelled = read_labelled(folder)
    assert find_images(folder, list(labelled.images)) == folder
    for image in labelled.images:
        Image.open(folder / image.file).verify()
    return labelled


def test_members_of_a_tar_that_share_a_key_are_one_picture(tmp_path):
    write_tar(tmp_path / "shard-0.tar", [
        ("a/0001.jpg", picture(10, "JPEG")), ("a/0001.txt", b"a red thing\nand another line"),
        ("a/0001.json", json.dumps({"caption": "not twice", "width": 3}).encode()),
        ("a/0001.seg.png", picture(11)), ("a/._0001.jpg", b"what macOS keeps"),
        ("a/0002.png", picture(20)), ("a/0002.json", b'{"caption": "a dark thing", "id": 7}'),
        ("b/0002.0.png", picture(30)), ("b/0002.cls", b"3"),  # a picture without a caption
        ("b/0003.txt", b"words without a picture"),
    ])  # fmt: skip
    write_tar(tmp_path / "shard-1.tar", [("0001.png", picture(40)), ("0001.txt", b"last")])
    labelled = read(tmp_path, tmp_path / "cache")
    assert [image.captions for image in labelled.images] == [
        ("a red thing", "and another line"), ("a dark thing",), (), ("last",),
    ]  # fmt: skip
    assert len(read(tmp_path / "shard-1.tar", tmp_path / "cache").images) == 1


def test_a_caption_that_stands_in_two_members_is_one_in_any_order(tmp_path):
    write_tar(tmp_path / "test-0.tar", [
        ("1.jpg", picture(1, "JPEG")), ("1.json", b'{"Caption": "a shade"}'), ("1.txt", b"a shade"),
    ])  # fmt: skip
    write_tar(tmp_path / "train_1.tar", [("1.png", picture(2)), ("1.txt", b"another")])
    found = [(image.split, image.captions) for image in read(tmp_path, tmp_path / "c").images]
    assert found == [("test", ("a shade",)), ("train", ("another",))]


def test_a_sparse_member_does_not_fill_the_memory(tmp_path):
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = 2**40
        archive.addfile(info)
    with pytest.raises(LabelsError, match="1099511627776 bytes is no picture"):
        unpacked(tmp_path / "one.tar", tmp_path / "cache")


def test_rows_of_parquet_files_as_the_hub_has_them(tmp_path):
    (tmp_path / "data").mkdir()
    for split, shades in (("train", (1, 2)), ("test", (3,))):
        pq.write_table(
            pa.table({
                "image": [{"bytes": picture(shade), "path": f"{shade}.png"} for shade in shades],
                "caption_0": [f"shade {shade}" for shade in shades],
                "caption_1": [f"number {shade}" for shade in shades],
                "label": list(shades),
            }),
            tmp_path / f"data/{split}-00000-of-00001.parquet",
        )  # fmt: skip
    labelled = read(tmp_path, tmp_path / "cache")
    found = {image.file.split("-", 1)[1]: (image.split, image.captions)
             for image in labelled.images}  # fmt: skip
    assert found == {
        "1.png": ("train", ("shade 1", "number 1")),
        "2.png": ("train", ("shade 2", "number 2")),
        "3.png": ("test", ("shade 3", "number 3")),
    }


def test_bytes_alone_lists_of_captions_and_a_column_of_splits(tmp_path):
    path = tmp_path / "some.parquet"
    table = {"jpg": [picture(5, "JPEG"), None], "sentences": [["one", "two"], ["gone"]],
             "split": ["val", "val"]}  # fmt: skip
    pq.write_table(pa.table(table), path)
    (image,) = read(path, tmp_path / "cache").images
    assert (image.file, image.captions, image.split) == ("000000-1.jpg", ("one", "two"), "val")


def test_a_set_is_unpacked_once_and_again_where_it_has_changed(tmp_path):
    path = tmp_path / "one.tar"
    write_tar(path, [("a.png", picture(1)), ("a.txt", b"first")])
    folder = unpacked(path, tmp_path / "cache")
    (folder / "kept").touch()
    assert (unpacked(path, tmp_path / "cache") / "kept").exists()
    write_tar(path, [("a.png", picture(1)), ("a.txt", b"second"), ("b.txt", b"x" * 4000)])
    again = unpacked(path, tmp_path / "cache")
    assert again != folder
    assert read_labelled(again).images[0].captions == ("second",)


def test_no_name_of_a_member_leads_out_of_the_folder(tmp_path):
    path = tmp_path / "one.tar"
    write_tar(path, [("../../up/.png", picture(1)), ("../../up/.txt", b"an odd one")])
    write_tar(tmp_path / "two.tar", [("../../../x.png", picture(2)), ("../../../x.txt", b"odd")])
    for one in (path, tmp_path / "two.tar"):
        folder = unpacked(one, tmp_path / "cache")
        assert len(list(folder.iterdir())) == 2
    assert {entry.name for entry in tmp_path.iterdir()} == {"one.tar", "two.tar", "cache"}


@pytest.mark.parametrize("name", ["bad.tar", "bad.parquet"])
def test_what_is_damaged_is_told_and_leaves_nothing(tmp_path, name):
    (tmp_path / name).write_bytes(b"no archive at all" * 100)
    with pytest.raises(LabelsError, match="damaged"):
        unpacked(tmp_path / name, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name == "metadata.jsonl"]


def test_what_holds_no_captions_is_told(tmp_path):
    write_tar(tmp_path / "one.tar", [("a.png", picture(1))])
    with pytest.raises(LabelsError, match="no picture with a caption"):
        unpacked(tmp_path / "one.tar", tmp_path / "cache")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "one.parquet")
    with pytest.raises(LabelsError, match="has columns id; wanted are pictures"):
        unpacked(tmp_path / "one.parquet", tmp_path / "cache")


def test_other_sets_stay_where_they_are(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("{}")
    write_tar(tmp_path / "backup.tar", [])
    for path in (tmp_path, tmp_path / "metadata.jsonl", tmp_path / "missing"):
        assert unpacked(path, tmp_path / "cache") == path
    (tmp_path / "metadata.jsonl").rename(tmp_path / "dataset_some.json")
    assert unpacked(tmp_path, tmp_path / "cache") == tmp_path
    (tmp_path / "dataset_some.json").rename(tmp_path / "dataset_infos.json")  # says nothing of it
    with pytest.raises(LabelsError, match="no picture with a caption"):
        unpacked(tmp_path, tmp_path / "cache")
    (tmp_path / "backup.tar").rename(tmp_path / "._backup.tar")  # as macOS leaves them
    assert unpacked(tmp_path, tmp_path / "cache") == tmp_path
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "a.txt").write_text("a caption beside it")
    assert unpacked(tmp_path, tmp_path / "cache") == tmp_path


@pytest.mark.slow
def test_a_tar_is_measured_like_a_folder(tmp_path, tiny):
    members = [
        (f"{n}.{kind}", content)
        for n, shade in enumerate(range(10, 250, 20))
        for kind, content in (("png", picture(shade)), ("txt", b"a shade of red"))
    ]
    write_tar(tmp_path / "shades.tar", members)
    with Engine.open(tmp_path / "index", model="tiny") as engine:
        with pytest.raises(LabelsError, match="holds pictures itself"):
            engine.index(tmp_path, captions=tmp_path / "shades.tar")
        report = engine.bench(tmp_path / "shades.tar")
    assert (report.dataset, len(report.corpus.images)) == ("shades", 12)

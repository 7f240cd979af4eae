"""Embeddings from elsewhere: whatever a file of metadata names, nothing hangs or is lost."""

from __future__ import annotations

import os
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import DECODERS, FakeEncoder, paint, unit_vectors

from mmsearch.errors import LabelsError
from mmsearch.ingest.exchange import import_embeddings, read_embeddings
from mmsearch.jobs.runner import Runner
from mmsearch.store.store import Store

SPEC = FakeEncoder().spec
DATE = "2020-01-01T00:00:00"
RNG = np.random.default_rng(0)


def export(folder, columns, parts=("0",), texts=False):
    count = len(next(iter(columns.values())))
    vectors = {}
    for part in parts:
        for name in ("img_emb", "text_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        vectors[part] = unit_vectors(RNG, count)
        np.save(folder / f"img_emb/img_emb_{part}.npy", vectors[part])
        if texts:
            np.save(folder / f"text_emb/text_emb_{part}.npy", unit_vectors(RNG, count))
        named = {
            name: [f"{part}-{value}" if name == "image_path" and len(parts) > 1 else value
                   for value in values] for name, values in columns.items()
        }  # fmt: skip
        pq.write_table(pa.table(named), folder / f"metadata/metadata_{part}.parquet")
    return vectors


@pytest.fixture
def imported(tmp_path):
    """Imports a folder of exports; the catalog's rows of media by name."""
    store = Store.create(tmp_path / "index")

    def run(folder):
        images = read_embeddings(folder, SPEC)
        with store.writer() as writer:
            runner = Runner(DECODERS, 2)
            import_embeddings(writer, SPEC, images, runner, on_progress=lambda progress: None)
        with store.catalog.read() as queries:
            found = [
                row for root in queries.roots()
                for row in queries.media_under(root.id, b"")
            ]  # fmt: skip
        return {os.path.basename(row.path).decode(): row for row in found}, store.contents()

    yield run
    store.close()


def test_paths_that_are_no_images_are_not_opened(tmp_path, imported):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "notes.txt").write_text("secret")
    paint(tmp_path / "a.png", "red")
    names = ["fifo.png", "zero.png", "notes.txt", "a.png", "gone.png", "/dev/zero", "/dev/stdin"]
    export(tmp_path / "e", {"image_path": [os.path.join(tmp_path, name) for name in names]})
    found = []
    thread = threading.Thread(target=lambda: found.append(imported(tmp_path / "e")), daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it hangs"
    ((rows, held),) = found
    assert len(held.image_ids) == len(names)
    assert {name for name, row in rows.items() if row.size >= 0} == {"a.png"}
    assert rows["a.png"].size == os.path.getsize(tmp_path / "a.png")


def test_parts_that_are_numbered_with_zeros_in_front(tmp_path, imported):
    vectors = export(tmp_path, {"image_path": ["a.png"], "caption": ["one"]}, ("00", "01", "10"),
                     texts=True)  # fmt: skip
    rows, held = imported(tmp_path)
    assert set(rows) == {"00-a.png", "01-a.png", "10-a.png"}
    assert held.caption_texts == ("one",) * 3
    for path, vector in zip(held.image_paths, held.image_vectors, strict=True):
        part = os.path.basename(path).decode().split("-")[0]
        np.testing.assert_allclose(vector, vectors[part][0], atol=1e-6)


@pytest.mark.parametrize(
    "columns",
    [
        {"captured": [DATE]},
        {"captured": [DATE], "width": [3], "height": [2]},
        {"captured": ["soon"], "width": [3], "height": [2], "captured_from": ["exif"]},
        {"captured": [DATE], "width": [-3], "height": [2], "captured_from": ["exif"]},
        {"captured": [DATE], "width": [2**62], "height": [2], "captured_from": ["exif"]},
        {"captured": [DATE], "width": [3], "height": [2], "captured_from": ["x"]},
        {"captured": [None], "width": [None], "height": [None], "captured_from": [None]},
    ],
)  # fmt: skip
def test_columns_of_ours_that_are_missing_or_nonsense_say_nothing(tmp_path, imported, columns):
    export(tmp_path, {"image_path": ["a.png"], **columns})
    rows, held = imported(tmp_path)
    assert set(rows) == {"a.png"}
    assert held.image_facts[0].captured_from == "mtime"
    assert held.image_facts[0].width == 0


def test_what_our_exports_say_is_kept(tmp_path, imported):
    export(tmp_path, {
        "image_path": ["a.png"], "captured": ["2020-01-01T00:00:00"], "width": [3], "height": [2],
        "captured_from": ["exif"], "caption": ["x"], "caption_source": ["\x1b[31m"],
    }, texts=True)  # fmt: skip
    _, held = imported(tmp_path)
    facts = held.image_facts[0]
    assert (facts.width, facts.height, str(facts.captured)) == (3, 2, "2020-01-01 00:00:00")
    assert held.caption_sources == ("file",)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": ["one"]}, "no column image_path"),
        ({"image_path": [None]}, "row 0 of the metadata names no image"),
        ({"image_path": [""]}, "row 0 of the metadata names no image"),
        ({"image_path": ["a\0b.png"]}, "row 0 of the metadata names no image"),
        ({"image_path": [7]}, "row 0 of the metadata names no image"),
    ],
)
def test_metadata_that_names_no_images_is_one_line(tmp_path, columns, message):
    export(tmp_path, columns)
    with pytest.raises(LabelsError, match=message):
        read_embeddings(tmp_path, SPEC)


def test_a_file_that_is_here_is_known_to_the_next_index(tmp_path, imported, encoder):
    file = paint(tmp_path / "p" / "a.png", "red")
    (tmp_path / "link").symlink_to("p")
    export(tmp_path / "e", {"image_path": [str(tmp_path / "link" / "a.png"), str(file)]})
    rows, held = imported(tmp_path / "e")
    assert len(held.image_ids) == 1  # one file, whatever it is called
    status = file.stat()
    assert (rows["a.png"].size, rows["a.png"].mtime_ns) == (status.st_size, status.st_mtime_ns)

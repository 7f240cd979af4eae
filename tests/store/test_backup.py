"""A backup is one state of an index in one file, whatever goes on meanwhile."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEncoder, new_media, root_at, unit_vectors

from mmsearch import Engine
from mmsearch.errors import DamageError, FormatError, UsageError
from mmsearch.store import catalog
from mmsearch.store.store import Store

SPEC = FakeEncoder().spec
RNG = np.random.default_rng(0)


def add(store, folder, names):
    with store.writer() as writer:
        space = writer.space_of(SPEC, "fp32")
        root = root_at(writer, folder)
        with writer.change() as change:
            for name in names:
                vectors = unit_vectors(RNG, 2)
                captions = [(f"about {name}", vectors[1])]
                change.add_media(new_media(root, name, vectors[0], captions=captions), space)


@pytest.fixture
def store(tmp_path):
    made = Store.create(tmp_path / "index")
    add(made, b"/photos/a", ["1", "2"])
    add(made, b"/photos/b", ["3"])
    yield made
    made.close()


def engine_at(folder):
    return Engine.open(folder, notify=lambda line: None)


def paths(folder):
    with engine_at(folder) as engine:
        assert engine.verify(deep=True).damages == ()
        return sorted(engine.store.contents().image_paths)


def test_everything_comes_back(store, tmp_path):
    (store.folder / "fusion.json").write_text("{}")
    with engine_at(store.folder) as engine:
        size = engine.backup(tmp_path / "file")
        before = engine.store.contents()
    assert size == (tmp_path / "file").stat().st_size
    with engine_at(tmp_path / "again") as engine:
        status = engine.restore(tmp_path / "file")
        after = engine.store.contents()
        assert (status.images, status.captions) == (3, 3)
    assert after.image_paths == before.image_paths
    assert after.caption_texts == before.caption_texts
    np.testing.assert_array_equal(after.image_vectors, before.image_vectors)
    assert (tmp_path / "again/fusion.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ({"/photos": "/mnt"}, [b"/mnt/a/1", b"/mnt/a/2", b"/mnt/b/3"]),
        ({"/photos/a": "/x"}, [b"/photos/b/3", b"/x/1", b"/x/2"]),
        ({"/photos": "/mnt", "/photos/a": "/x"}, [b"/mnt/b/3", b"/x/1", b"/x/2"]),
        ({"/photos/a": "/photos/b", "/photos/b": "/photos/a"},
         [b"/photos/a/3", b"/photos/b/1", b"/photos/b/2"]),
    ],
)  # fmt: skip
def test_folders_that_lie_elsewhere(store, tmp_path, moved, expected):
    with engine_at(store.folder) as engine:
        engine.backup(tmp_path / "file")
    with engine_at(tmp_path / "again") as engine:
        engine.restore(tmp_path / "file", moved)
    assert paths(tmp_path / "again") == expected


@pytest.mark.parametrize("moved", [{"/other": "/x"}, {"/photos/a": "/photos/b"}])
def test_a_move_that_makes_no_sense_makes_no_index(store, tmp_path, moved):
    with engine_at(store.folder) as engine:
        engine.backup(tmp_path / "file")
    with engine_at(tmp_path / "again") as engine:
        with pytest.raises(UsageError):
            engine.restore(tmp_path / "file", moved)
        assert not engine.opened.exists()
        engine.restore(tmp_path / "file")  # and can be made after all


def test_what_is_no_backup_is_refused(store, tmp_path):
    file = tmp_path / "file"
    for content in (b"", b"text" * 99, (store.folder / catalog.FILE_NAME).read_bytes()):
        file.write_bytes(content)
        with engine_at(tmp_path / "again") as engine, pytest.raises(UsageError, match="backup"):
            engine.restore(file)
    file.unlink()
    with engine_at(store.folder) as engine:
        engine.backup(file)
        with pytest.raises(UsageError, match="new file"):
            engine.backup(file)
    whole = file.read_bytes()
    with engine_at(store.folder) as engine, pytest.raises(UsageError, match="already"):
        engine.restore(file)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with engine_at(tmp_path / "full") as engine, pytest.raises(UsageError, match="not empty"):
        engine.restore(file)
    content = bytearray(whole)
    vector = bytes(store.contents().image_vectors[1])
    content[whole.index(vector) + 5] ^= 4
    file.write_bytes(content)
    with engine_at(tmp_path / "again") as engine, pytest.raises(DamageError):
        engine.restore(file)
    file.write_bytes(whole)
    with closing(sqlite3.connect(file)) as raw:
        raw.execute("PRAGMA user_version = 99")
    with engine_at(tmp_path / "again") as engine:
        with pytest.raises(FormatError, match="update mmsearch"):
            engine.restore(file)
        assert not engine.opened.exists()


def test_damage_is_not_backed_up(store, tmp_path):
    with store.catalog.write() as connection:
        connection.exec_driver_sql("UPDATE embedding SET vector = zeroblob(64) WHERE id = 2")
    with engine_at(store.folder) as engine, pytest.raises(DamageError, match="damaged"):
        engine.backup(tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_backup_writes_no_file_but_those_it_knows(store, tmp_path):
    with engine_at(store.folder) as engine:
        engine.backup(tmp_path / "file")
    with closing(sqlite3.connect(tmp_path / "file")) as raw:
        for name in ("../escaped", "/tmp/escaped", "cli.py", "catalog.sqlite3"):
            raw.execute("INSERT INTO kept_file VALUES (?, ?)", (name, b"bad"))
        raw.commit()
    with engine_at(tmp_path / "deep/again") as engine:
        engine.restore(tmp_path / "file")
    names = {path.name for path in (tmp_path / "deep/again").iterdir()}
    assert names <= {"catalog.sqlite3", "mmsearch-index.json", "vectors", "writer.lock",
                     "catalog.sqlite3-wal", "catalog.sqlite3-shm"}  # fmt: skip
    assert not list(tmp_path.rglob("escaped"))
    assert not Path("/tmp/escaped").exists()


def test_a_backup_leaves_the_files_beside_it(store, tmp_path):
    beside = [tmp_path / f"photos{end}" for end in ("-wal", "-shm", "-journal")]
    for path in beside:
        path.write_text("mine")
    with engine_at(store.folder) as engine:
        engine.backup(tmp_path / "photos")
    assert all(
        (tmp_path / f"photos{end}").read_text() == "mine" for end in ("-wal", "-shm", "-journal")
    )


def test_backups_while_a_writer_writes_are_each_one_state_of_it(store, tmp_path):
    """Pictures come and go in tens: every backup holds a whole number of these."""
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            add(store, b"/photos/c", [f"{number}-{n}" for n in range(10)])
            number += 1
            if number % 4 == 0:
                with store.writer() as writer:
                    writer.remove([b"/photos/c"])
                    writer.compact()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen = set()
        for number in range(200):
            if number >= 12 and len(seen) > 1:  # more, where the writer gets few turns
                break
            with engine_at(store.folder) as engine:
                engine.backup(tmp_path / f"file{number}")
            with engine_at(tmp_path / f"again{number}") as engine:
                engine.restore(tmp_path / f"file{number}")
            found = paths(tmp_path / f"again{number}")
            assert (len(found) - 3) % 10 == 0
            seen.add(len(found))
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 1

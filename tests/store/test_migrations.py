"""Indexes of the format before are brought to this one: nothing is lost, no vector is written."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import time
from contextlib import closing

import numpy as np
import pytest
from fakes import FakeEncoder, nearest, new_media, root_at, unit_vectors
from format4 import make_older

from mmsearch import Engine
from mmsearch.errors import DamageError, FormatError
from mmsearch.store import catalog, schema
from mmsearch.store.migrations import FORMAT_VERSION, MIGRATIONS, migrate
from mmsearch.store.patches import pack_patches
from mmsearch.store.store import Store

SPEC = FakeEncoder().spec
RNG = np.random.default_rng(3)


def fill(store, count=30, prefix=""):
    vectors = unit_vectors(RNG, 3 * count)
    with store.writer() as writer:
        space = writer.space_of(SPEC, "fp32")
        root = root_at(writer, b"/photos")
        with writer.change() as change:
            ids = [
                change.add_media(
                    new_media(root, f"{prefix}{n}", vectors[3 * n], captions=[
                        (f"a red thing {n}", vectors[3 * n + 1]), ("more", vectors[3 * n + 2])]),
                    space,
                )
                for n in range(count)
            ]  # fmt: skip
        with writer.change() as change:
            change.record_failure(root.id, b"bad", 1, 2, "damaged")
            looks = pack_patches(unit_vectors(RNG, 1), unit_vectors(RNG, 4)[None])
            change.add_patches({ids[0]: looks[0]}, space)
        writer.compact()
        with writer.change() as change:
            change.remove_media(ids[-2:])
        with writer.change() as change:
            change.add_media(new_media(root, f"{prefix}late", vectors[1]), space)
    return vectors


@pytest.fixture
def older(tmp_path):
    """The folder of an index of format 4, and what it must go on to answer."""
    with closing(Store.create(tmp_path / "index")) as store:
        vectors = fill(store)
        expected = answers(store, vectors)
    make_older(store.catalog.path)
    return store.folder, vectors, expected


def answers(store, vectors):
    status = store.status()
    with store.catalog.read() as queries:
        words = queries.media_with_words("red things 3", 99)
        patches = queries.patches_of(queries.active_space(), range(99))
    return {
        "nearest": [
            (one.ids, one.items)
            for to in ("image", "caption")
            for one in nearest(store, vectors[:9], to, 20)
        ],
        "words": words,
        "patches": patches,
        "counts": (status.images, status.captions, status.failures, status.patches),
        "space": (status.model, status.space, status.dim),
    }


def test_everything_is_answered_as_before(older):
    folder, vectors, expected = older
    with closing(Store(folder)) as store:
        assert answers(store, vectors) == expected
        assert store.active_space().spec.preprocess == SPEC.preprocess
        with Engine.open(folder, notify=lambda line: None) as engine:
            assert engine.verify(deep=True).damages == ()
        # What is added gets an id that nothing had, and what is removed is gone.
        before = store.contents().image_ids.max()
        fill(store, 2, "more")
        assert store.contents().image_ids.max() > before + 1


def test_no_vector_is_written(older):
    folder, *_ = older
    path = folder / catalog.FILE_NAME

    def pages():
        with closing(sqlite3.connect(path)) as raw:
            return raw.execute(
                "SELECT rowid, id, vector, checksum FROM embedding ORDER BY id"
            ).fetchall()

    before, size = pages(), path.stat().st_size
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        changed = raw.total_changes
        raw.execute("CREATE TEMP TABLE written (id)")
        raw.execute("CREATE TEMP TRIGGER on_update AFTER UPDATE ON main.embedding BEGIN "
                    "INSERT INTO written VALUES (NEW.id); END")  # fmt: skip
        migrate(raw)
        assert raw.execute("SELECT count(*) FROM written").fetchone() == (0,)
        assert raw.total_changes > changed
    assert pages() == before
    assert path.stat().st_size < size + 2**20


def test_the_tables_are_those_of_a_new_index(older, tmp_path):
    def described(path):
        with closing(sqlite3.connect(path)) as raw:
            tables = raw.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
            ).fetchall()
            triggers = raw.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
            return {
                "columns": {
                    name: sorted(row[1:4] + row[5:] for row in raw.execute(
                        f"PRAGMA table_info({name})"))
                    for (name,) in tables
                },
                "indexes": {
                    name: sorted(
                        (row[2:], tuple(raw.execute(f"PRAGMA index_info({row[1]})")))
                        for row in raw.execute(f"PRAGMA index_list({name})")
                    )
                    for (name,) in tables
                },
                "references": {
                    name: sorted(row[2:5] for row in raw.execute(
                        f"PRAGMA foreign_key_list({name})"))
                    for (name,) in tables
                },
                "triggers": {name: " ".join(sql.split()) for name, sql in triggers},
            }  # fmt: skip

    folder, *_ = older
    Store(folder).close()
    Store.create(tmp_path / "new").close()
    found = described(folder / catalog.FILE_NAME)
    for part, expected in described(tmp_path / "new" / catalog.FILE_NAME).items():
        if part == "indexes":  # the number of a column depends on when it was added
            assert {t: [r[0] for r in rows] for t, rows in found[part].items()} == {
                t: [r[0] for r in rows] for t, rows in expected.items()
            }
        else:
            assert found[part] == expected
    assert set(schema.metadata.tables) <= set(found["columns"])


def test_a_kill_leaves_the_format_before_or_this_one(older):
    folder, vectors, expected = older
    path = folder / catalog.FILE_NAME
    kept = path.read_bytes()
    context = multiprocessing.get_context("fork")
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.04):
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
        path.write_bytes(kept)
        process = context.Process(target=lambda: Store(folder))
        process.start()
        time.sleep(delay)
        process.kill()
        process.join()
        with closing(sqlite3.connect(path)) as raw:
            assert raw.execute("PRAGMA user_version").fetchone()[0] in (4, FORMAT_VERSION)
        with closing(Store(folder)) as store:
            assert answers(store, vectors) == expected


def test_a_step_and_its_record_commit_together(older):
    folder, *_ = older

    def half(connection):
        MIGRATIONS[-1](connection)
        raise RuntimeError("power cut")

    steps = (*MIGRATIONS[:-1], half)
    path = folder / catalog.FILE_NAME
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as raw,
        pytest.raises(RuntimeError),
    ):
        migrate(raw, steps)
    with closing(sqlite3.connect(folder / catalog.FILE_NAME)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (4,)
        assert raw.execute(
            "SELECT count(*) FROM sqlite_master WHERE name = 'tower'"
        ).fetchone() == (0,)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_older_format_is_refused_by_its_name(older, version):
    folder, *_ = older
    with closing(sqlite3.connect(folder / catalog.FILE_NAME)) as raw:
        raw.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(FormatError, match=f"has format {version}.*index the folders again"):
        Store(folder)


def test_a_backup_of_the_format_before_is_restored(older, tmp_path):
    folder, vectors, expected = older
    backup = tmp_path / "backup"
    with closing(sqlite3.connect(folder / catalog.FILE_NAME)) as raw:
        raw.execute("DELETE FROM snapshot")
        raw.execute("DELETE FROM tombstone")
        raw.execute("CREATE TABLE kept_file (name TEXT PRIMARY KEY, content BLOB)")
        raw.commit()
        raw.execute(f"VACUUM INTO '{backup}'")
    with Engine.open(tmp_path / "back", notify=lambda line: None) as engine:
        engine.restore(backup)
        assert engine.verify(deep=True).damages == ()
        assert answers(engine.store, vectors) == expected


def test_a_damaged_catalog_of_the_format_before_is_repaired(older):
    folder, vectors, expected = older
    path = folder / catalog.FILE_NAME
    size = path.stat().st_size
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = raw.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'ix_media_captured'"
        ).fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * 16384)
        file.write(os.urandom(4096))
    assert path.stat().st_size == size
    with Engine.open(folder, notify=lambda line: None) as engine:
        try:
            repaired = engine.repair()
        except DamageError as error:
            pytest.fail(str(error))
        assert repaired.lost == ()
        assert engine.verify(deep=True).damages == ()
        assert answers(engine.store, vectors) == expected

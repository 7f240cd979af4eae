"""SIGKILL at any moment: what is there afterwards is whole, and another run completes it."""

from __future__ import annotations

import dataclasses
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from fakes import root_at, unit_vectors

from mmsearch import Engine
from mmsearch.datasets import scene_art, scenes
from mmsearch.errors import IndexNotFound, NotFoundError
from mmsearch.store.changes import NewMedia
from mmsearch.store.store import Store

COUNT = 260


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    top = tmp_path_factory.mktemp("many")
    for number, scene in enumerate(scenes.gallery(COUNT, seed=9000)):
        scene_art.render(scene).save(top / f"{number:03d}.png")
        (top / f"{number:03d}.txt").write_text(scenes.captions(scene)[0])
    return top


@pytest.fixture(scope="module")
def undisturbed_index(folder, tmp_path_factory):
    index = tmp_path_factory.mktemp("whole") / "index"
    with Engine.open(index, model="tiny") as engine:
        engine.index([folder])
    return index


@pytest.fixture(scope="module")
def undisturbed(undisturbed_index):
    with Engine.open(undisturbed_index) as engine:
        return contents(engine)


def contents(engine):
    held = engine.store.contents()
    place = dict(zip(held.image_ids.tolist(), held.image_paths, strict=True))
    images = dict(zip(held.image_paths, held.image_vectors, strict=True))
    captions = {
        (place[int(media)], text): vector
        for media, text, vector in zip(
            held.caption_media, held.caption_texts, held.caption_vectors, strict=True
        )
    }
    assert len(images) == len(held.image_ids)
    return images, captions


def start(folder, index):
    command = [sys.executable, "-m", "mmsearch", "index", str(folder), "--index", str(index),
               "--model", "tiny"]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def check_whole(index, *, captions=True):
    """The index is none at all, or every committed row is found by a search; how many there are.

    `captions`: every image here has one caption, and neither is ever committed alone.
    """
    try:
        with Engine.open(index) as engine:
            if engine.store.active_space() is None:
                return 0
            held = engine.store.contents()
            assert not captions or len(held.caption_ids) == len(held.image_ids)
            space = engine.store.active_space().spec.space
            if len(held.image_ids):
                answers = engine.store.search(space, held.image_vectors, "image", 9 * COUNT)
                assert all(set(a.ids) == set(held.image_ids.tolist()) for a in answers)
            return len(held.image_ids)
    except IndexNotFound:
        return 0


@pytest.mark.parametrize("seed", range(4))
def test_killed_runs_end_as_an_undisturbed_one(folder, undisturbed, tmp_path, seed):
    rng, index = random.Random(seed), tmp_path / "index"
    for _ in range(3):
        process = start(folder, index)
        time.sleep(rng.uniform(0.3, 2.2))
        process.kill()
        process.wait()
        check_whole(index)
    with Engine.open(index, model="tiny") as engine:
        engine.index([folder])
        images, captions = contents(engine)
    assert check_whole(index) == COUNT
    for found, expected in ((images, undisturbed[0]), (captions, undisturbed[1])):
        assert set(found) == set(expected)
        assert min(float(np.dot(found[key], expected[key])) for key in expected) > 0.9999


#: Kills itself at the call that the command line numbers, of all that it counts.
COUNTING = """
import os, sys
at = int(sys.argv[2])
calls = 0
def counting(original):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), 9)
        return original(*args, **kwargs)
    return call
"""

KILLED_WHILE_MADE = (
    COUNTING
    + """
from pathlib import Path
from mmsearch.store import catalog, migrations, store
for module in (catalog, store):
    for name in ("sync_file", "sync_folder", "write_durably", "migrate"):
        if hasattr(module, name):
            setattr(module, name, counting(getattr(module, name)))
catalog.os.replace = counting(os.replace)
migrations.MIGRATIONS = tuple(map(counting, migrations.MIGRATIONS))
store.Store.create(Path(sys.argv[1])).close()
print("made")
"""
)


def test_an_index_killed_while_it_is_made_is_none_or_sound(tmp_path):
    at = 0
    while True:
        at += 1
        index = tmp_path / f"index{at}"
        done = subprocess.run(
            [sys.executable, "-c", KILLED_WHILE_MADE, str(index), str(at)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        try:
            with Engine.open(index) as engine:
                assert engine.status().images == 0
        except NotFoundError as error:
            assert error.exit_code == 3
        with Engine.open(index) as engine:  # and it can be made after all
            Store.create(index).close()
            assert engine.status().images == 0
        if done.stdout == "made\n":
            break
    assert at > 5


KILLED_WHILE_COMPACTED = (
    COUNTING
    + """
from pathlib import Path
from mmsearch.store import store, writer
from mmsearch.store.changes import Change
from mmsearch.store.faiss_index import FaissIndex
for name in ("sync_file", "sync_folder"):
    setattr(writer, name, counting(getattr(writer, name)))
FaissIndex.save = counting(FaissIndex.save)
Path.replace = counting(Path.replace)
Path.unlink = counting(Path.unlink)
Change.set_snapshot = counting(Change.set_snapshot)
Change.finish = counting(Change.finish)
with store.Store(Path(sys.argv[1])).writer() as opened:
    opened.compact()
print("compacted")
"""
)


def test_a_compaction_killed_at_any_step_loses_nothing(undisturbed_index, tmp_path):
    """With a snapshot, a tail and tombstones there before."""
    at = 0
    while True:
        at += 1
        index = tmp_path / f"index{at}"
        shutil.copytree(undisturbed_index, index)
        with Store(index).writer() as writer:
            writer.compact()
            space = writer.space_of(Store(index).active_space().spec, "fp32")
            root = root_at(writer, b"/extra")
            vectors = unit_vectors(np.random.default_rng(0), 30, space.spec.dim)
            with writer.change() as change:
                for number, vector in enumerate(vectors):
                    name = b"%d" % number
                    change.add_media(
                        NewMedia(root.id, name, 1, 1, name, 1, 1, "2020-01-01", "mtime", vector),
                        space,
                    )
        with Store(index).writer() as writer:
            held = Store(index).contents()
            writer.remove([held.image_paths[0], held.image_paths[-1], held.image_paths[5]])
        done = subprocess.run(
            [sys.executable, "-c", KILLED_WHILE_COMPACTED, str(index), str(at)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert check_whole(index, captions=False) == COUNT + 27
        with Store(index).writer() as writer:
            writer.compact()
        assert check_whole(index, captions=False) == COUNT + 27
        assert len(list((index / "vectors").iterdir())) == 2
        if done.stdout == "compacted\n":
            break
        assert done.returncode == -9
    assert at > 10


KILLED_WHILE_SWITCHED = (
    COUNTING
    + """
from pathlib import Path
from mmsearch.store import catalog, store, writer
from mmsearch.store.changes import Change
writer._LONG_TAIL = 16
Path.unlink = counting(Path.unlink)
for name in ("activate", "drop_some", "finish"):
    setattr(Change, name, counting(getattr(Change, name)))
opened = store.Store(Path(sys.argv[1]))
with opened.catalog.read() as connection:
    coming = catalog.coming_space(connection)
with opened.writer() as writer:
    writer.switch_to(coming)
print("switched")
"""
)


def test_going_over_to_another_model_killed_at_any_step_is_before_or_after(
    undisturbed_index, tmp_path
):
    prepared = tmp_path / "prepared"
    shutil.copytree(undisturbed_index, prepared)
    store = Store(prepared)
    old = store.contents()
    other = dataclasses.replace(store.active_space().spec, space="f" * 32, model="other")
    rng = np.random.default_rng(1)
    new = {
        "image": dict(
            zip(old.image_ids, unit_vectors(rng, len(old.image_ids), other.dim), strict=True)
        ),
        "caption": dict(
            zip(old.caption_ids, unit_vectors(rng, len(old.caption_ids), other.dim), strict=True)
        ),
    }
    with store.writer() as writer:
        coming = writer.space_of(other, "fp32", beside=True)
        with writer.change() as change:
            for modality, vectors in new.items():
                change.add_vectors({int(n): row for n, row in vectors.items()}, coming, modality)
        writer.compact()
    store.close()
    at, seen = 0, set()
    while True:
        at += 1
        index = tmp_path / f"index{at}"
        shutil.copytree(prepared, index)
        done = subprocess.run(
            [sys.executable, "-c", KILLED_WHILE_SWITCHED, str(index), str(at)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        for _ in range(2):  # as it was left, and mended
            store = Store(index)
            space, held = store.active_space().spec, store.contents()
            is_new = space.model == "other"
            seen.add(is_new)
            wanted = list(new["image"].values()) if is_new else old.image_vectors
            np.testing.assert_array_equal(held.image_vectors, wanted)
            assert len(held.caption_ids) == len(old.caption_ids)
            found = store.search(space.space, np.array(wanted[:3]), "image", 1)
            assert [one.ids[0] for one in found] == held.image_ids[:3].tolist()
            with store.writer():
                pass
            with store.catalog.read() as connection:
                spaces = connection.execute("SELECT count(*) FROM space").fetchone()[0]
            assert spaces == (1 if is_new else 2)
            assert len(list((index / "vectors").iterdir())) == 2 * spaces
            store.close()
        if done.stdout == "switched\n":
            break
        assert done.returncode == -9
    assert seen == {False, True}
    assert at > 10

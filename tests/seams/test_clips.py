"""Files of several pictures: each is found by its best, and none stands for another."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from fakes import FakeEncoder, paint

from mmsearch import Engine
from mmsearch.config import load_settings
from mmsearch.encoders.encoder_provider import GivenEncoder
from mmsearch.errors import DecodeError, UsageError
from mmsearch.ingest.reading import gather
from mmsearch.media.media_types import Caption, MediaTypes, Segment
from mmsearch.types import EncoderSpec


def engine_at(folder, *types):
    return Engine(
        load_settings(index=folder),
        provider=GivenEncoder(FakeEncoder()),
        media_types=MediaTypes(*types),
    )


@pytest.fixture
def top(tmp_path):
    folder = tmp_path / "files"
    for number in range(40):
        paint(folder / f"{number:02}.png", ("white", "yellow")[number % 2], mark=number + 1)
        (folder / f"{number:02}.txt").write_text(f"a plain picture {number}")
    (folder / "red.clip").write_text("red " * 30)
    (folder / "mixed.clip").write_text("green blue black red")
    return folder


@pytest.fixture
def engine(tmp_path, top):
    with engine_at(tmp_path / "index", "seams.clips:CLIP") as engine:
        assert engine.index(top).added == 42
        yield engine


@pytest.mark.parametrize("fusion", ["image", "caption", "words", "sum", "rrf", "auto"])
def test_a_file_is_found_once_by_any_fusion(engine, fusion):
    hits = engine.search("red picture", k=20, fusion=fusion)
    names = [hit.path.name for hit in hits]
    assert len(names) == len(set(names))
    if fusion != "words":  # each picture is called one, and none but two files are red
        assert set(names[:2]) == {"red.clip", "mixed.clip"}
        assert len(names) == 20
    media = {hit.path.name: hit.media_id for hit in engine.search("picture", k=50)}
    assert all(media[hit.path.name] == hit.media_id for hit in hits)


def test_many_captions_of_one_file_hide_no_other(engine):
    hits = engine.search("picture", k=42, fusion="words")
    assert len({hit.path.name for hit in hits}) == 42


def test_a_copy_has_all_that_the_first_has(engine, top):
    shutil.copy(top / "mixed.clip", top / "copy.clip")
    assert engine.index().added == 1
    hits = engine.search("picture 2 is black", to="caption", k=200)
    own = [hit.caption for hit in hits if hit.path.name == "copy.clip"]
    assert sorted(own) == ["picture 0 is green", "picture 1 is blue", "picture 2 is black",
                           "picture 3 is red"]  # fmt: skip
    assert engine.verify(deep=True).damages == ()


def test_a_copy_of_what_has_lost_a_vector_is_read_again(engine, top, tmp_path):
    change(tmp_path, "DELETE FROM embedding WHERE tower = 'image' AND item_id = "
                     "(SELECT max(id) FROM segment)")  # fmt: skip
    shutil.copy(top / "mixed.clip", top / "copy.clip")
    shutil.copy(top / "red.clip", top / "again.clip")
    assert engine.index().added == 2
    assert [one.kind for one in engine.verify().damages] == ["missing"]


def change(tmp_path, statement):
    with closing(sqlite3.connect(tmp_path / "index" / "catalog.sqlite3")) as raw:
        raw.execute(statement)
        raw.commit()


def test_each_part_gets_its_own_vector_again(engine, tmp_path):
    engine.close()
    before = vectors(engine)
    change(tmp_path, "UPDATE embedding SET vector = zeroblob(length(vector)) WHERE item_id IN "
                     "(SELECT id FROM segment WHERE id != media_id)")  # fmt: skip
    for path in (tmp_path / "index" / "vectors").iterdir():
        path.unlink()
    engine.close()
    assert engine.repair().lost == ()
    after = vectors(engine)
    np.testing.assert_allclose(after, before, atol=1e-6)


def vectors(engine):
    with engine.store.reader() as reader:
        files = np.array([hit.media_id for hit in engine.search("red", k=100)])
        return reader.vectors("image", np.sort(reader.items_of("image", files)[0]))


def test_what_a_decoder_should_not_send_is_listed(engine, top):
    (top / "lies.clip").write_text("red lies")
    (top / "sings.clip").write_text("red sings")
    assert engine.index().failed == 2
    reasons = {one.path.name: one.reason for one in engine.errors()}
    assert "no part of it" in reasons["lies.clip"]
    assert "nobody asked for" in reasons["sings.clip"]


def test_too_much_of_one_file_is_its_own_fault():
    inputs = {"image": {}}
    most = {"most_bytes": 1000, "most_captions": 3}
    with pytest.raises(DecodeError, match="too large"):
        gather([Segment("image", np.zeros(400, np.uint8))] * 3, inputs, **most)
    with pytest.raises(DecodeError, match="too large"):
        gather([Caption("a")] * 4, inputs, **most)
    assert [one.text for one in gather([Caption("a\0b"), Caption("\n")], inputs)[2]] == ["a b"]


def test_a_run_that_does_not_look_for_a_type_removes_none_of_it(engine, tmp_path):
    engine.close()
    with engine_at(tmp_path / "index") as plain:
        report = plain.index()
        assert (report.removed, report.unchanged) == (0, 40)
        assert plain.status().images == 42
    (tmp_path / "files" / "red.clip").unlink()
    assert engine.index().removed == 1


def test_a_damaged_file_of_other_vectors_is_nothing_to_a_search(engine, tmp_path):
    engine.compact()
    engine.close()
    (path,) = (tmp_path / "index" / "vectors").glob("*-caption-*.faiss")
    path.write_bytes(path.read_bytes()[:500])
    assert len(engine.search("red", fusion="image")) == 10


@pytest.mark.parametrize("modality", ["Sound", "sound-clip", "caption", ""])
def test_a_modality_has_a_plain_name(modality):
    with pytest.raises(UsageError, match="small letters"):
        EncoderSpec("m", "0" * 32, 4, {modality: {}})

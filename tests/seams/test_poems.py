"""A media type and a modality are added from outside: see poems.py, which is all of them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from seams.poems import WordHashes

from mmsearch import Engine, Filter, Query, Term
from mmsearch.config import load_settings
from mmsearch.encoders.encoder_provider import GivenEncoder
from mmsearch.errors import UsageError
from mmsearch.media.media_types import MediaTypes

POEMS = {
    "sea.poem": "The sea\nWaves roll over the grey sand.\n\nA gull cries above the harbour.\n",
    "wood.poem": "The wood\nMoss grows beneath the silent oak.\n",
    "night.poem": "Night\nStars burn over the sleeping town.\n\nA fox crosses the silent road.\n",
}


def test_it_takes_fewer_than_sixty_lines():
    lines = Path(__file__).with_name("poems.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) < 60


def engine_at(folder):
    return Engine(
        load_settings(index=folder),
        provider=GivenEncoder(WordHashes()),
        media_types=MediaTypes("seams.poems:POEM"),
    )


@pytest.fixture
def engine(tmp_path):
    for name, text in POEMS.items():
        (tmp_path / "poems" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "poems" / name).write_text(text)
    with engine_at(tmp_path / "index") as engine:
        assert engine.index(tmp_path / "poems").added == 3
        yield engine


def found(engine, text, **options):
    return [
        (hit.path.name, hit.start_ms)
        for hit in engine.search(text, to="poem", fusion="image", **options)
    ]


def test_verses_are_found_and_a_poem_is_found_once(engine, tmp_path):
    assert found(engine, "a fox on the road")[0] == ("night.poem", 1)
    assert found(engine, "stars over town")[0] == ("night.poem", 0)
    assert sorted(name for name, _ in found(engine, "the silent sea")) == sorted(POEMS)
    (hit,) = engine.search("moss", to="poem", k=1)
    assert (hit.modality, hit.path.name, hit.start_ms, hit.end_ms) == ("poem", "wood.poem", 0, 1)
    only = Query((Term("silent"),), "poem", filter=Filter(under=tmp_path / "poems/wood.poem"))
    assert [hit.path.name for hit in engine.search(only)] == ["wood.poem"]


def test_what_lies_in_a_poem_are_its_captions(engine):
    hits = engine.search("the wood", to="caption")
    assert (hits[0].caption, hits[0].path.name) == ("The wood", "wood.poem")
    assert hits[0].score == pytest.approx(1, abs=1e-3)


def test_a_modality_that_the_model_has_not_is_refused(engine):
    with pytest.raises(UsageError, match="embeds poem, text, no 'sound'"):
        engine.search("waves", to="sound")


def test_what_is_damaged_changed_moved_copied_and_gone_is_seen(engine, tmp_path):
    poems = tmp_path / "poems"
    (poems / "bad.poem").write_bytes(b"\xff\xfe no text")
    (poems / "empty.poem").write_text("only a title\n")
    (poems / "wood.poem").rename(poems / "forest.poem")
    (poems / "copy.poem").write_text(POEMS["sea.poem"])
    (poems / "night.poem").write_text("Night\nOwls hoot.\n")
    report = engine.index()
    assert (report.added, report.updated, report.moved, report.failed) == (1, 1, 1, 2)
    reasons = {failure.path.name: failure.reason for failure in engine.errors()}
    assert "can't decode" in reasons["bad.poem"]
    assert "nothing that the index's model embeds" in reasons["empty.poem"]
    assert found(engine, "owls hoot")[0] == ("night.poem", 0)
    assert {name for name, _ in found(engine, "gull harbour", k=2)} == {"sea.poem", "copy.poem"}
    titles = sorted(hit.caption for hit in engine.search("the", to="caption"))
    assert titles == ["Night", "The sea", "The sea", "The wood"]
    (poems / "sea.poem").unlink()
    assert engine.index().removed == 1
    assert engine.verify(deep=True).damages == ()


def test_an_index_of_poems_is_verified_backed_up_and_repaired(engine, tmp_path):
    before = found(engine, "the silent sea")
    assert engine.verify(deep=True).damages == ()
    engine.compact()
    engine.backup(tmp_path / "backup")
    with engine_at(tmp_path / "again") as other:
        other.restore(tmp_path / "backup")
        assert found(other, "the silent sea") == before
        assert other.verify(deep=True).damages == ()
    engine.close()
    with closing(sqlite3.connect(tmp_path / "index" / "catalog.sqlite3")) as raw:
        raw.execute("UPDATE embedding SET vector = zeroblob(length(vector)) WHERE tower = 'poem'")
        raw.commit()
    for path in (tmp_path / "index" / "vectors").iterdir():
        path.unlink()
    assert {one.kind for one in engine.verify(deep=True).damages} >= {"vector"}
    repaired = engine.repair()
    assert (repaired.embedded, repaired.lost) == (5, ())
    assert engine.verify(deep=True).damages == ()
    assert found(engine, "the silent sea") == before


def test_an_index_of_pictures_goes_on_beside_it(engine, tmp_path):
    """What one index's media types are is nothing to another."""
    from fakes import FakeEncoder, paint

    paint(tmp_path / "mixed/red.png", "red")
    (tmp_path / "mixed/a.poem").write_text(POEMS["sea.poem"])
    plain = Engine(load_settings(index=tmp_path / "plain"), provider=GivenEncoder(FakeEncoder()))
    with plain:
        assert plain.index(tmp_path / "mixed").added == 1
        assert [hit.path.name for hit in plain.search("red")] == ["red.png"]
    assert engine.index(tmp_path / "mixed").added == 1
    assert {one.path.name for one in engine.errors()} == {"red.png"}
    assert np.isfinite(engine.search("waves", to="poem")[0].score)

"""Second looks at what is indexed: none is lost, none is taken twice."""

from __future__ import annotations

import pytest
from fakes import DECODERS, FakeEncoder, FakeLocal, paint

from mmsearch.ingest import looks
from mmsearch.ingest.pipeline import Pipeline
from mmsearch.ingest.plan import make_plan, scopes_of
from mmsearch.store.store import Store


@pytest.fixture
def store(tmp_path):
    for number in range(10):
        paint(tmp_path / "p" / f"{number}.png", "red", mark=number + 1)
    store = Store.create(tmp_path / "index")
    with store.writer() as writer:
        plan = make_plan(store, scopes_of(store, writer, [tmp_path / "p"], None), prune=None)
        Pipeline(store, writer, FakeEncoder(), DECODERS, workers=2).run(plan)
    yield store
    store.close()


def test_what_was_committed_before_an_interrupt_is_kept(store, monkeypatch):
    monkeypatch.setattr(looks, "BATCH", 3)
    local, told = FakeLocal(), []

    def stop(progress):
        told.append(progress)
        if progress.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), store.writer() as writer:
        looks.add_looks(
            store, writer, local, store.active_space(), DECODERS, workers=2, on_progress=stop
        )
    assert store.status().looks == 6
    with store.writer() as writer:
        assert (
            looks.add_looks(
                store,
                writer,
                local,
                store.active_space(),
                DECODERS,
                workers=2,
                on_progress=told.append,
            )
            == 4
        )
    assert local.looked == 10
    assert [(p.stage, p.done, p.total) for p in told] == [
        ("patches", 3, 10), ("patches", 6, 10), ("patches", 3, 4), ("patches", 4, 4)
    ]  # fmt: skip


def test_a_file_that_cannot_be_read_is_passed_over(store, tmp_path):
    (tmp_path / "p" / "3.png").unlink()
    (tmp_path / "p" / "4.png").write_bytes(b"no picture any more")
    with store.writer() as writer:
        assert (
            looks.add_looks(store, writer, FakeLocal(), store.active_space(), DECODERS, workers=2)
            == 8
        )
    assert store.status().looks == 8

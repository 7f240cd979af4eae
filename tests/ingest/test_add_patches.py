"""Patch embeddings of what is indexed: none is lost, none is made twice."""

from __future__ import annotations

import pytest
from fakes import DECODERS, FakeEncoder, FakePatchEncoder, paint, run_plan

from mmsearch.ingest.patches import add_patches
from mmsearch.ingest.plan import make_plan, scopes_of
from mmsearch.jobs.runner import Runner
from mmsearch.store.store import Store


@pytest.fixture
def store(tmp_path):
    for number in range(10):
        paint(tmp_path / "p" / f"{number}.png", "red", mark=number + 1)
    store = Store.create(tmp_path / "index")
    with store.writer() as writer:
        plan = make_plan(store, scopes_of(store, writer, [tmp_path / "p"], None), prune=None)
        run_plan(store, writer, plan, FakeEncoder(), workers=2)
    yield store
    store.close()


def test_what_was_committed_before_an_interrupt_is_kept(store):
    runner = Runner(DECODERS, 2, batch=3)
    local, told = FakePatchEncoder(), []

    def stop(progress):
        told.append(progress)
        if progress.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), store.writer() as writer:
        add_patches(store, writer, local, store.active_space(), runner, on_progress=stop)
    assert store.status().patches == 6
    with store.writer() as writer:
        again = add_patches(
            store, writer, local, store.active_space(), runner, on_progress=told.append
        )
    assert again == 4
    assert 10 <= local.looked <= 16  # what was computed ahead of the interrupt is computed again
    assert [(p.stage, p.done, p.total) for p in told] == [
        ("patches", 3, 10), ("patches", 6, 10), ("patches", 3, 4), ("patches", 4, 4)
    ]  # fmt: skip


def test_a_file_that_cannot_be_read_is_passed_over(store, tmp_path):
    (tmp_path / "p" / "3.png").unlink()
    (tmp_path / "p" / "4.png").write_bytes(b"no picture any more")
    with store.writer() as writer:
        added = add_patches(
            store, writer, FakePatchEncoder(), store.active_space(), Runner(DECODERS, 2)
        )
    assert added == 8
    assert store.status().patches == 8

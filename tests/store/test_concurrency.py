"""Two at once: one writer, many readers, in threads and in processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fakes import FakeEncoder, nearest, new_media, paint, root_at, unit_vectors

from mmsearch import Engine, Filter, Query, Term
from mmsearch.encoders.encoder_provider import GivenEncoder
from mmsearch.store.store import Store
from mmsearch.store.writer import Compaction

pytestmark = pytest.mark.slow

SPEC = FakeEncoder().spec


@pytest.fixture
def store(tmp_path):
    made = Store.create(tmp_path / "index")
    yield made
    made.close()


def add_ten(store, ten, vectors):
    with store.writer() as writer:
        space = writer.space_of(SPEC, "fp32")
        root = root_at(writer, b"/p")
        with writer.change() as change:
            for number, vector in enumerate(vectors):
                name = b"%d/%d" % (ten, number)
                captions = [(f"word{ten}", vector)]
                change.add_media(new_media(root, name, vector, captions=captions), space)


def test_readers_see_every_commit_whole_through_additions_removals_and_compactions(  # noqa: C901 - a writer and its readers
    store,
):
    """Tens come and go; what was committed before a search began is found by it, whole tens."""
    store.compaction = Compaction(short=20)
    rng = np.random.default_rng(0)
    tens = 40
    vectors = unit_vectors(rng, 10 * tens).reshape(tens, 10, -1)
    present, going = set(), set()  # tens that are there for certain, and that may be gone
    stop, wrong = threading.Event(), []

    def write():
        try:
            for ten in range(tens):
                add_ten(store, ten, vectors[ten])
                present.add(ten)
                if ten % 3 == 2:
                    present.discard(ten - 1)
                    going.add(ten - 1)
                    with store.writer() as writer:
                        writer.remove([b"/p/%d" % (ten - 1)])
                if ten % 5 == 4:
                    with store.writer() as writer:
                        writer.compact()
        except BaseException as error:
            wrong.append(error)
            raise
        finally:
            stop.set()

    def read(reader):
        looks = 0
        while not stop.is_set() or not looks:
            for modality in ("image", "caption"):
                known = sorted(present)
                if not known:
                    continue
                ten = known[looks % len(known)]
                answers = nearest(reader, vectors[ten], modality, 500)
                paths = {item.path for item in answers[0].items}
                found = {}
                for path in paths:
                    found.setdefault(int(path.split(b"/")[2]), []).append(path)
                if ten in present and ten not in going:
                    assert len(found.get(ten, ())) == 10
                    assert answers[3].items[0].path == b"/p/%d/3" % ten
                assert all(len(one) == 10 for one in found.values())
            looks += 1
        return looks

    others = [Store(store.folder) for _ in range(2)]
    with ThreadPoolExecutor(5) as pool:
        writing = pool.submit(write)
        reading = [pool.submit(read, one) for one in (store, store, *others)]
        writing.result()
        assert sum(one.result() for one in reading) > 20
    for one in others:
        one.close()
    assert wrong == []


def test_threads_share_an_engine(tmp_path):
    """All kinds of queries at once, and the index growing meanwhile: each answer is right."""
    provider = GivenEncoder(FakeEncoder())
    colours = ("red", "green", "blue", "yellow", "white", "black")
    for number in range(60):
        paint(tmp_path / f"p/{number:02}.png", colours[number % 6], mark=number + 1)
        if number % 2:
            (tmp_path / f"p/{number:02}.txt").write_text(f"something {colours[number % 6]}")
    queries = [
        {"query": "red"}, {"query": "blue", "k": 3}, {"query": "green", "to": "caption"},
        {"image": tmp_path / "p/07.png"}, {"query": "white", "fusion": "image"},
        {"query": "black", "under": tmp_path / "p"},
        {"query": Query((Term(text="red"), Term(text="blue", weight=-1.0)), k=5)},
        {"query": Query((Term(text="yellow"),), filter=Filter(under=tmp_path / "p"), exact=True)},
    ]  # fmt: skip
    with Engine.open(tmp_path / "index", notify=lambda line: None, provider=provider) as engine:
        engine.index([tmp_path / "p"])

        def ask(number):
            hits = engine.search(**queries[number % len(queries)])
            return [(hit.path.name, hit.caption, round(hit.score, 5)) for hit in hits]

        expected = [ask(number) for number in range(len(queries))]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, range(400)))
        assert found == [expected[number % len(queries)] for number in range(400)]

        fresh = tmp_path / "more"
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask, number) for number in range(200)]
            for number in range(5):
                paint(fresh / f"{number}.png", "red", mark=100 + number)
                engine.index([fresh])
            assert all(one.result() for one in answers)
        assert engine.status().images == 65


def test_an_engine_that_is_closed_among_threads_opens_again(tmp_path):
    provider = GivenEncoder(FakeEncoder())
    paint(tmp_path / "p/red.png", "red")
    with Engine.open(tmp_path / "index", notify=lambda line: None, provider=provider) as engine:
        engine.index([tmp_path / "p"])
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(engine.search, "red") for _ in range(100)]
            for _ in range(20):
                engine.close()
            assert all(len(one.result()) == 1 for one in answers)

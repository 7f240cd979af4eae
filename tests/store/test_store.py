"""The store: transactions, snapshots, tombstones, one writer and many readers."""

from __future__ import annotations

import math
import shutil
import sqlite3
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import faiss
import numpy as np
import pytest
from fakes import DIM, FakeEncoder, candidates, nearest, new_media, root_at, unit_vectors

from mmsearch.config import MARKER
from mmsearch.errors import (
    FormatError,
    IndexInUse,
    IndexNotFound,
    SpaceError,
    UnreadableError,
    UsageError,
)
from mmsearch.store import catalog
from mmsearch.store.rows import CaptionRecord, RootRow, under
from mmsearch.store.store import Store
from mmsearch.store.writer import Compaction
from mmsearch.types import Filter

SPEC = FakeEncoder().spec
RNG = np.random.default_rng(11)


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "index")
    yield store
    store.close()


def fill(store, names, vectors, **options):
    """Adds pictures under the root /photos; returns their ids."""
    with store.writer() as writer:
        space = writer.space_of(SPEC, "fp32")
        root = root_at(writer, b"/photos")
        with writer.change() as change:
            return [
                change.add_media(new_media(root, name, vector, **options), space)
                for name, vector in zip(names, vectors, strict=True)
            ]


def ids_found(store, query, k=10, to="image", where=None):
    return list(nearest(store, query[None], to, k, where)[0].ids)


def test_what_is_committed_is_found_beside_an_older_snapshot(store):
    vectors = unit_vectors(RNG, 6)
    first = fill(store, "abc", vectors[:3])
    with store.writer() as writer:
        writer.compact()
    second = fill(store, "def", vectors[3:])
    for number, vector in zip(first + second, vectors, strict=True):
        assert ids_found(store, vector, 1) == [number]
    assert sorted(ids_found(store, vectors[0])) == sorted(first + second)


def test_what_is_removed_is_not_found_from_snapshot_or_tail(store):
    vectors = unit_vectors(RNG, 4)
    first = fill(store, "ab", vectors[:2])
    with store.writer() as writer:
        writer.compact()
    second = fill(store, "cd", vectors[2:])
    with store.writer() as writer:
        assert writer.remove([b"/photos/a", b"/photos/c"]) == 2
    assert sorted(ids_found(store, vectors[0])) == [first[1], second[1]]
    with store.writer() as writer:
        writer.compact()
    assert sorted(ids_found(store, vectors[0])) == [first[1], second[1]]
    (snapshot,) = (store.folder / "vectors").iterdir()
    assert snapshot.name == "1-image-2.faiss"


def test_ids_are_never_used_twice(store):
    (first,) = fill(store, "a", unit_vectors(RNG, 1))
    with store.writer() as writer:
        writer.remove([b"/photos"])
    (second,) = fill(store, "a", unit_vectors(RNG, 1))
    assert second > first


def test_captions_go_with_their_picture(store):
    image, one, two = unit_vectors(RNG, 3)
    fill(store, "a", [image], captions=[("one", one), ("two", two)])
    answer = nearest(store, two[None], "caption", 5)[0]
    assert answer.items[0].caption == "two"
    assert answer.scores[0] == pytest.approx(1, abs=1e-6)
    with store.writer() as writer:
        writer.remove([b"/photos/a"])
    assert ids_found(store, two, to="caption") == []
    assert store.status().captions == 0


def test_a_failing_transaction_leaves_nothing(store):
    (vector,) = unit_vectors(RNG, 1)
    fill(store, "a", [vector])
    with store.writer() as writer:
        root, space = RootRow(1, b"/photos", False, ()), writer.space_of(SPEC, "fp32")
        with pytest.raises(RuntimeError, match="power"), writer.change() as change:  # noqa: PT012
            change.add_media(new_media(root, "b", vector), space)
            change.flush()
            raise RuntimeError("power cut")
    assert len(ids_found(store, vector)) == 1


def test_a_reader_sees_whole_batches_only(store):
    """Every batch adds ten; whatever moment a reader looks, it sees a multiple of ten."""
    fill(store, [f"0-{i}" for i in range(10)], unit_vectors(RNG, 10))
    seen, stop = [], threading.Event()
    query = unit_vectors(RNG, 1)[0]

    def look():
        while not stop.is_set():
            seen.append(len(ids_found(store, query, 1000)))

    thread = threading.Thread(target=look)
    thread.start()
    for batch in range(1, 20):
        fill(store, [f"{batch}-{i}" for i in range(10)], unit_vectors(RNG, 10))
        if batch % 5 == 0:
            with store.writer() as writer:
                writer.compact()
    stop.set()
    thread.join()
    assert len(seen) > 1
    assert {count % 10 for count in seen} == {0}
    assert seen == sorted(seen)


@pytest.mark.slow
def test_threads_share_a_store_while_another_commits(store):
    """A thread that began before a commit must not be given another thread's newer view."""
    vectors = unit_vectors(RNG, 400)
    fill(store, ["0"], vectors[:1])
    stop, failures = threading.Event(), []

    def ask():
        while not stop.is_set():
            try:
                ids_found(store, vectors[0], 1000)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is wrong
                failures.append(repr(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(1, 250):
        fill(store, [str(number)], vectors[number : number + 1])
        if number % 60 == 0:
            with store.writer() as writer:
                writer.compact()
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_no_room_for_a_snapshot_loses_nothing(store, monkeypatch):
    vectors = unit_vectors(RNG, 2)
    fill(store, "ab", vectors)
    with monkeypatch.context() as patch:

        def full(index, path):
            (store.folder / "vectors" / ".1-image-1.faiss.new").write_bytes(b"part")
            raise RuntimeError("Error in write_index: No space left on device")

        patch.setattr("mmsearch.store.faiss_index.faiss.write_index", full)
        with store.writer() as writer, pytest.raises(UnreadableError, match="No space left"):
            writer.compact()
    assert list((store.folder / "vectors").iterdir()) == []
    assert len(ids_found(store, vectors[0])) == 2


def test_a_strange_folder_among_the_vectors_is_left_alone(store):
    (store.folder / "vectors" / "@eaDir").mkdir()
    fill(store, "a", unit_vectors(RNG, 1))
    assert len(ids_found(store, unit_vectors(RNG, 1)[0])) == 1


def test_what_lies_below_a_folder_is_looked_up_by_the_index(store):
    """Not a look at every row: an index may hold a million."""
    fill(store, ["a/1", "a-b/1", "a", "a0", "b/1"], unit_vectors(RNG, 5))
    condition, values = under(b"a")
    with store.catalog.read() as queries:
        query = f"SELECT path FROM media WHERE root_id = 1 AND {condition}"
        found = sorted(path for (path,) in queries.cursor(query, values))
        plan = queries.cursor(f"EXPLAIN QUERY PLAN {query}", values).fetchall()
    assert found == [b"a", b"a/1"]
    assert "path>? AND path<?" in plan[0][-1]


def test_a_whole_but_stale_vector_file_is_written_anew(store):
    vectors = unit_vectors(RNG, 3)
    fill(store, "ab", vectors[:2])
    with store.writer() as writer:
        writer.compact()
    (path,) = (store.folder / "vectors").iterdir()
    old = path.read_bytes()
    fill(store, "c", vectors[2:])
    with store.writer() as writer:
        writer.compact()
    (path,) = (store.folder / "vectors").iterdir()
    path.write_bytes(old)
    with Store(store.folder).writer():
        pass
    assert len(ids_found(Store(store.folder), vectors[0])) == 3


def test_a_space_remembers_what_its_vectors_were_computed_in(store):
    with store.writer() as writer:
        assert writer.space_of(SPEC, "fp32").precision == "fp32"
        assert writer.space_of(SPEC, "fp32").precision == "fp32"
        writer.space_of(SPEC, "bf16")
    assert store.active_space().precision == "mixed"


def test_a_reader_whose_snapshot_is_compacted_away_looks_again(store):
    vectors = unit_vectors(RNG, 3)
    fill(store, "ab", vectors[:2])
    with store.writer() as writer:
        writer.compact()
    reader = Store(store.folder)
    assert len(ids_found(reader, vectors[0])) == 2
    fill(store, "c", vectors[2:])
    with store.writer() as writer:
        writer.compact()
    assert len(ids_found(reader, vectors[0])) == 3
    assert len(ids_found(Store(store.folder), vectors[0])) == 3


def test_a_missing_vector_file_is_written_anew_by_the_next_writer(store):
    vectors = unit_vectors(RNG, 2)
    fill(store, "ab", vectors)
    with store.writer() as writer:
        writer.compact()
    shutil.rmtree(store.folder / "vectors")
    with Store(store.folder).writer():
        pass
    assert len(ids_found(Store(store.folder), vectors[0])) == 2


def test_leftovers_of_a_killed_compaction_are_cleared_away(store):
    fill(store, "a", unit_vectors(RNG, 1))
    (store.folder / "vectors" / ".1-image-9.faiss.new").write_bytes(b"half")
    (store.folder / "vectors" / "1-image-9.faiss").write_bytes(b"never committed")
    with store.writer():
        pass
    assert list((store.folder / "vectors").iterdir()) == []


def test_vectors_of_another_space_are_refused(store):
    fill(store, "a", unit_vectors(RNG, 1))
    with store.writer() as writer, pytest.raises(SpaceError, match="made with 'fake'"):
        writer.space_of(FakeEncoder("other").spec, "fp32")


def test_a_vector_of_another_width_is_refused(store):
    with pytest.raises(ValueError, match="numbers in a"):
        fill(store, "a", [np.ones(DIM + 1, np.float32)])


def test_filters_by_folder_and_date(store):
    vectors = unit_vectors(RNG, 3)
    fill(store, ["2019/a", "2019b"], vectors[:2], captured="2019-06-01T10:00:00")
    fill(store, ["2020/a"], vectors[2:], captured="2020-06-01T10:00:00")
    query = vectors[0]

    def found(**limits):
        answer = nearest(store, query[None], "image", 9, Filter(**limits))[0]
        return sorted(item.path.decode() for item in answer.items)

    assert found(under="/photos/2019") == ["/photos/2019/a"]
    assert found(under="/photos") == found(under="/") == found()
    assert found(under="/phot") == []
    assert found(after=datetime(2020, 1, 1)) == ["/photos/2020/a"]
    assert found(before=datetime(2020, 1, 1)) == ["/photos/2019/a", "/photos/2019b"]
    assert found(after=datetime(2019, 6, 1, 10), before=datetime(2019, 6, 1, 10)) == []
    assert len(found(after=datetime(2019, 6, 1, 10))) == 3


def test_a_root_takes_in_the_roots_inside_it(store):
    with store.writer() as writer, writer.change() as change:
        outer = change.add_root(b"/photos", walked=True)
        inner = change.add_root(b"/photos/tr\xe9es", walked=True)
    with store.writer() as writer:
        space = writer.space_of(SPEC, "fp32")
        (vector,) = unit_vectors(RNG, 1)
        with writer.change() as change:
            change.add_media(new_media(inner, "a", vector), space)
        with writer.change() as change:
            change.take_over(inner, outer)
    answer = nearest(store, vector[None], "image", 1)[0]
    assert answer.items[0].path == b"/photos/tr\xe9es/a"
    with store.catalog.read() as queries:
        assert [row.path for row in queries.media_under(outer.id, b"tr\xe9es")] == [b"tr\xe9es/a"]


# -- files and formats -------------------------------------------------------------------------


def test_pages_are_large_and_the_log_is_ahead(store):
    with sqlite3.connect(store.folder / catalog.FILE_NAME) as raw:
        assert raw.execute("PRAGMA page_size").fetchone() == (16384,)
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_no_index_is_said_so(tmp_path):
    with pytest.raises(IndexNotFound, match="no index there"):
        Store(tmp_path)


def test_a_newer_format_is_refused(store):
    with sqlite3.connect(store.folder / catalog.FILE_NAME) as raw:
        raw.execute("PRAGMA user_version = 99")
    raw.close()
    with pytest.raises(FormatError, match="update mmsearch"):
        Store(store.folder)


def test_a_database_of_another_program_is_refused(tmp_path):
    path = tmp_path / catalog.FILE_NAME
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE theirs (x)")
    raw.close()
    with pytest.raises(FormatError, match="not a catalog"):
        Store(tmp_path)
    path.write_bytes(b"no database at all, but long enough to be looked at by anyone" * 99)
    with pytest.raises(FormatError, match="not a catalog"):
        Store(tmp_path)


def words_of(store):
    with store.catalog.read() as queries:
        rows = queries.cursor("SELECT rowid, file FROM words").fetchall()
    return {number: sorted(text.split("\n")) for number, text in rows}


def captioned(store, texts):
    """A picture for each list of captions; all vectors are random."""
    ids = []
    with store.writer() as writer:
        space = writer.space_of(SPEC, "fp32")
        root = root_at(writer, b"/photos")
        with writer.change() as change:
            for number, captions in enumerate(texts):
                vectors = unit_vectors(RNG, 1 + len(captions))
                rows = list(zip(captions, vectors[1:], strict=True))
                media = new_media(root, f"c{number}", vectors[0], captions=rows)
                ids.append(change.add_media(media, space))
    return ids


def test_the_words_follow_the_captions(store):
    first, second, third = captioned(store, [["a dog", "it runs"], ["a cat"], []])
    assert words_of(store) == {first: ["a dog", "it runs"], second: ["a cat"]}
    with store.writer() as writer:
        space = writer.space_of(SPEC, "fp32")
        with writer.change() as change:
            new = CaptionRecord("two birds", "file", unit_vectors(RNG, 1)[0])
            change.add_captions(third, [new],
                                space)  # fmt: skip
            (old, _, _), _ = change.captions_of(first)
            change.remove_captions([old])
        assert words_of(store) == {
            first: ["it runs"], second: ["a cat"], third: ["two birds"]
        }  # fmt: skip
        with writer.change() as change:
            change.remove_media([second])
    assert words_of(store) == {first: ["it runs"], third: ["two birds"]}


def test_each_source_has_its_own_column_of_words(store):
    (first,) = captioned(store, [["a dog"]])
    sources = {"sidecar": "sidecar", "file": "file:12ab", "embedded": "embedded", "name": "name",
               "model": "model:x", "read_text": "text"}  # fmt: skip
    with store.writer() as writer:
        space = writer.space_of(SPEC, "fp32")
        with writer.change() as change:
            new = [CaptionRecord(f"word{n}", source, unit_vectors(RNG, 1)[0])
                   for n, source in enumerate(sources.values())]  # fmt: skip
            change.add_captions(first, new, space)
    with store.catalog.read() as queries:
        for number, column in enumerate(sources):
            query = "SELECT rowid FROM words WHERE words MATCH ?"
            assert queries.cursor(query, (f"{column} : word{number}",)).fetchall() == [(first,)]
            assert queries.cursor(query, (f"- {column} : word{number}",)).fetchall() == []


def test_texts_read_in_pictures_are_found_by_any_of_their_letters(store):
    (first,) = captioned(store, [["a dog"]])
    with store.writer() as writer:
        space = writer.space_of(SPEC, "fp32")
        with writer.change() as change:
            (vector,) = unit_vectors(RNG, 1)
            change.add_captions(first, [CaptionRecord("EXIT 12b", "text", vector)], space)

    def found(letters):
        with store.catalog.read() as queries:
            return queries.cursor(
                "SELECT text FROM read_text WHERE read_text MATCH ?", (f'"{letters}"',)
            ).fetchall()

    assert found("xit 12") == [("EXIT 12b",)]
    assert found("dog") == []
    with store.writer() as writer:
        writer.remove([b"/photos"])
    assert found("xit 12") == []


def bm25(documents, query, k1=1.2, b=0.75):
    """Robertson and Zaragoza 2009, written out over words that need no stemming."""
    split = {number: text.split() for number, text in documents.items()}
    usual = sum(map(len, split.values())) / len(split)
    found = {}
    for number, words in split.items():
        total = 0.0
        for word in query:
            holding = sum(word in other for other in split.values())
            # FTS5 keeps the weight of words that most documents hold just above nothing.
            idf = max(1e-6, math.log((len(split) - holding + 0.5) / (holding + 0.5)))
            often = words.count(word)
            total += idf * often * (k1 + 1) / (often + k1 * (1 - b + b * len(words) / usual))
        if total:
            found[number] = total
    return found


def test_words_are_ranked_by_bm25(store):
    texts = [["red dog dog", "green hill"], ["red car"], ["blue sea", "wet sand", "red sun"],
             ["green car hill"], ["tall tree"], ["old man"], ["thin ice"]]  # fmt: skip
    ids = captioned(store, texts)
    documents = {number: " ".join(text) for number, text in zip(ids, texts, strict=True)}
    with store.catalog.read() as queries:
        for query in ("red dog", "hill", "green car sun", "the red car"):
            found = queries.media_with_words(query, 99)
            expected = bm25(documents, set(query.split()) - {"the"})
            assert found == pytest.approx(expected, rel=1e-6)
            assert list(found.values()) == sorted(found.values(), reverse=True)
            assert list(queries.media_with_words(query, 1)) == list(found)[:1]
            some = queries.media_with_words(query, 99, ids[:3])
            assert some == {n: score for n, score in found.items() if n in ids[:3]}


def test_words_are_found_however_they_are_composed(store):
    ids = captioned(store, [["a résumé"], ["İstanbul"], ["Émile"]])
    with store.catalog.read() as queries:
        for text, number in (
            ("re\u0301sume\u0301", ids[0]),
            ("İstanbul", ids[1]),
            ("emile", ids[2]),
        ):
            assert list(queries.media_with_words(text, 9)) == [number]


@pytest.mark.parametrize(
    "text", ['"', "NEAR(a b)", "a AND", "x*", "-", "", "   ", "\0", "\ud800 dog", "col:dog", "the",
             "dog " * 500, "^dog", "'; DROP TABLE words; --"]
)  # fmt: skip
def test_any_text_can_be_asked_for_its_words(store, text):
    """FTS5 has a language of its own, which nobody meant."""
    ids = captioned(store, [["a dog"], ["the cat"]])
    with store.catalog.read() as queries:
        found = list(queries.media_with_words(text, 9))
    # A text of nothing but function words is taken as it is.
    found_by = {"the": [ids[1]], "a AND": [ids[0]]}
    assert found == found_by.get(text, [ids[0]] if "dog" in text else [])


def test_the_candidates_is_what_comparing_everything_gives(store):
    rng = np.random.default_rng(5)
    texts = [[f"word{rng.integers(30)} thing" for _ in range(rng.integers(4))] for _ in range(60)]
    captioned(store, texts[:40])
    with store.writer() as writer:
        writer.compact()
        with writer.change() as change:
            change.remove_media([3, 17])
    held = store.contents()
    query = unit_vectors(rng, 1)[0]
    image = dict(zip(held.image_ids.tolist(), held.image_vectors @ query, strict=True))
    best = {}
    for owner, cosine in zip(
        held.caption_media.tolist(), held.caption_vectors @ query, strict=True
    ):
        best[owner] = max(best.get(owner, -1), cosine)
    with store.catalog.read() as queries:
        scores = queries.media_with_words("word7", 99)
    for depth in (3, 100):
        found = candidates(store, query, "word7", depth)
        media = found.media.tolist()
        assert media == sorted(media)
        nearest = sorted(image, key=image.get, reverse=True)[:depth]
        assert set(nearest) <= set(media)
        if depth == 100:  # as many as there are: words bring up all that hold them
            assert set(scores) <= set(media)
        np.testing.assert_allclose(found.image, [image[n] for n in media], atol=1e-6)
        np.testing.assert_allclose(found.caption, [best.get(n, np.nan) for n in media], atol=1e-6)
        expected = [scores.get(n, 0.0 if n in best else np.nan) for n in media]
        np.testing.assert_allclose(found.words, expected, atol=1e-6)
        assert found.best_words == pytest.approx(max(scores.values(), default=0))
        assert found.ids.tolist() == media


def test_the_candidates_heeds_filters(store):
    """Before it counts to its depth: the best of those that may be found are found."""
    captioned(store, [["a dog"], ["a dog"], ["a cat"]])
    where = Filter(after=datetime(2031, 1, 1))
    query = unit_vectors(RNG, 1)[0]
    found = candidates(store, query, "dog", 10, where)
    assert found.media.tolist() == []
    assert found.best_words == 0
    later = [["a dog and many other things beside it"]] * 2
    with store.writer() as writer:
        space, root = writer.space_of(SPEC, "fp32"), root_at(writer, b"/photos")
        with writer.change() as change:
            ids = []
            for number, captions in enumerate(later):
                rows = [(text, unit_vectors(RNG, 1)[0]) for text in captions]
                media = new_media(root, f"late{number}", unit_vectors(RNG, 1)[0], captions=rows,
                            captured="2032-01-01T00:00:00")  # fmt: skip
                ids.append(change.add_media(media, space))
    found = candidates(store, query, "dog", 1, where)
    assert found.best_words > 0
    assert set(found.media.tolist()) <= set(ids)
    assert (found.words > 0).all()


def test_candidates_have_their_words_whoever_brought_them(store):
    """Also where more images hold the words than are looked at for their words."""
    vectors = unit_vectors(RNG, 6)
    with store.writer() as writer:
        space, root = writer.space_of(SPEC, "fp32"), root_at(writer, b"/photos")
        with writer.change() as change:
            for number, vector in enumerate(vectors):
                text = "dog" + " and more to say of it" * number
                media = new_media(root, f"w{number}", vector, captions=[(text, vector)])
                change.add_media(media, space)
    found = candidates(store, vectors[5], "dog", 1)
    assert len(found.media) > 1
    assert (found.words > 0).all()


def test_scores_are_compared_with_a_sample_of_all(store):
    """Of the snapshot and of the tail, and of nothing that was removed."""
    query = unit_vectors(RNG, 1)[0]
    near = unit_vectors(RNG, 2000) + 2 * query
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    older, tail = unit_vectors(RNG, 3000), near.astype(np.float32)
    gone = fill(store, [f"g{n}" for n in range(2000)], np.repeat(-query[None], 2000, axis=0))
    fill(store, [f"m{n}" for n in range(3000)], older)
    with store.writer() as writer:
        writer.compact()
        with writer.change() as change:
            change.remove_media(gone)
    fill(store, [f"n{n}" for n in range(2000)], tail)
    background = candidates(store, query, "", 5).image_background
    scores = np.concatenate([older, tail]) @ query
    assert background.mean == pytest.approx(scores.mean(), abs=0.03)
    assert background.deviation == pytest.approx(scores.std(), abs=0.03)
    with store.writer() as writer:
        writer.compact()
    again = candidates(store, query, "", 5).image_background
    assert again.mean == pytest.approx(background.mean, abs=1e-6)


def test_a_folder_of_other_things_is_never_taken(tmp_path):
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        Store.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


def test_making_an_index_marks_its_folder(store):
    assert (store.folder / MARKER).is_file()


HOLD = """
import sys, time
from pathlib import Path
from mmsearch.store.writer import Compaction
from mmsearch.store.rows import RootRow, under
from mmsearch.store.store import Store
with Store(Path(sys.argv[1])).writer():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_and_a_reader_is_not(store):
    vectors = unit_vectors(RNG, 1)
    fill(store, "a", vectors)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.folder)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(IndexInUse, match="another process"), store.writer(wait=0.2):
            pass
        assert len(ids_found(store, vectors[0])) == 1
        holder.kill()
        holder.wait()
    with store.writer(wait=5):
        pass  # the lock went with the process


def test_a_catalog_can_be_copied_while_it_is_open(store, tmp_path):
    vectors = unit_vectors(RNG, 1)
    fill(store, "a", vectors)
    other = Store.create(tmp_path / "copy")
    store.copy_catalog(other)
    assert len(ids_found(other, vectors[0])) == 1
    other.close()


# -- inverted lists over a large snapshot -------------------------------------------------------


@pytest.fixture
def large(store):
    """A store whose 3,000 pictures count as many; returns it with its ids and vectors."""
    store.compaction = Compaction(ivf_from=1000)
    vectors = unit_vectors(RNG, 3000)
    ids = np.array(fill(store, [f"{n:05}" for n in range(3000)], vectors))
    with store.writer() as writer:
        writer.compact()
    return store, ids, vectors


def files_of(store):
    return sorted(path.name for path in (store.folder / "vectors").iterdir())


def test_a_large_index_is_searched_through_inverted_lists_and_exactly_where_asked(large):
    store, ids, vectors = large
    assert files_of(store) == ["1-image-1.faiss", "1-image-1.faiss.cells"]
    kept = 0
    for query in unit_vectors(RNG, 40):
        true = ids[np.argsort(-(vectors @ query))[:10]].tolist()
        exact = nearest(store, query[None], "image", 10, exact=True)[0]
        assert list(exact.ids) == true
        kept += len(set(ids_found(store, query)) & set(true))
    assert 0.9 < kept / 400 <= 1


def test_what_is_new_or_removed_beside_inverted_lists_is_seen(large):
    store, ids, vectors = large
    added = unit_vectors(RNG, 2)
    new_ids = fill(store, ["new1", "new2"], added)
    with store.writer() as writer:
        writer.remove([b"/photos/00007"])
    assert ids_found(store, added[1], 1) == [new_ids[1]]
    assert int(ids[7]) not in ids_found(store, vectors[7])
    assert ids_found(store, vectors[8], 1) == [int(ids[8])]


def test_inverted_lists_go_with_their_snapshot(large):
    store, *_ = large
    fill(store, ["new"], unit_vectors(RNG, 1))
    with store.writer() as writer:
        writer.compact()
    assert files_of(store) == ["1-image-2.faiss", "1-image-2.faiss.cells"]
    with store.writer():  # which clears up
        pass
    assert files_of(store) == ["1-image-2.faiss", "1-image-2.faiss.cells"]


def test_inverted_lists_that_are_missing_cost_time_and_no_answer(large):
    store, ids, vectors = large
    (store.folder / "vectors" / "1-image-1.faiss.cells").unlink()
    other = Store(store.folder)
    assert ids_found(other, vectors[5], 1) == [int(ids[5])]
    other.close()
    with store.writer() as writer:
        writer.compact(only_if="short")
    assert files_of(store) == ["1-image-1.faiss", "1-image-1.faiss.cells"]


def test_a_kill_while_inverted_lists_are_made_leaves_none_behind(large, monkeypatch):
    store, ids, vectors = large
    fill(store, ["new"], unit_vectors(RNG, 1))
    write = faiss.write_index

    def cut_off(index, path):
        if ".cells" not in path:
            return write(index, path)
        Path(path).write_bytes(b"part")
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("mmsearch.store.faiss_index.faiss.write_index", cut_off)
        with pytest.raises(ZeroDivisionError), store.writer() as writer:
            writer.compact()
    assert ids_found(store, vectors[5], 1) == [int(ids[5])]
    with store.writer() as writer:
        writer.compact(only_if="short")
    assert files_of(store) == ["1-image-2.faiss", "1-image-2.faiss.cells"]


@pytest.mark.parametrize("keep", [500, None])
def test_without_their_inverted_lists_searches_are_exact_until_they_are_made_anew(
    large, caplog, keep
):
    store, ids, vectors = large
    path = store.folder / "vectors" / "1-image-1.faiss.cells"
    path.write_bytes(path.read_bytes()[:keep]) if keep else path.unlink()
    other = Store(store.folder, store.compaction)
    for query in unit_vectors(RNG, 5):
        assert ids_found(other, query) == ids[np.argsort(-(vectors @ query))[:10]].tolist()
    assert "missing or damaged" in caplog.text
    with other.writer() as writer:
        writer.compact(only_if="short")
    assert ids_found(other, vectors[0], 1) == [int(ids[0])]
    other.close()


def test_a_reader_sees_inverted_lists_that_were_made_after_it_looked(store):
    vectors = unit_vectors(RNG, 1500)
    fill(store, [f"{n:05}" for n in range(1500)], vectors)
    with store.writer() as writer:
        writer.compact()
    reader = Store(store.folder)
    ids_found(reader, vectors[0])
    assert [view.ivf for view in reader.views.values() if view.snapshot] == [None]
    store.compaction = Compaction(ivf_from=1000)
    with store.writer() as writer:
        writer.compact(only_if="short")
    ids_found(reader, vectors[0])
    assert [view.ivf is not None for view in reader.views.values() if view.snapshot] == [True]
    reader.close()

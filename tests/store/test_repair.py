"""Damage is found by `verify`, mended by `repair` where anything is left to mend it from, and no
search answers from it."""

from __future__ import annotations

import functools
import itertools
import random
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import FakeEncoder, FakeProvider, paint

from mmsearch import Engine
from mmsearch.errors import (
    DamageError,
    IndexNotFound,
    MmsearchError,
    UnreadableError,
)
from mmsearch.store import backup as backups
from mmsearch.store import catalog
from mmsearch.store.checksum import of_vector
from mmsearch.store.repair import readable, repair
from mmsearch.store.store import REPAIRED, Store, finish_repair, writer_lock
from mmsearch.store.verify import Checks, verify
from mmsearch.types import Damage

pytestmark = pytest.mark.slow

COUNT = 48
COLOURS = ("red", "green", "blue", "yellow", "white", "black")


@pytest.fixture
def encoder(provider):
    return provider.encoders["fake"]


@pytest.fixture
def provider():
    return FakeProvider(FakeEncoder())


def opened(folder, provider=None):
    provider = provider or FakeProvider(FakeEncoder())
    return Engine.open(folder, notify=lambda line: None, provider=provider)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An index with a vector file, rows that are newer, and removed ones; and its photos."""
    top = tmp_path_factory.mktemp("made")
    with opened(top / "index") as engine:
        for number in range(COUNT):
            colour = COLOURS[number % 6]
            paint(top / f"photos/{number:02}-{colour}.png", colour, mark=number + 1)
            (top / f"photos/{number:02}-{colour}.txt").write_text(f"a {colour} thing {number}")
        engine.index([top / "photos"])
        engine.compact()
        for number in range(4):
            paint(top / f"photos/new{number}.png", COLOURS[number], mark=90 + number)
        (top / "photos/00-red.png").unlink()
        engine.index()
    return top


@pytest.fixture
def damaged(made, tmp_path, provider):
    """A copy to damage, and its engine."""
    shutil.copytree(made / "index", tmp_path / "index")
    with opened(tmp_path / "index", provider) as engine:
        yield engine


def vector_file(engine, modality="image"):
    (path,) = (engine.folder / "vectors").glob(f"*-{modality}-*.faiss")
    return path


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def sql(engine, *statements):
    engine.close()
    with closing(sqlite3.connect(engine.folder / catalog.FILE_NAME)) as raw:
        for statement in statements:
            raw.execute(*statement) if isinstance(statement, tuple) else raw.execute(statement)
        raw.commit()


def kinds(engine, **options):
    return {damage.kind for damage in engine.verify(**options).damages}


def everything(engine):
    held = engine.store.contents()
    images = dict(zip(held.image_paths, map(bytes, held.image_vectors), strict=True))
    captions = dict(zip(held.caption_texts, map(bytes, held.caption_vectors), strict=True))
    return images, captions


def test_a_sound_index_is_sound(damaged):
    for deep in (False, True):
        found = damaged.verify(deep=deep)
        assert (found.images, found.captions, found.damages) == (COUNT + 3, COUNT - 1, ())
    done = damaged.repair()
    assert (done.found, done.lost, done.embedded, done.kept) == ((), (), 0, None)


def test_where_there_is_no_index_there_is_nothing_to_verify(tmp_path):
    for ask in (lambda e: e.verify(), lambda e: e.repair(), lambda e: e.compact()):
        with Engine.open(tmp_path / "none") as engine, pytest.raises(IndexNotFound):
            ask(engine)


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "gone"])
@pytest.mark.parametrize("modality", ["image", "caption"])
def test_a_damaged_vector_file_is_written_anew(damaged, how, modality):
    before = everything(damaged)
    path = vector_file(damaged, modality)
    size = path.stat().st_size
    if how == "flipped":
        flip(path, size // 2, 3)
    elif how == "gone":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.truncate(0 if how == "empty" else size // 2)
    assert kinds(damaged) == (set() if how == "flipped" else {"snapshot"})
    assert kinds(damaged, deep=True) == {"snapshot"}
    with pytest.raises(DamageError, match="mmsearch repair"):
        damaged.search("red", to=modality)
    done = damaged.repair()
    assert done.lost == ()
    assert kinds(damaged, deep=True) == set()
    assert everything(damaged) == before
    assert damaged.search("red", to=modality, k=3)


def test_a_vector_that_the_catalog_lost_comes_from_the_vector_file(damaged):
    before = everything(damaged)
    sql(damaged, "UPDATE embedding SET vector = zeroblob(length(vector)) WHERE id IN (5, 9, 70)")
    assert kinds(damaged) == set()
    assert kinds(damaged, deep=True) == {"vector"}
    done = damaged.repair()
    assert (done.lost, done.embedded) == ((), 0)
    assert everything(damaged) == before
    assert kinds(damaged, deep=True) == set()


def test_a_checksum_that_the_catalog_lost_is_no_loss_either(damaged):
    before = everything(damaged)
    sql(damaged, "UPDATE embedding SET checksum = checksum + 1 WHERE id = 5")
    assert kinds(damaged, deep=True) >= {"vector"}
    assert damaged.repair().lost == ()
    assert everything(damaged) == before
    assert kinds(damaged, deep=True) == set()


def test_a_vector_that_is_lost_in_both_is_computed_anew(damaged, made):
    before = everything(damaged)
    sql(damaged, "UPDATE embedding SET vector = randomblob(7) WHERE id IN (5, 9, 70)",
        "UPDATE embedding SET vector = randomblob(length(vector)) WHERE id = 96")  # fmt: skip
    for modality in ("image", "caption"):
        vector_file(damaged, modality).write_bytes(b"")
    done = damaged.repair()
    assert (done.lost, done.embedded) == ((), 4)
    after = everything(damaged)
    for old, new in zip(before, after, strict=True):
        assert set(old) == set(new)
        for key in old:
            first, second = (np.frombuffer(one[key], "<f4") for one in (old, new))
            np.testing.assert_allclose(first, second, atol=1e-5)
    assert kinds(damaged, deep=True) == set()


def test_what_cannot_be_had_again_is_listed_and_taken_out(damaged, made, tmp_path):
    of_black = "(SELECT id FROM media WHERE path = CAST('05-black.png' AS BLOB))"
    sql(
        damaged,
        "UPDATE embedding SET vector = zeroblob(length(vector)) "
        f"WHERE tower = 'image' AND item_id IN {of_black}",
    )
    vector_file(damaged).unlink()
    (made / "photos/05-black.png").rename(tmp_path / "away.png")
    try:
        done = damaged.repair()
    finally:
        (tmp_path / "away.png").rename(made / "photos/05-black.png")
    assert done.lost == (str(made / "photos/05-black.png"),)
    assert kinds(damaged, deep=True) == set()
    assert damaged.index().added == 1  # it is there again


def test_without_its_model_the_rest_is_repaired_and_it_goes_on_later(damaged, provider):
    sql(damaged, "UPDATE embedding SET vector = zeroblob(length(vector)) WHERE id = 5")
    vector_file(damaged).unlink()

    encoder = provider.encoders.pop("fake")
    assert damaged.repair().embedded == 0
    assert kinds(damaged) == {"missing"}
    assert [d.what for d in damaged.verify().damages] == ["1 images have no vector"]
    provider.encoders["fake"] = encoder
    assert damaged.repair().embedded == 1
    assert kinds(damaged, deep=True) == set()


def test_what_was_written_as_no_numbers_is_found_and_computed_anew(damaged):
    """As by a runtime that gave NaN before such vectors were refused."""
    nan = np.full(damaged.status().dim, np.nan, np.float32).tobytes()
    key = "tower = 'image' AND item_id = 9"
    sql(
        damaged,
        (f"UPDATE embedding SET vector = ?, checksum = ? WHERE {key}", (nan, of_vector(nan, 9))),
    )
    shutil.rmtree(damaged.folder / "vectors")
    assert kinds(damaged, deep=True) == {"snapshot", "vector"}
    assert damaged.repair().embedded == 1
    assert kinds(damaged, deep=True) == set()


def test_words_are_made_of_captions_anew(damaged):
    sql(damaged, "UPDATE words SET sidecar = 'nonsense' WHERE rowid = 7")
    assert kinds(damaged, deep=True) == {"words"}
    assert damaged.repair().lost == ()
    assert kinds(damaged, deep=True) == set()


def test_a_damaged_page_anywhere_is_found_and_what_is_left_is_saved(made, tmp_path):
    """Every page of the catalog in turn, filled with garbage."""
    rng = random.Random(0)
    whole, size = tmp_path / "whole", 16384
    shutil.copytree(made / "index", whole)
    with closing(sqlite3.connect(whole / catalog.FILE_NAME)) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with opened(whole) as engine:
        before = everything(engine)
    pages = (whole / catalog.FILE_NAME).stat().st_size // size
    saved = hopeless = 0
    for page in range(pages):
        copy = tmp_path / f"page{page}"
        shutil.copytree(whole, copy)
        with (copy / catalog.FILE_NAME).open("r+b") as file:
            file.seek(page * size)
            file.write(rng.randbytes(size))
        with opened(copy) as engine:
            assert kinds(engine, deep=True), page
            try:
                done = engine.repair()
            except DamageError as error:
                assert "restore" in str(error)
                hopeless += 1
                continue
            assert kinds(engine, deep=True) == set(), page
            assert done.kept is not None
            assert done.kept.is_file()
            images, captions = everything(engine)
            assert images.items() <= before[0].items()
            assert captions.items() <= before[1].items()
            missing = {path.decode() for path in set(before[0]) - set(images)}
            # A path may stand with how many captions went with it.
            assert missing <= {path.partition(" (")[0] for path in done.lost}, page
            engine.index([made / "photos"])
            again = everything(engine)
            assert set(again[0]) == set(before[0])
            assert set(again[1]) == set(before[1])
            saved += 1
        shutil.rmtree(copy)
    assert saved > pages // 2
    assert hopeless <= 4  # the page of the tables' names, of the space, ...


def test_a_damaged_header_costs_nothing(damaged):
    before = everything(damaged)
    damaged.close()
    with closing(sqlite3.connect(damaged.folder / catalog.FILE_NAME)) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (damaged.folder / catalog.FILE_NAME).open("r+b") as file:
        file.write(bytes(100))
    assert kinds(damaged) == {"catalog"}
    with pytest.raises(DamageError):
        damaged.search("red")
    assert damaged.repair().lost == ()
    assert everything(damaged) == before


def test_ids_are_not_used_again_after_a_repair(damaged, made):
    with damaged.store.catalog.read() as queries:
        before = dict(queries.cursor("SELECT name, seq FROM sqlite_sequence").fetchall())
    sql(damaged, "PRAGMA foreign_keys = OFF", "DELETE FROM media WHERE id > 40")
    assert kinds(damaged) == {"item"}
    damaged.repair()
    with damaged.store.catalog.read() as queries:
        after = dict(queries.cursor("SELECT name, seq FROM sqlite_sequence").fetchall())
    assert after == before


def test_a_folder_that_is_not_there_costs_no_image(damaged, made, tmp_path):
    """As a disk that is not mounted: what cannot be embedded now is left for another repair."""
    sql(damaged, "UPDATE embedding SET vector = zeroblob(length(vector)) WHERE id IN (5, 9)")
    for path in (damaged.folder / "vectors").iterdir():
        path.unlink()
    (made / "photos").rename(tmp_path / "unmounted")
    try:
        assert damaged.repair().lost == ()
        assert kinds(damaged) == {"missing"}
        assert damaged.verify().images == COUNT + 3
    finally:
        (tmp_path / "unmounted").rename(made / "photos")
    assert damaged.repair().embedded == 2
    assert kinds(damaged, deep=True) == set()


def test_an_engine_that_was_open_follows_a_repair(damaged, made):
    """It neither answers from, nor writes into, the catalog that was moved away."""
    other = opened(damaged.folder)
    assert other.search("red")
    sql(damaged, "PRAGMA foreign_keys = OFF", "DELETE FROM caption WHERE id > 30",
        "DELETE FROM media WHERE id > 45")  # fmt: skip
    with pytest.raises(DamageError, match="vector of nothing"):
        other.search("red", k=99)
    assert damaged.repair().kept is not None
    images = damaged.status().images
    assert other.status().images == images
    assert len(other.search("red", k=99, fusion="image")) == images
    report = other.index([made / "photos"])
    other.close()
    assert damaged.status().images == images + report.added == COUNT + 3
    assert kinds(damaged, deep=True) == set()


def test_a_caption_of_no_image_is_damage_whatever_its_number(damaged):
    """Found by fuzzing: 0 passed for nothing found."""
    sql(damaged, "UPDATE caption SET media_id = 0 WHERE id = 5")
    with pytest.raises(DamageError, match="0 is no id"):
        damaged.search("a thing", k=COUNT)
    sql(damaged, "UPDATE embedding SET item_id = 0 WHERE tower = 'image' AND item_id = 7")
    with pytest.raises(DamageError):
        damaged.search("a thing", k=COUNT)


def test_opening_during_a_repair_touches_nothing_of_the_new_catalog(damaged):
    """Whoever waited for the lock finds the repair done, and commits in the new one's log."""
    path = damaged.folder / catalog.FILE_NAME
    damaged.close()
    path.rename(damaged.folder / REPAIRED)
    with ThreadPoolExecutor(1) as pool:
        with writer_lock(damaged.folder):
            waiting = pool.submit(Store, damaged.folder)
            time.sleep(0.3)
            finish_repair(damaged.folder)
            done = Store(damaged.folder)
            with done.catalog.write() as connection:
                connection.exec_driver_sql("UPDATE revision SET number = 1000")
        late = waiting.result()
    for store in (late, done, Store(damaged.folder)):
        with store.catalog.read() as queries:
            assert queries.revision() == 1000
        store.close()


def test_a_log_that_was_left_behind_gets_into_no_other_catalog(damaged, tmp_path):
    damaged.backup(tmp_path / "backup")
    before = everything(damaged)
    folder = tmp_path / "again"
    with opened(folder) as engine:
        engine.restore(tmp_path / "backup")
        with engine.store.catalog.write() as connection:
            connection.exec_driver_sql("UPDATE revision SET number = 777")
        log = (folder / "catalog.sqlite3-wal").read_bytes()
    assert log
    (folder / "catalog.sqlite3").unlink()
    for path in (folder / "vectors").iterdir():
        path.unlink()
    (folder / "catalog.sqlite3-wal").write_bytes(log)
    with opened(folder) as engine:
        engine.restore(tmp_path / "backup")
        assert everything(engine) == before
        with engine.store.catalog.read() as queries:
            assert queries.revision() < 777


def test_an_index_without_its_catalog_is_no_place_for_another(damaged, made):
    damaged.close()
    (damaged.folder / catalog.FILE_NAME).unlink()
    assert kinds(damaged) == {"catalog"}
    for ask in (lambda: damaged.search("red"), lambda: damaged.index([made / "photos"])):
        with pytest.raises(DamageError, match="restore"):
            ask()


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 99])
def test_an_overwritten_catalog_is_damage_not_another_program(damaged, content):
    damaged.close()
    (damaged.folder / catalog.FILE_NAME).write_bytes(content)
    assert kinds(damaged) == {"catalog"}
    with pytest.raises(DamageError, match="move the folder away"):
        damaged.repair()


def test_a_flipped_name_of_the_program_is_repaired(damaged):
    before = everything(damaged)
    sql(damaged, "PRAGMA application_id = 7")
    assert kinds(damaged) == {"catalog"}
    assert damaged.repair().lost == ()
    assert everything(damaged) == before


def test_a_compaction_in_the_midst_of_a_look_is_no_damage(damaged):
    times = []

    class Compacted(Checks):
        def files(self):
            if not times:
                times.append(1)
                with Store(damaged.folder).writer() as writer:
                    writer.rewrite()
            return super().files()

    assert verify(damaged.folder, deep=True, checks=Compacted).damages == ()
    assert times


def test_a_disk_that_is_busy_or_full_is_no_damage(damaged):
    class Busy(Checks):
        def missing(self):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
            raise error

    with pytest.raises(UnreadableError, match="disk I/O error"):
        verify(damaged.folder, checks=Busy)


def test_a_repair_that_was_cut_off_is_ended_by_whoever_opens_it_next(damaged):
    before = everything(damaged)
    damaged.close()
    path = damaged.folder / catalog.FILE_NAME
    path.rename(damaged.folder / REPAIRED)  # the new one, whole; the damaged one is moved away
    (damaged.folder / "catalog.sqlite3-wal").write_bytes(b"of the damaged one")
    assert everything(damaged) == before
    assert not (damaged.folder / REPAIRED).exists()
    assert kinds(damaged, deep=True) == set()


def test_a_second_repair_finds_what_the_first_has_left(damaged):
    """It looked at the index before it had the lock, while the first was at work."""
    sql(damaged, "UPDATE embedding SET vector = zeroblob(length(vector)) WHERE item_id = 7")
    times = []

    def look(folder, *, deep):
        found = verify(folder, deep=deep)
        if not times:
            times.append(1)
            assert damaged.repair().found
        return found

    done = repair(damaged.folder, look)
    assert (done.found, done.lost, done.kept) == ((), (), None)
    assert times


def test_bits_flipped_anywhere_never_give_a_wrong_answer_or_a_traceback(made, tmp_path):
    """A search answers as before, or says what is wrong."""
    rng = random.Random(1)
    shutil.copytree(made / "index", tmp_path / "whole")
    with closing(sqlite3.connect(tmp_path / "whole" / catalog.FILE_NAME)) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with opened(tmp_path / "whole") as engine:
        expected = {q: scores(engine, q) for q in COLOURS}
    told = 0
    for trial in range(150):
        copy = tmp_path / f"copy{trial}"
        shutil.copytree(tmp_path / "whole", copy)
        files = [copy / catalog.FILE_NAME, *(copy / "vectors").iterdir()]
        path = rng.choice(files)
        flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))
        with opened(copy) as engine:
            try:
                found = {q: scores(engine, q) for q in COLOURS}
            except MmsearchError:
                told += 1
            else:
                assert found == expected
        shutil.rmtree(copy)
    assert told > 20


def scores(engine, query):
    return [round(hit.score, 5) for hit in engine.search(query, k=60, fusion="image")]


def test_a_name_in_the_catalog_leads_out_of_no_folder(damaged, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    sql(damaged, ("UPDATE snapshot SET file = ?", ("../../victim.txt",)))
    with pytest.raises(DamageError):
        damaged.compact()
    damaged.repair()
    assert victim.read_text() == "mine"
    assert kinds(damaged, deep=True) == set()


class Rows(itertools.chain):
    def fetchone(self):
        return next(self, None)


def test_pages_that_lead_in_a_circle_are_left():
    """Found by fuzzing: a damaged page that leads back to an earlier one was read for ever."""

    class Circle:
        def execute(self, query, values):
            return Rows((number, b"x") for number in itertools.cycle((5, 9, 3, 4)))

    assert list(readable(Circle(), "look", ["content"])) == [(b"x",), (b"x",)]


class Greedy:
    """A table in which a row wants more memory than there is, so many times."""

    def __init__(self, times):
        self.times = times

    def execute(self, query, values):
        return Rows(self.rows(values[0]))

    def rows(self, after):
        for number in range(after + 1, 4):
            if number == 2 and self.times:
                self.times -= 1
                raise MemoryError
            yield number, b"x"


@pytest.mark.parametrize(("times", "left"), [(0, 3), (1, 3), (9, 2)])
def test_a_row_that_claims_all_memory_costs_itself(times, left):
    """Found by fuzzing: where an offset leads out of its page, SQLite wants any amount."""
    assert len(list(readable(Greedy(times), "look", ["content"]))) == left


def greedy(*_):
    raise MemoryError


@pytest.mark.parametrize("name", ["missing", "files"])
def test_too_little_memory_is_no_damage_to_a_sound_index(damaged, name):
    checks = type("GreedyChecks", (Checks,), {name: greedy})
    with pytest.raises(UnreadableError, match="too little memory"):
        verify(damaged.folder, checks=checks)
    with pytest.raises(UnreadableError, match="too little memory"):
        repair(damaged.folder, functools.partial(verify, checks=checks))
    assert kinds(damaged, deep=True) == set()


class GreedyCopy:
    """A catalog whose copies give no text: each wants more memory than there is."""

    def __init__(self, real):
        self.real = real

    def copy_into(self, target):
        self.real.copy_into(target)
        target.text_factory = greedy


def test_too_little_memory_makes_no_backup(damaged, tmp_path):
    store = SimpleNamespace(folder=damaged.folder, catalog=GreedyCopy(damaged.store.catalog))
    with pytest.raises(UnreadableError, match="too little memory"):
        backups.backup(store, tmp_path / "file", ())
    assert not (tmp_path / "file").exists()
    assert kinds(damaged, deep=True) == set()


def test_a_row_that_claims_all_memory_is_damage_where_the_structure_is(damaged):
    told = Damage("catalog", "an offset leads out of its page")

    class Torn(Checks):
        missing = greedy

        def structure(self):
            yield told

    assert verify(damaged.folder, checks=Torn).damages == (told,)

"""A folder is one folder, whatever it is called; captions follow the file that they came from."""

from __future__ import annotations

import os
import unicodedata

import pytest
from fakes import paint, run_plan

from mmsearch import Engine
from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.encoders.encoder_provider import GivenEncoder
from mmsearch.errors import UsageError
from mmsearch.ingest.plan import plan_of_files
from mmsearch.store.store import Store


@pytest.fixture
def engine(tmp_path, encoder):
    with Engine.open(tmp_path / "index", provider=GivenEncoder(encoder)) as opened:
        yield opened


def names(engine, **options):
    return sorted(hit.path.name for hit in engine.search("red", k=99, fusion="image", **options))


def captions(engine):
    hits = engine.search("x", k=99, to="caption")
    return sorted((hit.path.name, hit.caption) for hit in hits)


@pytest.fixture
def linked(tmp_path):
    """A folder "real" with a picture in "real/sub", and a link to it, "link"."""
    paint(tmp_path / "real" / "sub" / "a.png", "red")
    (tmp_path / "link").symlink_to("real")
    return tmp_path


def test_a_folder_indexed_by_its_name_and_by_a_link_is_one(engine, linked):
    for first, second in (
        ("real", "link"),
        ("link", "real"),
        ("link/sub", "real"),
        ("real", "link/sub"),
    ):
        engine.index([linked / first])
        report = engine.index([linked / second])
        assert (report.added, report.unchanged) == (0, 1), (first, second)
        assert names(engine) == ["a.png"]
        engine.remove([linked / "real"])


def test_a_filter_takes_a_folder_by_any_of_its_names(engine, linked):
    engine.index([linked / "real"])
    (linked / "another").symlink_to("link/sub")
    for under in ("real", "link", "real/sub", "link/sub", "another"):
        assert names(engine, under=linked / under) == ["a.png"], under
    for under in ("elsewhere", "real/other", "another/b"):
        assert names(engine, under=linked / under) == []


def test_a_folder_is_removed_by_any_of_its_names(engine, linked):
    paint(linked / "real" / "b.png", "red")
    engine.index([linked / "real"])
    assert engine.remove([linked / "link" / "sub"]) == 1
    assert engine.remove([linked / "link" / "b.png"]) == 1
    with pytest.raises(UsageError, match="nothing in the index"):
        engine.remove([linked / "link" / "b.png"])


def test_a_single_file_by_a_link_in_its_path_is_the_same_file(engine, linked):
    engine.index([linked / "link" / "sub" / "a.png"])
    assert engine.index([linked / "real" / "sub" / "a.png"]).unchanged == 1
    assert engine.index([linked / "real"]).unchanged == 1
    assert names(engine) == ["a.png"]


def test_what_a_link_within_a_folder_leads_to_is_found_by_its_own_name(engine, linked):
    paint(linked / "photos" / "b.png", "red")
    (linked / "photos" / "more").symlink_to(linked / "real")
    engine.index([linked / "photos"])
    assert names(engine) == ["a.png", "b.png"]
    assert names(engine, under=linked / "real") == ["a.png"]
    assert names(engine, under=linked / "link" / "sub") == ["a.png"]
    assert names(engine, under=linked / "photos" / "more") == ["a.png"]
    # Now as a folder of its own: what was known by the link is taken over, and stays one.
    report = engine.index([linked / "real"])
    assert (report.added, report.unchanged) == (0, 1)
    assert names(engine) == ["a.png", "b.png"]
    report = engine.index()
    assert (report.added, report.removed, report.unchanged) == (0, 0, 2)
    assert engine.remove([linked / "real"]) == 1


def test_a_link_within_what_is_taken_over_is_taken_over_too(engine, linked):
    paint(linked / "elsewhere" / "c.png", "red", mark=2)
    (linked / "real" / "away").symlink_to(linked / "elsewhere")
    paint(linked / "photos" / "b.png", "red", mark=1)
    (linked / "photos" / "more").symlink_to(linked / "real")
    engine.index([linked / "photos"])
    assert names(engine) == ["a.png", "b.png", "c.png"]
    for _ in range(2):
        report = engine.index([linked / "real"])
        assert (report.added, report.unchanged) == (0, 2)
        assert engine.index().unchanged == 3
        assert names(engine) == ["a.png", "b.png", "c.png"]
    assert engine.verify(deep=True).damages == ()


def test_a_single_file_behind_a_link_within_a_folder_is_the_same_file(engine, linked):
    (linked / "photos").mkdir()
    (linked / "photos" / "more").symlink_to(linked / "real")
    engine.index([linked / "photos"])
    for name in ("photos/more/sub/a.png", "real/sub/a.png", "link/sub/a.png"):
        engine.index([linked / name])
        assert names(engine) == ["a.png"]


@pytest.mark.parametrize("top", ["real", "photos"])
def test_a_single_file_above_or_beside_a_known_folder_is_that_file(engine, linked, top):
    (linked / "photos").mkdir()
    (linked / "photos" / "more").symlink_to(linked / "real" / "sub")
    engine.index([linked / "real" / "sub" if top == "real" else linked / "photos"])
    for path in (linked / "real" / "x.png", linked / "real" / "a.png", linked / "y.png"):
        assert engine.index([paint(path, "blue", mark=len(names(engine)))]).added == 1
    assert len(names(engine)) == 4


def test_a_folder_that_holds_a_known_one_and_what_a_link_leads_to_is_both(engine, linked):
    paint(linked / "data" / "photos" / "b.png", "red", mark=1)
    paint(linked / "data" / "docs" / "c.png", "red", mark=2)
    (linked / "other").mkdir()
    (linked / "other" / "link").symlink_to(linked / "data" / "docs")
    engine.index([linked / "data" / "photos", linked / "other"])
    assert names(engine, under=linked / "data") == ["b.png", "c.png"]
    assert names(engine, under=linked / "data" / "docs") == ["c.png"]


def test_what_failed_is_taken_over_too(engine, linked):
    (linked / "real" / "bad.png").write_bytes(b"nothing")
    (linked / "photos").mkdir()
    (linked / "photos" / "more").symlink_to(linked / "real")
    assert engine.index([linked / "photos"]).failed == 1
    assert engine.index([linked / "real"]).known_bad == 1
    assert [failure.path for failure in engine.errors()] == [linked / "real" / "bad.png"]


def test_a_link_that_loops_is_a_failure_only_if_it_is_called_a_picture(engine, linked):
    folder = linked / "real"
    for name in ("notes", "loop.png", "gone", "gone.jpg"):
        (folder / name).symlink_to(name if "o" in name[1:3] and "gone" not in name else "/nowhere")
    assert engine.index([folder]).failed == 2
    assert {failure.path.name for failure in engine.errors()} == {"loop.png", "gone.jpg"}


@pytest.mark.parametrize("seconds", [-1e10, -5.5, 0.0, 9.4e9, 1.5e10])
def test_any_time_that_a_file_system_has_is_taken(engine, linked, seconds):
    file = linked / "real" / "sub" / "a.png"
    os.utime(file, (seconds, seconds))
    assert engine.index([linked / "real"]).added == 1
    assert engine.index([linked / "real"]).unchanged == 1
    assert names(engine) == ["a.png"]


def test_other_content_of_the_same_size_and_time_is_seen_when_asked_for(engine, tmp_path):
    red, blue = (paint(tmp_path / "p" / f"{n}.bmp", n).read_bytes() for n in ("red", "blue"))
    (tmp_path / "p" / "blue.bmp").unlink()
    file = tmp_path / "p" / "red.bmp"
    os.utime(file, (1e9, 1e9))
    engine.index([tmp_path / "p"])
    file.write_bytes(blue)
    os.utime(file, (1e9, 1e9))
    assert len(red) == len(blue)
    assert engine.index([tmp_path / "p"]).unchanged == 1  # documented: size and time tell
    planned = engine.index(dry_run=True, reread=True)  # which opens no file
    assert (planned.updated, planned.unchanged) == (0, 1)
    report = engine.index([tmp_path / "p"], reread=True)
    assert (report.updated, report.unchanged) == (1, 0)
    (hit,) = engine.search("blue", fusion="image")
    assert hit.score > 0.99
    assert engine.index(reread=True).unchanged == 1


# -- captions --------------------------------------------------------------------------------------


def test_a_row_that_a_captions_file_has_no_more_goes_with_it(engine, tmp_path):
    for name in "abc":
        paint(tmp_path / "p" / f"{name}.png", "red", mark=ord(name))
    (tmp_path / "p" / "c.txt").write_text("by hand")
    first, second = tmp_path / "one.csv", tmp_path / "two.csv"
    first.write_text("image,caption\na.png,a house\nb.png,wrong\n")
    second.write_text("image,caption\nc.png,of another file\n")
    engine.index([tmp_path / "p"], captions=first)
    engine.index([tmp_path / "p"], captions=second)
    first.write_text("image,caption\na.png,a house\n")
    os.symlink(first, tmp_path / "link.csv")
    report = engine.index([tmp_path / "p"], captions=tmp_path / "link.csv")
    assert (report.captions, report.captions_removed) == (0, 1)
    expected = [("a.png", "a house"), ("c.png", "by hand"), ("c.png", "of another file")]
    assert captions(engine) == expected
    engine.index([tmp_path / "p"])
    assert captions(engine) == expected  # a run without the file takes nothing away
    second.write_text("image,caption\na.png,a cabin\nc.png,of another file\n")
    engine.index([tmp_path / "p"], captions=second)  # what names a picture again has the last word
    assert captions(engine)[0] == ("a.png", "a cabin")


def test_a_folder_of_sidecars_as_captions_takes_none_of_those_of_others(engine, tmp_path):
    for name in ("a/x", "b/y", "b/z"):
        paint(tmp_path / "p" / f"{name}.png", "red", mark=ord(name[-1]))
    for name in ("p/a/x", "p/b/y"):
        (tmp_path / f"{name}.txt").write_text(f"own {name[-1]}")
    for name in ("y", "z"):
        paint(tmp_path / "labels" / f"{name}.png", "blue", mark=ord(name[-1]))
        (tmp_path / "labels" / f"{name}.txt").write_text(f"labelled {name}")
    own = [("x.png", "own x"), ("y.png", "own y")]
    for labels in (tmp_path / "p" / "a", tmp_path / "p", None):
        engine.index([tmp_path / "p"], captions=labels)
        assert captions(engine) == own
    both = [*own, ("y.png", "labelled y"), ("z.png", "labelled z")]
    for labels in (tmp_path / "labels", None):
        engine.index([tmp_path / "p"], captions=labels)
        assert captions(engine) == sorted(both)
    os.utime(tmp_path / "p" / "b" / "z.png", (1e9, 1e9))
    engine.index([tmp_path / "p"])
    assert captions(engine) == sorted(both)
    (tmp_path / "labels" / "z.txt").unlink()
    engine.index([tmp_path / "p"], captions=tmp_path / "labels")
    assert captions(engine) == sorted(both[:-1])


def test_a_captions_file_for_a_part_of_the_index_leaves_the_rest_alone(engine, tmp_path):
    for name in ("a/x.png", "b/y.png"):
        paint(tmp_path / "p" / name, "red")
    table = tmp_path / "c.csv"
    table.write_text("image,caption\na/x.png,one\nb/y.png,two\n")
    engine.index([tmp_path / "p"], captions=table)
    table.write_text("image,caption\na/x.png,one\n")
    engine.index([tmp_path / "p" / "a"], captions=table)
    assert captions(engine) == [("x.png", "one"), ("y.png", "two")]


@pytest.mark.parametrize(
    "rest",
    [
        "a.png,one\nnothing\n",  # a row that is none: it may have been the other
        "a.png,one\nb.png,two\n",  # a name that two files have by now
    ],
)
def test_nothing_goes_that_a_captions_file_may_still_speak_of(engine, tmp_path, rest):
    for name in ("a.png", "b.png"):
        paint(tmp_path / "p" / name, "red", mark=ord(name[0]))
    table = tmp_path / "c.csv"
    table.write_text("image,caption\na.png,one\nb.png,two\n")
    engine.index([tmp_path / "p"], captions=table)
    (tmp_path / "p" / "x").mkdir()
    (tmp_path / "p" / "b.png").rename(tmp_path / "p" / "x" / "b.png")
    paint(tmp_path / "p" / "y" / "b.png", "red", mark=9)
    table.write_text("image,caption\n" + rest)
    engine.index([tmp_path / "p"], captions=table)
    assert captions(engine) == [("a.png", "one"), ("b.png", "two")]


def test_the_same_captions_from_another_file_are_not_encoded_again(engine, encoder, tmp_path):
    paint(tmp_path / "p" / "a.png", "red")
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text("image,caption\na.png,a house\n")
    engine.index([tmp_path / "p"], captions=tmp_path / "one.csv")
    report = engine.index([tmp_path / "p"], captions=tmp_path / "two.csv")
    assert (report.captions, report.captions_removed) == (0, 0)
    (tmp_path / "one.csv").write_text("image,caption\nx.png,a house\n")
    engine.index([tmp_path / "p"], captions=tmp_path / "one.csv")  # they are of the other now
    assert captions(engine) == [("a.png", "a house")]
    (tmp_path / "two.csv").write_text("image,caption\nx.png,a house\n")
    engine.index([tmp_path / "p"], captions=tmp_path / "two.csv")
    assert captions(engine) == []


def test_a_picture_that_changed_keeps_what_a_file_said_that_is_not_named_now(engine, tmp_path):
    paint(tmp_path / "p" / "a.png", "red")
    (tmp_path / "one.csv").write_text("image,caption\na.png,a house\n")
    (tmp_path / "two.csv").write_text("image,caption\nx.png,other\n")
    engine.index([tmp_path / "p"], captions=tmp_path / "one.csv")
    paint(tmp_path / "p" / "a.png", "blue", mark=3)
    assert engine.index([tmp_path / "p"], captions=tmp_path / "two.csv").updated == 1
    assert captions(engine) == [("a.png", "a house")]


def test_accents_of_either_form_name_the_same_file(engine, tmp_path):
    composed = "caf\u00e9.png"
    paint(tmp_path / "p" / unicodedata.normalize("NFD", composed), "red")
    table = tmp_path / "c.csv"
    table.write_text(f"image,caption\n{composed},a house\n")
    report = engine.index([tmp_path / "p"], captions=table)
    assert (report.captions, report.unmatched_captions) == (1, ())


def test_measuring_and_indexing_see_the_same_set(tmp_path, encoder):
    for name in ("a.png", "deep/b.png", unicodedata.normalize("NFD", "\u00e9.png"), "c.png"):
        paint(tmp_path / "p" / name, "red", mark=len(name))
    labelled = LabelledSet("x", (
        LabelledImage("a.png", ("one",)), LabelledImage("val2014/b.png", ("two",)),
        LabelledImage("\u00e9.png", ("three",)), LabelledImage("gone.png", ("four",)),
    ))  # fmt: skip
    store = Store.create(tmp_path / "index")
    with store.writer() as writer:
        plan = plan_of_files(writer, os.fsencode(tmp_path / "p"), labelled)
        run_plan(store, writer, plan, encoder, workers=2)
    assert plan.labels.unmatched == ("gone.png",)
    held = store.contents()
    assert sorted(held.caption_texts) == ["one", "three", "two"]
    assert len(held.image_ids) == 3
    store.close()


def test_a_name_is_unique_among_all_images_of_the_labels(tmp_path):
    paint(tmp_path / "p" / "a.png", "red")
    test, train = LabelledImage("one/a.png", ("one",)), LabelledImage("two/a.png", ("two",))
    for among, unmatched in ((None, ()), ([test, train], ("one/a.png",))):
        store = Store.create(tmp_path / f"index-{bool(among)}")
        with store.writer() as writer:
            plan = plan_of_files(
                writer, os.fsencode(tmp_path / "p"), LabelledSet("x", (test,)), among
            )
        assert plan.labels.unmatched == unmatched
        store.close()


def test_what_of_the_captions_cannot_be_used_is_in_the_report(engine, tmp_path):
    paint(tmp_path / "p" / "a.png", "red")
    paint(tmp_path / "p" / "b.png", "red", mark=1)
    (tmp_path / "p" / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.csv").write_text("image,caption\na.png\na.png,one\n")
    told = []
    engine.opened.notify = told.append
    report = engine.index([tmp_path / "p"], captions=tmp_path / "c.csv")
    assert report.unread_sidecars == (str(tmp_path / "p" / "b.txt"),)
    assert len(report.captions_remarks) == 1
    assert "c.csv:2" in told[0]

"""Indexing folders: what is added, kept, moved, removed and noted as bad."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import DECODERS, FakeEncoder, WatchedFiles, nearest, paint, run_plan

from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.errors import UsageError
from mmsearch.ingest.plan import make_plan, scopes_of
from mmsearch.media.sandbox import Decoders
from mmsearch.store.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "index")
    yield store
    store.close()


@pytest.fixture
def run(store, encoder):
    def index(*paths, prune=None, exclude=None, captions=None, encoder=encoder, **options):
        with store.writer() as writer:
            scopes = scopes_of(store, writer, paths, exclude)
            labelled = (LabelledSet("set", tuple(captions)), paths[0]) if captions else None
            plan = make_plan(store, scopes, prune=prune, labelled=labelled)
            return run_plan(store, writer, plan, encoder, **options)

    return index


@pytest.fixture
def opening():
    """Makes decoders that tell a function of each file before they open it."""
    made = []

    def make(look):
        made.append(Decoders(source=WatchedFiles(look)))
        return made[-1]

    yield make
    for decoders in made:
        decoders.close()


def never(path):
    raise AssertionError(f"{path} was opened")


class OnlyHashes:
    """Decoders that open and hash files, and decode none."""

    threads = DECODERS.threads

    @contextmanager
    def open(self, path):
        with DECODERS.open(path) as file:
            yield SimpleNamespace(
                stamp=file.stamp, digest=file.digest, reason=file.reason, kind=file.kind
            )


def counts(report):
    return {
        name: getattr(report, name)
        for name in ("added", "updated", "unchanged", "moved", "removed", "failed")
        if getattr(report, name)
    }


def paths_in(store, below):
    held = store.contents()
    return sorted(os.path.relpath(os.fsdecode(path), below) for path in held.image_paths)


def captions_in(store):
    held = store.contents()
    path = dict(zip(held.image_ids.tolist(), held.image_paths, strict=True))
    return sorted(
        (os.path.basename(path[int(media)]).decode(), text)
        for media, text in zip(held.caption_media, held.caption_texts, strict=True)
    )


def first(store, encoder, text):
    answer = nearest(store, encoder.encode("text", [text]), "image", 1)[0]
    return os.path.basename(answer.items[0].path).decode()


def test_a_folder_is_taken_in_and_found(run, store, encoder, photos):
    assert counts(run(photos)) == {"added": 6}
    for colour in ("red", "green", "blue", "yellow", "white", "black"):
        assert first(store, encoder, f"something {colour}").startswith(colour)


def test_a_second_run_over_an_unchanged_folder_opens_no_file(run, photos, opening):
    run(photos)
    assert counts(run(photos, decoders=opening(never))) == {"unchanged": 6}


def test_what_is_new_is_added_and_what_changed_is_embedded_again(run, store, encoder, photos):
    run(photos)
    before = dict(zip(*_ids_by_path(store), strict=True))
    paint(photos / "red.png", "blue", mark=5)
    paint(photos / "extra.png", "red", mark=6)
    assert counts(run(photos)) == {"added": 1, "updated": 1, "unchanged": 5}
    after = dict(zip(*_ids_by_path(store), strict=True))
    assert after["red.png"] > max(before.values())
    assert first(store, encoder, "red") == "extra.png"


def _ids_by_path(store):
    held = store.contents()
    return [os.path.basename(p).decode() for p in held.image_paths], held.image_ids.tolist()


def test_a_touched_file_is_not_embedded_again(run, encoder, photos):
    run(photos)
    os.utime(photos / "red.png", ns=(1, 1))
    done = encoder.images_encoded
    assert counts(run(photos)) == {"unchanged": 6}
    assert encoder.images_encoded == done
    assert counts(run(photos)) == {"unchanged": 6}


def test_a_moved_file_keeps_its_id_and_is_not_decoded(run, store, encoder, photos):
    run(photos)
    before = _ids_by_path(store)
    (photos / "red.png").rename(photos / "more" / "scarlet.png")
    assert counts(run(photos, decoders=OnlyHashes())) == {"unchanged": 5, "moved": 1}
    after = _ids_by_path(store)
    assert set(after[1]) == set(before[1])
    assert first(store, encoder, "red") == "scarlet.png"


def test_a_moved_folder_is_moved_files(run, store, photos):
    run(photos)
    (photos / "more").rename(photos / "elsewhere")
    assert counts(run(photos)) == {"unchanged": 4, "moved": 2}
    assert "elsewhere/white.png" in paths_in(store, photos)


def test_a_renamed_root_is_moved_files(run, store, encoder, photos):
    run(photos, captions=[LabelledImage("red.png", ("one",))])
    before = set(_ids_by_path(store)[1])
    renamed = photos.rename(photos.with_name("pictures"))
    assert counts(run(renamed)) == {"moved": 6}
    assert set(_ids_by_path(store)[1]) == before
    assert captions_in(store) == [("red.png", "one")]
    assert encoder.images_encoded == 6
    with store.catalog.read() as queries:
        assert [root.path for root in queries.roots()] == [os.fsencode(renamed)]


def test_a_copy_of_a_folder_that_is_still_there_is_copies(run, photos):
    run(photos)
    shutil.copytree(photos, photos.with_name("copy"))
    assert counts(run(photos.with_name("copy"))) == {"added": 6}


def test_a_touched_file_without_exif_gets_the_new_date(run, store, photos):
    run(photos)
    os.utime(photos / "red.png", (1_400_000_000, 1_400_000_000))
    run(photos)
    with store.catalog.read() as queries:
        rows = dict(queries.cursor("SELECT path, captured FROM media"))
    assert rows[b"red.png"].startswith("2014-05-1")


def test_a_copy_counts_as_added_and_is_not_decoded(run, encoder, photos):
    run(photos)
    shutil.copy(photos / "red.png", photos / "copy.png")
    assert counts(run(photos, decoders=OnlyHashes())) == {"added": 1, "unchanged": 6}
    assert encoder.images_encoded == 6


def test_copies_within_one_run_are_encoded_once(run, store, encoder, photos):
    for number in range(5):
        shutil.copy(photos / "red.png", photos / f"copy{number}.png")
    assert counts(run(photos)) == {"added": 11}
    assert encoder.images_encoded == 6
    held = store.contents()
    rows = [i for i, p in enumerate(held.image_paths) if b"copy" in p or b"red" in p]
    assert len(np.unique(held.image_vectors[rows], axis=0)) == 1


def test_what_a_copy_costs_does_not_grow_with_the_copies(run, store, photos):
    """Of those that there are, one is looked at: the others may be damaged."""
    run(photos)
    for number in range(300):
        shutil.copy(photos / "red.png", photos / f"copy{number}.png")
    assert counts(run(photos)) == {"added": 300, "unchanged": 6}
    with store.catalog.write() as connection:
        done = connection.exec_driver_sql(
            "UPDATE embedding SET vector = zeroblob(length(vector)) WHERE item_id > 6"
        )
    assert done.rowcount == 300
    for number in range(300, 400):
        shutil.copy(photos / "red.png", photos / f"copy{number}.png")
    assert counts(run(photos)) == {"added": 100, "unchanged": 306}


def test_copies_that_move_together_keep_their_captions(run, store, photos):
    """Each takes over the entry of the first that is left, in the order in which they came."""
    for number in range(3):
        shutil.copy(photos / "red.png", photos / "more" / f"copy{number}.png")
    named = [LabelledImage(f"more/copy{number}.png", (f"the {number}th",)) for number in range(3)]
    run(photos, captions=named)
    (photos / "more").rename(photos / "elsewhere")
    assert counts(run(photos)) == {"unchanged": 4, "moved": 5}
    assert captions_in(store) == [(f"copy{number}.png", f"the {number}th") for number in range(3)]


def test_a_folder_that_moved_comes_before_a_later_copy_that_is_gone(run, store, tmp_path):
    """Or its entry would stay, a file that is not there, and keep the caption."""
    paint(tmp_path / "a/9.png", "red")
    run(tmp_path / "a", captions=[LabelledImage("9.png", ("the first",))])
    paint(tmp_path / "b/other.png", "blue")
    shutil.copy(tmp_path / "a/9.png", tmp_path / "b/copy.png")
    run(tmp_path / "b")
    (tmp_path / "b/copy.png").unlink()
    moved = (tmp_path / "a").rename(tmp_path / "z")
    assert counts(run(moved, tmp_path / "b")) == {"moved": 1, "removed": 1, "unchanged": 1}
    assert paths_in(store, tmp_path) == ["b/other.png", "z/9.png"]
    assert captions_in(store) == [("9.png", "the first")]


@pytest.mark.parametrize("batch", [1, 64])
def test_a_file_keeps_its_captions_when_a_known_picture_takes_its_place(run, store, photos, batch):
    run(photos, captions=[LabelledImage("green.png", ("mine",))], batch=batch)
    shutil.copy(photos / "red.png", photos / "green.png")
    (photos / "red.png").rename(photos / "crimson.png")
    run(photos, batch=batch)
    assert captions_in(store) == [("green.png", "mine")]


@pytest.mark.parametrize("batch", [1, 64])
def test_of_copies_that_change_the_one_with_captions_gives_them(run, store, photos, batch):
    for name in ("a.png", "b.png"):
        shutil.copy(photos / "red.png", photos / name)
    run(photos, captions=[LabelledImage("b.png", ("mine",))], batch=batch)
    for name in ("a.png", "b.png"):
        shutil.copy(photos / "green.png", photos / name)
    shutil.copy(photos / "red.png", photos / "0.png")
    run(photos, batch=batch)
    assert captions_in(store) == [("0.png", "mine"), ("b.png", "mine")]


def test_what_was_damaged_leaves_its_captions_to_its_copy(run, store, photos):
    run(photos, captions=[LabelledImage("red.png", ("mine",))])
    shutil.copy(photos / "red.png", photos / "saved.png")
    (photos / "red.png").write_bytes(b"no picture any more")
    run(photos)
    assert captions_in(store) == [("saved.png", "mine")]


def test_a_root_that_vanishes_during_a_run_loses_no_row_to_itself(run, store, photos, tmp_path):
    for number in range(4):
        shutil.copy(photos / "red.png", photos / f"copy{number}.png")

    def vanish(_progress):
        if photos.exists():
            photos.rename(tmp_path / "kept")

    run(photos, batch=1, on_progress=vanish)
    assert not photos.exists()
    held = paths_in(store, photos)
    assert len(held) == len(set(held)) >= 2


def test_a_missing_folder_that_nothing_was_found_of_is_kept(run, store, photos, tmp_path):
    """It may be a disk that is not there today, with nothing on it yet."""
    (tmp_path / "card").mkdir()
    run(photos, tmp_path / "card")
    (tmp_path / "card").rmdir()
    renamed = photos.rename(photos.with_name("pictures"))
    assert counts(run(renamed)) == {"moved": 6}
    with store.catalog.read() as queries:
        kept = [os.path.basename(root.path) for root in queries.roots()]
    assert sorted(kept) == [b"card", b"pictures"]


def test_two_files_that_trade_places(run, store, encoder, photos):
    run(photos)
    (photos / "red.png").rename(photos / "x.png")
    (photos / "green.png").rename(photos / "red.png")
    (photos / "x.png").rename(photos / "green.png")
    os.utime(photos / "red.png", ns=(5, 5))
    os.utime(photos / "green.png", ns=(6, 6))
    run(photos)
    assert first(store, encoder, "red") == "green.png"
    assert first(store, encoder, "green") == "red.png"
    assert len(paths_in(store, photos)) == 6


def test_a_chain_of_renames(run, store, encoder, photos):
    """The white picture is gone, and the red one has its name."""
    run(photos)
    (photos / "more" / "white.png").unlink()
    (photos / "red.png").rename(photos / "more" / "white.png")
    report = run(photos)
    assert counts(report) == {"unchanged": 4, "moved": 1}
    assert first(store, encoder, "red") == "white.png"
    assert len(paths_in(store, photos)) == 5


def test_what_is_gone_is_removed(run, store, photos):
    run(photos)
    (photos / "red.png").unlink()
    assert counts(run(photos)) == {"unchanged": 5, "removed": 1}
    assert "red.png" not in paths_in(store, photos)


def test_no_prune_keeps_what_is_gone(run, store, photos):
    run(photos)
    (photos / "red.png").unlink()
    assert counts(run(photos, prune=False)) == {"unchanged": 5}
    assert "red.png" in paths_in(store, photos)


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_an_unmounted_disk_removes_nothing_unless_told_to(run, store, photos, how):
    run(photos)
    shutil.rmtree(photos)
    if how == "empty":
        photos.mkdir()
    report = run()
    assert (report.removed, report.kept_roots) == (0, (photos,))
    assert len(paths_in(store, photos)) == 6
    assert run(prune=True).removed == 6


def test_a_rescan_looks_at_all_known_roots(run, photos, tmp_path):
    other = paint(tmp_path / "other" / "a.png", "red", mark=3)
    run(photos)
    run(other)
    paint(photos / "new.png", "blue", mark=4)
    paint(tmp_path / "other" / "unasked.png", "blue", mark=5)
    assert counts(run()) == {"added": 1, "unchanged": 7}


def test_a_single_file_that_is_gone_is_removed_by_a_rescan(run, tmp_path):
    one = paint(tmp_path / "other" / "a.png", "red")
    paint(tmp_path / "other" / "b.png", "blue")
    run(one)
    one.unlink()
    assert counts(run()) == {"removed": 1}


def test_a_folder_around_a_known_one_takes_it_in(run, store, photos):
    run(photos / "more")
    assert counts(run(photos)) == {"added": 4, "unchanged": 2}
    with store.catalog.read() as queries:
        assert [root.path for root in queries.roots()] == [os.fsencode(photos)]


def test_a_folder_inside_a_known_one_is_a_part_of_it(run, photos):
    run(photos)
    (photos / "red.png").unlink()
    (photos / "more" / "white.png").unlink()
    assert counts(run(photos / "more")) == {"unchanged": 1, "removed": 1}


def test_overlapping_paths_are_looked_at_once(run, photos):
    assert counts(run(photos, photos / "more", photos / "red.png")) == {"added": 6}


def test_excluded_files_stay_out_and_the_root_remembers(run, store, photos):
    assert counts(run(photos, exclude=["more", "*.bmp"])) == {"added": 3}
    assert counts(run(photos)) == {"unchanged": 3}
    assert counts(run(photos, exclude=[])) == {"added": 3, "unchanged": 3}


def test_a_path_that_is_nowhere_is_refused(run, tmp_path, photos):
    run(photos)
    for path in (tmp_path / "nowhere", photos / "nowhere.png"):
        with pytest.raises(UsageError, match="no such file"):
            run(path)
    for path in (tmp_path / "notes.txt", photos / "notes.txt"):
        path.write_text("x")
        with pytest.raises(UsageError, match="not an image by its name"):
            run(path)


def test_one_wrong_path_among_several_changes_nothing(run, store, tmp_path, photos):
    with pytest.raises(UsageError, match="no such file"):
        run(photos, tmp_path / "nowhere")
    assert store.status().roots == ()


# -- bad files ---------------------------------------------------------------------------------


def test_a_bad_file_is_noted_and_costs_nobody_else(run, store, photos):
    (photos / "bad.png").write_bytes(b"nothing")
    (photos / "empty.jpg").touch()
    assert counts(run(photos)) == {"added": 6, "failed": 2}
    with store.catalog.read() as queries:
        noted = {f.path.name: f.reason for f in queries.failures()}
    assert noted == {"bad.png": "not an image, or damaged at its start", "empty.jpg": "empty file"}


def test_a_bad_file_is_tried_again_only_when_it_changes(run, store, photos, opening):
    (photos / "bad.png").write_bytes(b"nothing")
    run(photos)
    report = run(photos, decoders=opening(never))
    assert (report.failed, report.known_bad, report.unchanged) == (0, 1, 6)
    paint(photos / "bad.png", "red", mark=9)
    assert counts(run(photos)) == {"added": 1, "unchanged": 6}
    assert store.status().failures == 0


def test_a_bad_file_that_is_gone_fails_no_more(run, store, photos):
    (photos / "bad.png").write_bytes(b"nothing")
    run(photos)
    (photos / "bad.png").unlink()
    run(photos)
    assert store.status().failures == 0


def test_a_picture_that_becomes_bad_is_no_longer_found(run, store, photos):
    run(photos)
    (photos / "red.png").write_bytes(b"nothing any more")
    assert counts(run(photos)) == {"unchanged": 5, "failed": 1}
    assert "red.png" not in paths_in(store, photos)


def unreadable(_path):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_that_cannot_be_read_just_now_stays_and_is_tried_again(run, store, photos, opening):
    run(photos)
    os.utime(photos / "red.png", ns=(1, 1))
    again = run(photos, decoders=opening(unreadable))
    assert counts(again) == {"unchanged": 5, "failed": 1}
    assert "red.png" in paths_in(store, photos)
    assert counts(run(photos)) == {"unchanged": 6}
    assert store.status().failures == 0


def test_a_folder_that_cannot_be_read_keeps_what_was_indexed_of_it(run, store, photos, monkeypatch):
    run(photos)
    with monkeypatch.context() as patch:
        patch.setattr("mmsearch.media.discover.os.scandir", unreadable)
        assert run(photos, prune=True).removed == 0
    assert len(paths_in(store, photos)) == 6


def test_a_link_that_is_mended_fails_no_more(run, store, photos, tmp_path):
    target = paint(tmp_path / "elsewhere" / "a.png", "red", mark=8)
    (photos / "link.png").symlink_to(target)
    run(photos)
    target.rename(tmp_path / "aside.png")
    assert run(photos).failed == 1
    (tmp_path / "aside.png").rename(target)
    run(photos)
    assert store.status().failures == 0


def test_a_folder_without_images_but_with_other_files_is_no_unmounted_disk(run, store, photos):
    run(photos)
    for path in photos.rglob("*.*"):
        path.unlink()
    (photos / "notes.md").write_text("all moved to the attic")
    assert run(photos).removed == 6


def test_exclude_needs_a_path(run, photos):
    run(photos)
    with pytest.raises(UsageError, match="name the PATH"):
        run(exclude=["*.png"])


def test_a_glob_that_is_not_text_is_taken(run, photos):
    name = os.path.join(os.fsencode(photos), b"\xfdx.png")
    shutil.copy(photos / "red.png", name)
    assert counts(run(photos, exclude=[os.fsdecode(b"\xfd*")])) == {"added": 6}
    assert counts(run(photos)) == {"unchanged": 6}


def test_a_broken_link_is_noted(run, store, photos):
    (photos / "link.png").symlink_to(photos / "nowhere.png")
    assert counts(run(photos)) == {"added": 6, "failed": 1}


# -- captions ----------------------------------------------------------------------------------


def test_sidecars_are_captions_and_follow_their_changes(run, store, photos):
    (photos / "red.txt").write_text("a red square\n\n  very red  \n")
    assert run(photos).captions == 2
    assert captions_in(store) == [("red.png", "a red square"), ("red.png", "very red")]
    assert run(photos).captions == 0
    (photos / "red.txt").write_text("very red\nother words here\n")
    assert run(photos).captions == 1
    assert captions_in(store) == [("red.png", "other words here"), ("red.png", "very red")]
    (photos / "red.txt").unlink()
    run(photos)
    assert captions_in(store) == []


def test_a_captions_file_matches_by_path_then_by_a_unique_name(run, store, photos):
    paint(photos / "more" / "red.png", "red", mark=2)
    given = [
        LabelledImage("more/red.png", ("inner",)),
        LabelledImage("white.png", ("by its name",)),
        LabelledImage("nowhere.png", ("lost",)),
    ]
    report = run(photos, captions=given)
    assert report.unmatched_captions == ("nowhere.png",)
    assert captions_in(store) == [("red.png", "inner"), ("white.png", "by its name")]


def test_a_name_that_two_files_have_matches_neither(run, store, photos):
    paint(photos / "more" / "red.png", "red", mark=2)
    (photos / "red.png").rename(photos / "sub.png")
    paint(photos / "again" / "red.png", "red", mark=3)
    report = run(photos, captions=[LabelledImage("red.png", ("which?",))])
    assert report.unmatched_captions == ("red.png",)


def test_new_captions_for_an_indexed_folder_decode_nothing(run, store, encoder, photos):
    run(photos)
    done = encoder.images_encoded
    report = run(photos, captions=[LabelledImage("red.png", ("one", "two", "two"))])
    assert (report.captions, report.unchanged, encoder.images_encoded) == (3, 6, done)
    report = run(photos, captions=[LabelledImage("red.png", ("two",))])
    assert captions_in(store) == [("red.png", "two")]
    run(photos)
    assert captions_in(store) == [("red.png", "two")]


def test_a_rescan_keeps_what_a_captions_file_once_said(run, store, photos):
    run(photos, captions=[LabelledImage("red.png", ("one",)), LabelledImage("blue.jpg", ("two",))])
    paint(photos / "red.png", "red", mark=77)
    assert counts(run(photos)) == {"updated": 1, "unchanged": 5}
    assert captions_in(store) == [("blue.jpg", "two"), ("red.png", "one")]


def test_captions_follow_two_pictures_that_trade_places(run, store, photos):
    run(photos, captions=[LabelledImage("red.png", ("r",)), LabelledImage("green.png", ("g",))])
    (photos / "red.png").rename(photos / "x.png")
    (photos / "green.png").rename(photos / "red.png")
    (photos / "x.png").rename(photos / "green.png")
    os.utime(photos / "red.png", ns=(5, 5))
    os.utime(photos / "green.png", ns=(6, 6))
    run(photos)
    assert captions_in(store) == [("green.png", "r"), ("red.png", "g")]


@pytest.mark.parametrize("batch", [1, 64])
def test_captions_follow_a_chain_of_renames(run, store, photos, batch):
    run(
        photos,
        captions=[LabelledImage("red.png", ("r",)), LabelledImage("green.png", ("g",))],
        batch=batch,
    )
    (photos / "green.png").rename(photos / "third.png")
    (photos / "red.png").rename(photos / "green.png")
    os.utime(photos / "green.png", ns=(5, 5))
    run(photos, batch=batch)
    assert captions_in(store) == [("green.png", "r"), ("third.png", "g")]


def test_a_path_beside_the_captions_file_comes_first(store, encoder, photos):
    paint(photos / "more" / "red.png", "red", mark=2)
    given = LabelledSet("set", (LabelledImage("red.png", ("the inner one",)),))
    with store.writer() as writer:
        scopes = scopes_of(store, writer, [photos], None)
        plan = make_plan(store, scopes, prune=None, labelled=(given, photos / "more"))
        run_plan(store, writer, plan, encoder, workers=1)
    held = store.contents()
    place = dict(zip(held.image_ids.tolist(), held.image_paths, strict=True))
    assert place[int(held.caption_media[0])] == os.fsencode(photos / "more" / "red.png")


def test_paths_relative_to_the_folder_that_was_named(run, store, photos, tmp_path):
    run(photos)
    paint(photos / "more" / "a" / "1.png", "red", mark=2)
    paint(photos / "more" / "b" / "1.png", "red", mark=3)
    given = LabelledSet("set", (LabelledImage("b/1.png", ("b",)),))
    with store.writer() as writer:
        scopes = scopes_of(store, writer, [photos / "more"], None)
        plan = make_plan(store, scopes, prune=None, labelled=(given, tmp_path))
    (key,) = plan.labels.captions
    assert key[1] == b"more/b/1.png"


def test_many_captions_of_one_picture_are_encoded_in_portions(run, photos):
    sizes = []

    class Counting(FakeEncoder):
        def texts(self, texts):
            sizes.append(len(texts))
            return super().texts(texts)

    (photos / "red.txt").write_text("\n".join(f"line {i}" for i in range(1000)))
    assert run(photos, encoder=Counting()).captions == 1000
    assert max(sizes) <= 256


def test_a_fifo_for_a_sidecar_hangs_nobody(run, photos):
    os.mkfifo(photos / "red.txt")
    assert counts(run(photos)) == {"added": 6}


def test_captions_move_with_their_picture(run, store, photos):
    run(photos, captions=[LabelledImage("red.png", ("one",))])
    (photos / "red.png").rename(photos / "scarlet.png")
    run(photos)
    assert captions_in(store) == [("scarlet.png", "one")]


def test_odd_captions_are_kept_as_far_as_text_goes(run, store, photos):
    run(photos, captions=[LabelledImage("red.png", ("nul\0here", "sur\ud800rogate", "x" * 9999))])
    texts = [text for _, text in captions_in(store)]
    assert texts == ["nul here", "sur?rogate", "x" * 4096]


# -- interruption ------------------------------------------------------------------------------


class Interrupted(FakeEncoder):
    """Ctrl-C after four pictures."""

    def encode(self, modality, batch):
        if self.images_encoded >= 4:
            raise KeyboardInterrupt
        return super().encode(modality, batch)


def test_an_interrupt_keeps_what_was_committed(run, store, photos):
    with pytest.raises(KeyboardInterrupt):
        run(photos, batch=2, encoder=Interrupted())
    assert len(paths_in(store, photos)) == 4
    assert counts(run(photos)) == {"added": 2, "unchanged": 4}


def test_names_that_are_not_text_are_indexed(run, store, photos):
    name = os.path.join(os.fsencode(photos), b"caf\xe9\n.png")
    shutil.copy(photos / "red.png", name)
    assert counts(run(photos)) == {"added": 7}
    assert name in store.contents().image_paths


@pytest.mark.parametrize("what", ["vanishes", "changes", "becomes a folder", "becomes a FIFO"])
def test_a_file_that_does_not_stay_as_the_walk_saw_it_costs_itself(
    run, store, photos, opening, what
):
    path = photos / "red.png"

    def change(opened):
        if opened == os.fsencode(path) and path.is_file():
            if what == "changes":
                paint(path, "blue", mark=77)
            else:
                path.unlink()
            if what == "becomes a folder":
                path.mkdir()
            elif what == "becomes a FIFO":
                os.mkfifo(path)

    report = run(photos, decoders=opening(change))
    assert report.added == (6 if what == "changes" else 5)
    assert report.failed == (0 if what == "changes" else 1)
    again = run(photos)
    assert again.added == again.updated == 0
    assert store.status().images == report.added


@pytest.mark.slow
def test_captions_of_any_size_and_kind_are_captions(run, store, photos):
    (photos / "red.txt").write_bytes(b"a" * (2 << 20))
    (photos / "green.txt").write_bytes(b"\0\0a\0door\0\n\xed\xa0\x80\xff\n" + b"\r\n" * 5)
    (photos / "blue.txt").write_bytes(b"a\x1b[1mdoor\r\n" + b"\r\n" * 5)
    (photos / "yellow.txt").write_text("\n".join(f"caption {n}" for n in range(3000)))
    report = run(photos)
    assert report.failed == 0
    assert report.unread_sidecars == (str(photos / "green.txt"),)
    held = store.contents()
    longest = max(held.caption_texts, key=len)
    assert longest == "a" * 4096
    assert all("\0" not in text for text in held.caption_texts)
    assert len(held.caption_texts) == 3002
    assert run(photos).unchanged == 6

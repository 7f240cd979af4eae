"""Going over to another model: embedded beside the one that answers, switched to when complete."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import FakeEncoder, FakeProvider, paint

from mmsearch import Engine
from mmsearch.datasets.labelled import LabelledImage, LabelledSet
from mmsearch.errors import Interrupted, UsageError

pytestmark = pytest.mark.slow


class OtherEncoder(FakeEncoder):
    """The same pictures at other places, and a switch that cuts it off.

    Which pictures come before the cut is certain with one worker only (`in_order`).
    """

    def __init__(self, name):
        super().__init__(name)
        seed = sum(name.encode())
        self.basis = np.random.default_rng(seed).normal(size=(4, self.spec.dim)).astype("f4")
        self.breaks_after = None

    def images(self, pixels):
        if self.breaks_after is not None and self.images_encoded >= self.breaks_after:
            raise KeyboardInterrupt
        return super().images(pixels)


@pytest.fixture
def provider():
    return FakeProvider(*map(OtherEncoder, ("one", "other", "third")))


@pytest.fixture
def encoders(provider):
    return provider.encoders


@pytest.fixture
def in_order(monkeypatch):
    monkeypatch.setenv("MMSEARCH_WORKERS", "1")


@pytest.fixture
def gallery(tmp_path):
    for number in range(40):
        colour = ("red", "green", "blue", "yellow")[number % 4]
        paint(tmp_path / "photos" / f"{colour}{number:02d}.png", colour, mark=number + 1)
    (tmp_path / "photos/red00.txt").write_text("a red door\n")
    return tmp_path / "photos"


@pytest.fixture
def engine_for(tmp_path, provider):
    opened = []

    def make(model, batch=64, notify=lambda line: None):
        engine = Engine.open(tmp_path / "index", model=model, notify=notify, provider=provider)
        engine.opened.batch = batch
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.close()


def found(engine, text="something blue"):
    return [hit.path.name for hit in engine.search(text, k=10, fusion="image")]


def vectors_agree(engine, encoder):
    """Every vector of the index is the encoder's own for its file or text."""
    from mmsearch.media.fit import fit
    from mmsearch.media.image import decode

    held = engine.store.contents()
    for path, vector in zip(held.image_paths, held.image_vectors, strict=True):
        with open(path, "rb") as file:
            pixels = fit(decode(file.read()).image, encoder.spec.preprocess)
        np.testing.assert_allclose(encoder.encode("image", pixels[None])[0], vector, atol=1e-6)
    expected = encoder.encode("text", list(held.caption_texts))
    np.testing.assert_allclose(expected, held.caption_vectors, atol=1e-6)
    return len(held.image_ids), len(held.caption_ids)


def test_an_index_goes_over_to_another_model(engine_for, encoders, gallery, tmp_path):
    engine_for("one").index([gallery])
    old_files = set((tmp_path / "index/vectors").iterdir())
    report = engine_for("other").index()
    assert (report.embedded_again, report.missing, report.replaced) == (40, 0, "one")
    assert (report.unchanged, report.added, report.removed) == (40, 0, 0)
    engine = engine_for(None)
    assert engine.status().model == "other"
    assert engine.status().pending == ""
    assert vectors_agree(engine, encoders["other"]) == (40, 1)
    assert all(name.startswith("blue") for name in found(engine))
    assert not old_files & set((tmp_path / "index/vectors").iterdir())
    with engine.store.catalog.read() as queries:
        for table in ("space", "embedding"):
            (spaces,) = queries.cursor(
                f"SELECT count(DISTINCT {'id' if table == 'space' else 'space_id'}) FROM {table}"
            ).fetchone()
            assert spaces == 1
    assert engine.index([gallery]).embedded_again == 0


def test_what_was_cut_off_is_gone_on_with_and_searches_see_none_of_it(
    engine_for, encoders, gallery, in_order
):
    engine_for("one").index([gallery])
    before = found(engine_for(None))
    encoders["other"].breaks_after = 24
    with pytest.raises(Interrupted, match="is kept"):
        engine_for("other", batch=8).index([gallery])
    assert found(engine_for(None)) == before
    status = engine_for(None).status()
    assert (status.model, status.pending) == ("one", "other")
    assert 40 - 24 <= status.missing < 40
    encoders["other"].breaks_after = None
    done = encoders["other"].images_encoded
    report = engine_for("other", batch=8).index([gallery])
    assert report.embedded_again == status.missing
    assert encoders["other"].images_encoded == done + status.missing
    assert report.replaced == "one"
    assert vectors_agree(engine_for(None), encoders["other"]) == (40, 1)


def test_while_a_folder_is_missing_the_index_keeps_its_model(
    engine_for, encoders, gallery, tmp_path
):
    paint(tmp_path / "more/black.png", "black")
    engine_for("one").index([gallery, tmp_path / "more"])
    (tmp_path / "more").rename(tmp_path / "elsewhere")
    paint(gallery / "white.png", "white")
    paint(gallery / "red00.png", "yellow")
    report = engine_for("other").index(prune=None)
    assert (report.added, report.updated) == (1, 1)
    assert (report.embedded_again, report.missing, report.replaced) == (41, 1, "")
    engine = engine_for(None)
    assert engine.status().model == "one"
    assert len(engine.search("white", k=100)) == 42  # what is new is found meanwhile
    assert engine.search("white", k=1)[0].path.name == "white.png"
    (tmp_path / "elsewhere").rename(tmp_path / "more")
    report = engine_for("other").index()
    assert (report.embedded_again, report.replaced) == (1, "one")
    assert vectors_agree(engine_for(None), encoders["other"]) == (42, 1)


def test_folders_that_were_not_named_are_neither_pruned_nor_forgotten(
    engine_for, encoders, gallery, tmp_path
):
    paint(tmp_path / "more/black.png", "black")
    engine_for("one").index([gallery, tmp_path / "more"])
    (tmp_path / "more").rename(tmp_path / "elsewhere")
    report = engine_for("other").index([gallery], prune=True)
    assert (report.removed, report.missing, report.replaced) == (0, 1, "")
    (tmp_path / "elsewhere").rename(tmp_path / "more")
    assert engine_for("other").index([gallery], prune=True).replaced == "one"
    assert vectors_agree(engine_for(None), encoders["other"]) == (41, 1)


def test_a_file_that_changes_meanwhile_is_for_the_next_run(engine_for, encoders, gallery, tmp_path):
    paint(tmp_path / "more/black.png", "black")
    engine_for("one").index([gallery, tmp_path / "more"])
    paint(gallery / "red00.png", "white")  # in a folder that the run does not look at
    report = engine_for("other").index([tmp_path / "more"])
    assert (report.missing, report.failed, report.replaced) == (1, 0, "")
    assert engine_for(None).errors() == []
    report = engine_for("other").index()
    assert (report.updated, report.replaced) == (1, "one")
    assert vectors_agree(engine_for(None), encoders["other"]) == (41, 1)


def test_what_is_gone_for_good_does_not_hold_it_up(engine_for, encoders, gallery, tmp_path):
    paint(tmp_path / "more/black.png", "black")
    engine_for("one").index([gallery, tmp_path / "more"])
    (tmp_path / "more/black.png").unlink()
    report = engine_for("other").index(prune=True)
    assert (report.removed, report.missing, report.replaced) == (1, 0, "one")


def test_a_damaged_file_holds_it_up_and_is_listed(engine_for, encoders, gallery, tmp_path):
    import os

    engine_for("one").index([gallery])
    bad = gallery / "red00.png"
    status = bad.stat()
    bad.write_bytes(b"\x89PNG damaged".ljust(status.st_size, b"!"))
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = engine_for("other").index()
    assert (report.missing, report.failed, report.replaced) == (1, 1, "")
    assert [failure.path for failure in engine_for(None).errors()] == [bad]
    engine_for(None).remove([bad])
    assert engine_for("other").index([gallery]).replaced == "one"


def test_a_file_that_was_moved_keeps_its_captions_and_its_place(engine_for, encoders, gallery):
    labels = LabelledSet("s", (LabelledImage("blue02.png", ("a quiet sea",)),))
    engine_for("one").index([gallery], captions=labels)
    (gallery / "blue02.png").rename(gallery / "sea.png")
    report = engine_for("other").index([gallery])
    assert (report.moved, report.removed, report.replaced) == (1, 0, "one")
    hits = engine_for(None).search("a quiet sea", to="caption", k=1)
    assert (hits[0].caption, hits[0].path.name) == ("a quiet sea", "sea.png")


def test_what_changes_and_comes_meanwhile_is_in_the_new_space(engine_for, encoders, gallery):
    engine_for("one").index([gallery])
    paint(gallery / "red00.png", "white")
    paint(gallery / "black.png", "black")
    report = engine_for("other").index()
    assert (report.updated, report.added, report.embedded_again) == (1, 1, 41)
    engine = engine_for(None)
    assert vectors_agree(engine, encoders["other"]) == (41, 1)
    assert found(engine, "white")[0] == "red00.png"


def test_giving_it_up_loses_nothing(engine_for, encoders, gallery, in_order):
    engine_for("one").index([gallery])
    paint(gallery / "black.png", "black")
    (gallery / "black.txt").write_text("a black hole\n")
    paint(gallery / "red00.png", "white")
    encoders["other"].breaks_after = 24
    with pytest.raises(Interrupted):
        engine_for("other", batch=4).index([gallery])
    engine = engine_for(None)
    assert vectors_agree(engine, encoders["one"]) == (41, 2)  # a move is no reason to wait
    assert engine.index([gallery]).model == "one"
    assert engine.status().pending == "other"  # a run that names no model leaves it as it is
    said = []
    engine = engine_for("one", notify=said.append)
    engine.index([gallery])
    engine.close()
    assert "other" in said[0]
    assert engine_for(None).status().pending == ""
    assert vectors_agree(engine_for(None), encoders["one"]) == (41, 2)


def test_a_third_model_takes_the_place_of_the_one_on_its_way(
    engine_for, encoders, gallery, in_order
):
    engine_for("one").index([gallery])
    encoders["other"].breaks_after = 8
    with pytest.raises(Interrupted):
        engine_for("other").index()
    report = engine_for("third").index()
    assert report.replaced == "one"
    assert engine_for(None).status().pending == ""
    assert vectors_agree(engine_for(None), encoders["third"]) == (40, 1)


def test_only_index_goes_over_to_another_model(engine_for, gallery, tmp_path):
    engine_for("one").index([gallery])
    engine_for("one").export_embeddings(tmp_path / "out")
    with pytest.raises(UsageError, match="another model"):
        engine_for("other").import_embeddings(tmp_path / "out")


def test_an_open_engine_follows_the_switch(engine_for, encoders, gallery):
    reader = engine_for(None)
    engine_for("one").index([gallery])
    assert all(name.startswith("blue") for name in found(reader))
    engine_for("other").index()
    assert all(name.startswith("blue") for name in found(reader))
    assert all(tower.space_id == 2 for tower in reader.store.views)


class Overtaken(FakeProvider):
    """Has another model take over while a search waits for its first encoder."""

    def __init__(self, switch, *encoders):
        super().__init__(*encoders)
        self.switch, self.given = switch, []

    def for_space(self, spec, device):
        self.given.append(spec.model)
        if len(self.given) == 1:
            self.switch()
        return super().for_space(spec, device)


def test_a_search_that_is_overtaken_by_the_switch_asks_again(
    engine_for, encoders, gallery, tmp_path
):
    engine_for("one").index([gallery])
    provider = Overtaken(lambda: engine_for("other").index(), *encoders.values())
    with Engine.open(tmp_path / "index", provider=provider) as reader:
        assert all(name.startswith("blue") for name in found(reader))
    assert provider.given == ["one", "other"]


def test_the_model_that_an_index_has_is_needed_only_for_what_is_new(engine_for, encoders, gallery):
    engine_for("one").index([gallery])
    del encoders["one"]
    assert engine_for("other").index([gallery]).replaced == "one"


@pytest.fixture
def patches(provider):
    """Models that have patches, by name."""
    return provider.with_patches


def test_patches_that_were_kept_are_made_before_the_switch(engine_for, gallery, patches):
    engine_for("one").index([gallery], patches=True)
    report = engine_for("other").index([gallery])
    assert (report.patches, report.replaced) == (40, "one")
    assert engine_for(None).status().patches == 40


def test_patches_are_dropped_where_the_new_model_has_none(engine_for, gallery, patches, tmp_path):
    engine_for("one").index([gallery], patches=True)
    patches.remove("other")
    with pytest.raises(UsageError, match="cannot be read"):
        engine_for("other").index([gallery], patches=True)
    said = []
    report = engine_for("other", notify=said.append).index([gallery])
    assert (report.patches, report.replaced) == (0, "one")
    assert "patches are no longer kept" in said[-1]
    assert engine_for(None).status().patches == 0


def test_a_dry_run_says_that_all_would_be_embedded(engine_for, gallery):
    engine_for("one").index([gallery])
    said = []
    engine = engine_for("third", notify=said.append)
    assert engine.index([gallery], dry_run=True).unchanged == 40
    assert "with 'third' too" in said[0]


def test_an_empty_index_just_takes_the_model(engine_for, encoders, gallery, tmp_path):
    (tmp_path / "empty").mkdir()
    engine_for("one").index([tmp_path / "empty"])
    report = engine_for("other").index([gallery])
    assert (report.added, report.embedded_again) == (40, 0)
    assert encoders["one"].images_encoded == 0
    assert engine_for(None).status().model == "other"


def test_a_model_that_is_lost_holds_up_no_switch_without_anything_new(
    engine_for, encoders, gallery
):
    engine_for("one").index([gallery])
    del encoders["one"]
    (gallery / "blue02.png").unlink()
    report = engine_for("other").index([gallery])
    assert (report.removed, report.replaced) == (1, "one")


def test_what_holds_a_switch_up_stays_listed_until_it_does_not(engine_for, encoders, gallery):
    import os

    engine_for("one").index([gallery])
    file = gallery / "red00.png"
    content, status = file.read_bytes(), file.stat()
    file.write_bytes(content[:40].ljust(len(content), b"!"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    engine_for("other").index()
    engine_for(None).index()
    assert [failure.path for failure in engine_for(None).errors()] == [file]
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert engine_for("other").index().replaced == "one"
    assert engine_for(None).errors() == []


def test_patches_go_on_in_the_own_space_while_a_switch_is_held_up(
    engine_for, gallery, patches, tmp_path
):
    paint(tmp_path / "more/black.png", "black")
    engine_for("one").index([gallery, tmp_path / "more"], patches=True)
    (tmp_path / "more").rename(tmp_path / "elsewhere")
    paint(gallery / "white.png", "white")
    report = engine_for("other").index([gallery])
    assert (report.missing, report.patches) == (1, 1)
    assert engine_for(None).status().patches == 42
    engine_for("other").index([gallery], patches=False)
    assert engine_for(None).status().patches == 0

"""The program as a user runs it: output, exit codes, what goes where."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from fakes import paint
from typer.testing import CliRunner

from mmsearch.cli.app import app
from mmsearch.datasets import scene_art, scenes
from mmsearch.encoders.registry import BUNDLED, KNOWN, TINY


def mmsearch(*arguments, cwd=None, check=None, **environment):
    """Runs the program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "mmsearch", *map(str, arguments)],
        capture_output=True, cwd=cwd, env={**os.environ, **environment}, timeout=300, check=False,
    )  # fmt: skip
    if check is not None:
        assert done.returncode == check, done.stderr.decode()
    return done


def run(*arguments, code=0, recipe=None):
    """Runs a command within this process, which spares the imports; a recipe is for training."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], obj=recipe)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, tiny):
    """Twenty drawn scenes with captions beside them."""
    folder = tmp_path_factory.mktemp("gallery")
    for number, scene in enumerate(scenes.gallery(20, seed=400)):
        scene_art.render(scene).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("\n".join(scenes.captions(scene)))
    return folder


@pytest.fixture(scope="module")
def index(gallery, tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexes") / "index"
    run("index", gallery, "--index", folder, "--model", "tiny")
    return folder


@pytest.fixture(scope="module")
def untrained(gallery, tmp_path_factory):
    """An index of the same scenes by a model without trained networks: almost `tiny`."""
    top = tmp_path_factory.mktemp("untrained")
    shutil.copytree(BUNDLED / "tiny", top / "model")
    config = top / "model/open_clip_config.json"
    how = json.loads(config.read_text())
    how["preprocess_cfg"]["mean"][0] += 0.01  # another space
    config.write_text(json.dumps(how))
    run("index", gallery, "--index", top / "index", "--model", f"local-dir:{top / 'model'}")
    return top / "index"


def test_training_without_what_it_needs_is_one_line_each(tmp_path):
    for arguments, code, message in (
        (("train", "align", "--out", "x"), 2, "give a DATASET"),
        (("train", "align", tmp_path, "--out", "x"), 2, "no captions there"),
        (("train", "align", tmp_path), 2, "--out NAME"),
        (("train", "clip", tmp_path / "no.toml", "--out", "x"), 2, "cannot be read"),
    ):
        told = run(*arguments, code=code).stderr
        assert message in told
        assert len(told.strip().splitlines()) == 1


def test_indexing_reports_on_stdout(gallery, tmp_path):
    done = mmsearch("index", gallery, "--index", tmp_path / "i", "--model", "tiny", check=0)
    assert b"20 added" in done.stdout
    assert done.stderr == b""


def test_indexing_reports_in_json(gallery, tmp_path):
    result = run("index", gallery, "--index", tmp_path / "i", "--model", "tiny", "--json")
    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    assert {
        "added", "updated", "unchanged", "moved", "removed", "failed", "captions", "seconds",
        "images_per_second", "stages", "model", "precision",
    } <= set(report)  # fmt: skip
    assert {"scan", "decode", "encode", "write", "load"} <= set(report["stages"])
    assert (report["added"], report["model"]) == (20, "tiny")
    assert report["images_per_second"] > 0


def test_a_search_is_a_table(index):
    text = scenes.captions(scenes.gallery(1, seed=400)[0])[0]
    lines = run("search", text, "--index", index)
    head, first, *_ = lines.stdout.splitlines()
    assert head.split() == ["rank", "score", "image", "caption", "words", "path"]
    assert first.endswith("00.png")
    lines = run("search", text, "--index", index, "--fusion", "image")
    assert lines.stdout.splitlines()[0].split() == ["rank", "score", "path"]


@pytest.mark.slow
def test_fusions_are_measured_against_each_other(index):
    before = run("status", "--index", index, "--json").stdout
    told = run("bench", "--index", index, "--fusion", "image", "--fusion", "sum")
    summary, head, first, second, *_ = told.stdout.splitlines()
    assert "20 held-out captions ask for 20 images" in summary
    assert head.split()[:2] == ["setting", "R@1"]
    assert (first.split()[0], second.split()[0]) == ("image", "sum")
    found = json.loads(
        run("bench", "--index", index, "--fusion", "words", "--hold-out", 2, "--json").stdout
    )
    assert found["rows"][0]["queries"] == 40
    assert run("status", "--index", index, "--json").stdout == before
    for arguments, message in (
        (("--fusion", "auto"), "one of the others"),
        (("--fusion", "mean"), "--fusion is one of auto, image"),
        (("--fusion", "trained"), "train fusion"),
        (("--fusion", "sum", "--html", "x"), "do not go with --fusion"),
    ):
        assert message in run("bench", "--index", index, *arguments, code=2).stderr


@pytest.mark.slow
def test_fusion_is_trained_for_an_index(index, tmp_path):
    own = tmp_path / "index"
    shutil.copytree(index, own)
    told = run("train", "fusion", "--index", own, "--keep").stdout
    assert "trained on 10 held-out captions, measured on 10 of other images" in told
    assert "weights: image 0." in told
    hit = json.loads(run("search", "a red circle", "--index", own, "-k", 1, "--json").stdout)
    learned = run(
        "search", "a red circle", "--index", own, "-k", 1, "--json", "--fusion", "trained"
    )
    assert json.loads(learned.stdout) == hit
    equal = run("search", "a red circle", "--index", own, "-k", 1, "--json", "--fusion", "sum")
    assert json.loads(equal.stdout)["score"] != hit["score"]
    again = json.loads(run("train", "fusion", "--index", own, "--keep", "--json").stdout)
    assert again["kept"]
    assert sum(again["weights"].values()) == pytest.approx(1)
    run("train", "fusion", "--index", tmp_path / "none", code=3)
    assert "go with a DATASET" in run("train", "fusion", "--split", "x", code=2).stderr


@pytest.mark.slow
def test_a_change_is_learned_and_composed_with_a_picture(untrained, gallery, tmp_path):
    from mmsearch.training.compose import Recipe

    recipe = Recipe(trained_on=300, measured_on=60, steps=60)
    own = tmp_path / "index"
    shutil.copytree(untrained, own)
    ask = ("search", "but in blue", "--image", gallery / "00.png", "--index", own, "--json")
    added = run(*ask, "--compose", "sum").stdout
    told = run("train", "compose", "--index", own, recipe=recipe).stdout
    assert "all drawn scenes  60 " in told
    assert "not kept" in told  # so few steps teach next to nothing
    assert "train compose" in run(*ask, "--compose", "early", code=2).stderr
    told = run("train", "compose", "--index", own, "--keep", recipe=recipe).stdout
    assert f"kept in {own}: --compose early uses it" in told
    assert "without captioned photos" in told
    early = run(*ask, "--compose", "early").stdout
    assert early != added
    assert run(*ask).stdout == added  # no photo has shown that it may be used unasked
    weighted = ("search", "--and", "2:blue", "--image", gallery / "00.png", "--index", own)
    run(*weighted)  # as a sum, as ever
    for arguments, message in (
        ((*weighted, "--compose", "early"), "one --image and one text"),
        (("search", "blue", "--index", own, "--compose", "early"), "one --image and one text"),
        ((*ask, "--compose", "soon"), "--compose is one of auto, early, sum"),
        (("train", "compose", "--images", gallery, "--index", own), "goes with a DATASET"),
    ):
        assert message in run(*arguments, code=2).stderr
    run("train", "compose", "--index", tmp_path / "none", code=3)


@pytest.mark.slow
def test_a_change_is_learned_from_captioned_photos_too(index, tmp_path):
    from mmsearch.training.compose import Recipe

    lenient, strict = (Recipe(300, 60, steps=60, margin=points) for points in (100, -100))
    own, photos = tmp_path / "index", tmp_path / "photos"
    shutil.copytree(index, own)
    photos.mkdir()
    for number, scene in enumerate(scenes.gallery(100, seed=900)):
        scene_art.render(scene).save(photos / f"{number:03}.png")
        (photos / f"{number:03}.txt").write_text("\n".join(scenes.captions(scene)[:2]))
    train = ("train", "compose", photos, "--index", own, "--keep")
    learned = json.loads(run(*train, "--json", recipe=lenient).stdout)
    assert (learned["kept"], learned["auto"]) == (True, True)
    last = learned["measured"][-1]
    assert last["kind"] == "all photos"
    assert 15 < last["queries"] <= 20  # the captions of ten; those of some scenes are equal
    ask = ("search", "but in blue", "--image", photos / "000.png", "--index", own, "--json")
    assert run(*ask).stdout == run(*ask, "--compose", "early").stdout
    assert run(*ask).stdout != run(*ask, "--compose", "sum").stdout
    told = run(*train, recipe=strict).stdout
    assert "all photos" in told
    assert "not used unasked" in told
    assert run(*ask).stdout == run(*ask, "--compose", "sum").stdout


@pytest.mark.slow
def test_patches_are_kept_and_dropped(gallery, tmp_path):
    own, photos = tmp_path / "index", tmp_path / "photos"
    shutil.copytree(gallery, photos)
    told = run("index", photos, "--index", own, "--model", "tiny", "--patches").stdout
    assert "patches of 20 images kept" in told
    assert "patches   of 20 images" in run("status", "--index", own).stdout
    (photos / "00.png").rename(photos / "moved.png")
    paint(photos / "new.png", "red")
    report = json.loads(run("index", "--index", own, "--json").stdout)
    assert (report["added"], report["moved"], report["patches"]) == (1, 1, 1)
    assert report["stages"]["patches"] > 0
    assert "patches of" not in run("index", "--index", own).stdout
    run("index", "--index", own, "--no-patches")
    assert "patches   of" not in run("status", "--index", own).stdout
    assert json.loads(run("index", "--index", own, "--json").stdout)["patches"] == 0


@pytest.mark.slow
def test_ranking_again_is_learned_searched_with_and_measured(gallery, untrained, tmp_path):
    from mmsearch.training.rerank import Recipe

    recipe = Recipe(epochs=1, batch=16, alike=2, views=1)
    own, photos = tmp_path / "index", tmp_path / "photos"
    shutil.copytree(untrained, own)
    photos.mkdir()
    for number, scene in enumerate(scenes.gallery(100, seed=900)):
        scene_art.render(scene).save(photos / f"{number:03}.png")
        (photos / f"{number:03}.txt").write_text("\n".join(scenes.captions(scene)[:2]))
    ask = ("search", "a red circle", "--index", own, "-k", 3)
    assert "train rerank" in run(*ask, "--rerank", 5, code=2).stderr
    train = ("train", "rerank", photos, "--index", own, "--kind", "attention")
    told = run(*train, recipe=recipe).stdout
    assert " captions of photos that were not trained on" in told
    for part in ("first", "test-time augmentation", "hubness", "match"):
        assert f"\n{part} " in told
    found = json.loads(run(*train, "--keep", "--json", recipe=recipe).stdout)
    assert found["kept"]
    assert found["kind"] == "attention"
    assert [set(row) for row in found["recalls"].values()] == [{"R@1", "R@5", "R@10"}] * 4
    lines = run(*ask, "--rerank", 5).stdout.splitlines()
    assert lines[0].split() == ["rank", "score", "image", "rerank", "caption", "words", "path"]
    assert len(lines) == 4
    assert run(*ask, "--rerank", 0).stdout == run(*ask).stdout
    told = run("bench", "--index", own, "--rerank", 5).stdout
    assert "held-out captions ask for 20 images with 0 captions" in told
    assert [line.split("  ")[0] for line in told.splitlines()[2:4]] == ["image", "image, rerank 5"]
    some = ("bench", photos, "--index", own, "--limit", 12, "--fusion", "sum", "--rerank", 5)
    rows = json.loads(run(*some, "--json").stdout)["rows"]
    assert [(row["fusion"], row["rerank"]) for row in rows] == [("sum", 0), ("sum", 5)]
    for arguments, message in (
        ((*ask, "--rerank", 5, "--to", "caption"), "texts that look for images"),
        ((*ask, "--rerank", 5, "--image", gallery / "00.png"), "texts that look for images"),
        ((*train, "--kind", "magic"), "--kind is one of interaction, attention"),
        (("bench", "--index", own, "--rerank", 5, "--html", "x"), "do not go with"),
    ):
        assert message in run(*arguments, code=2).stderr
    run("train", "rerank", photos, "--index", tmp_path / "none", code=3)


def test_unquoted_words_are_one_text(index):
    quoted = run("search", "a red circle", "--index", index, "--json").stdout
    assert run("search", "a", "red", "circle", "--index", index, "--json").stdout == quoted


def test_json_is_a_line_a_hit(index, gallery):
    result = run("search", "a", "face", "--index", index, "-k", 3, "--json")
    hits = [json.loads(line) for line in result.stdout.splitlines()]
    assert [set(hit) for hit in hits] == [
        {"rank", "score", "path", "modality", "caption", "media_id", "scores"}
    ] * 3
    assert Path(hits[0]["path"]).parent == gallery
    assert (hits[0]["modality"], hits[0]["caption"]) == ("image", None)


def test_an_example_finds_itself_then_captions(index, gallery):
    example = gallery / "03.png"
    (line,) = run("search", "--image", example, "--index", index, "-k", 1, "--paths").stdout.split()
    assert line == str(example)
    found = run("search", "--image", example, "--index", index, "--to", "caption", "--json").stdout
    own = (gallery / "03.txt").read_text().splitlines()
    assert json.loads(found.splitlines()[0])["caption"] in own


def test_weights_and_literal_texts(index):
    plain = run("search", "9 photo", "--index", index, "--json").stdout
    weighted = run("search", "16:9 photo", "--index", index, "--json")
    assert weighted.stdout == plain
    assert "--literal" in weighted.stderr
    literal = run("search", "16:9 photo", "--literal", "--index", index, "--json")
    assert literal.stdout != plain
    both = run("search", "--and", "2:a face", "--and", "0.5:a star", "--not", "glasses",
               "--index", index, "--json").stdout  # fmt: skip
    assert len(both.splitlines()) == 10


@pytest.mark.parametrize("end", ["--paths", "-0"])
def test_paths_alone_are_pipe_safe(index, end):
    done = mmsearch("search", "a face", "--index", index, "-k", 2, end, check=0)
    paths = done.stdout.split(b"\0" if end == "-0" else b"\n")
    assert paths.pop() == b""
    assert all(os.path.isfile(path) for path in paths)
    assert len(paths) == 2


def test_a_reader_that_stops_reading_is_no_error(index):
    command = [sys.executable, "-m", "mmsearch", "search", "a", "--index", str(index), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait()


def test_dates_and_folders_limit_a_search(index, gallery):
    def count(*limits):
        return len(
            run("search", "a", "--index", index, "-k", 99, "--paths", *limits).stdout.split()
        )

    assert count() == count("--after", "2001") == count("--under", gallery) == 20
    assert count("--before", "2001-05") == count("--under", gallery / "none") == 0
    assert count("--min-score", "2") == 0


def test_a_page_of_thumbnails(index, tmp_path):
    run("search", "a face", "--index", index, "-k", 4, "--html", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg;base64,") == 4


def test_a_page_never_takes_the_place_of_a_photo(index, tmp_path):
    photo = paint(tmp_path / "photo.png", "red")
    before = photo.read_bytes()
    for command in (["search", "x"], ["bench"]):
        result = run(*command, "--index", index, "--html", photo, code=2)
        assert "a page is called .html" in result.stderr
    assert photo.read_bytes() == before


def test_names_cannot_write_to_the_terminal(tmp_path, tiny):
    folder = tmp_path / "evil"
    paint(folder / "a.png", "red")
    (folder / "a.png").rename(folder / "\x1b[31mred\u202egnp.png")
    run("index", folder, "--index", tmp_path / "i", "--model", "tiny")
    shown = run("search", "red", "--index", tmp_path / "i").stdout
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "\\x1b[31mred\\u202egnp.png" in shown


def test_strict_says_that_files_failed(tmp_path, tiny):
    folder = tmp_path / "some"
    paint(folder / "a.png", "red")
    (folder / "bad.png").write_bytes(b"no")
    where = ("--index", tmp_path / "i", "--model", "tiny")
    assert "mmsearch errors" in run("index", folder, *where).stderr
    run("index", folder, *where, "--strict", code=1)
    listed = run("errors", "--index", tmp_path / "i").stdout
    assert listed.startswith(str(folder / "bad.png") + "\tnot an image")


def test_a_dry_run_changes_nothing(gallery, tmp_path, tiny):
    where = ("--index", tmp_path / "i", "--model", "tiny")
    assert "would do: 20 added" in run("index", gallery, *where, "--dry-run").stdout
    assert not (tmp_path / "i").exists()
    run("index", gallery, *where)
    assert "20 unchanged" in run("index", gallery, *where, "--dry-run").stdout


def test_a_dry_run_tells_moves_from_removals(tmp_path, tiny):
    folder = tmp_path / "p"
    for number in range(4):
        paint(folder / f"{number}.png", "red", mark=number + 1)
    where = ("--index", tmp_path / "i", "--model", "tiny")
    run("index", folder, *where)
    (folder / "0.png").rename(folder / "moved.png")
    (folder / "1.png").unlink()
    told = run("index", folder, *where, "--dry-run").stdout
    assert "0 added, 0 updated, 2 unchanged, 1 moved, 1 removed" in told
    done = run("index", folder, *where).stdout
    assert "0 added, 0 updated, 2 unchanged, 1 moved, 1 removed" in done


@pytest.mark.slow
def test_exclusions_are_shown_and_can_be_ended(gallery, tmp_path, tiny):
    where = ("--index", tmp_path / "i", "--model", "tiny")
    assert "10 added" in run("index", gallery, *where, "--exclude", "0*").stdout
    assert "(without 0*)" in run("status", *where[:2]).stdout
    assert "10 added" in run("index", gallery, *where, "--exclude", "").stdout
    assert "without" not in run("status", *where[:2]).stdout


def test_why_nothing_was_found_is_said(index, gallery, tmp_path, tiny):
    nothing = run("search", "x", "--under", "/nowhere", "--index", index)
    assert "--under" in nothing.stderr
    plain = tmp_path / "plain"
    paint(plain / "a.png", "red")
    run("index", plain, "--index", tmp_path / "i", "--model", "tiny")
    result = run("search", "x", "--to", "caption", "--index", tmp_path / "i")
    assert "no captions" in result.stderr


@pytest.mark.parametrize("arguments", [["index", "/no/such"], ["import", "GALLERY"]])
def test_a_command_that_fails_leaves_no_index_behind(arguments, gallery, tmp_path, tiny):
    names = {"GALLERY": gallery}
    run(*(names.get(a, a) for a in arguments), "--index", tmp_path / "i", "--model", "tiny", code=2)
    assert not (tmp_path / "i").exists()


def test_output_that_cannot_be_written_is_one_line(index):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mmsearch", "search", "x", "--index", str(index)],
            stdout=full, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr.decode().splitlines() == [
        "mmsearch: output cannot be written: No space left on device"
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["search", "x", "--index", "NONE"], 3, "no index there"),
        (["status", "--index", "NONE"], 3, "no index there"),
        (["index", "--index", "NONE"], 3, "no index there"),
        (["index", "/no/such/folder", "--index", "NONE", "--model", "tiny"], 2, "no such file"),
        (["index", "GALLERY", "--index", "NONE", "--model", "nonsense"], 2, "unknown model"),
        (["index", "GALLERY", "--index", "NONE", "--model", "base"], 3, "cannot be reached"),
        (["index", "GALLERY", "--index", "NONE", "--model", "X:/no.pt"], 3, "no such weights"),
        (["index", "GALLERY", "--index", "GALLERY", "--model", "tiny"], 2, "not empty"),
        (["index", "GALLERY", "--model", "base", "--index", "INDEX"], 3, "cannot be reached"),
        (["search", "--index", "INDEX"], 2, "nothing to search for"),
        (["search", "x", "--to", "video", "--index", "INDEX"], 2, "--to is one of image, caption"),
        (["search", "x", "--after", "soon", "--index", "INDEX"], 2, "is no date"),
        (["search", "x", "--json", "--paths", "--index", "INDEX"], 2, "exclude each other"),
        (["search", "--image", "/no.png", "--index", "INDEX"], 2, "no such image"),
        (["search", "x", "-k", "0", "--index", "INDEX"], 2, "k is a whole number"),
        (["remove", "/no/such", "--index", "INDEX"], 2, "nothing in the index"),
        (["bench", "/no/such.json", "--model", "tiny"], 2, "cannot be read"),
        (["bench", "--split", "test", "--index", "INDEX"], 2, "go with a DATASET"),
        (["import", "GALLERY", "--index", "INDEX"], 2, "no img_emb"),
        (["export", "GALLERY", "--index", "INDEX"], 2, "not an empty folder"),
        (["search", "x", "--precision", "int3", "--index", "INDEX"], 2, "precision is one of"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, code, says, index, gallery, tmp_path):
    names = {"NONE": tmp_path / "none", "INDEX": index, "GALLERY": gallery}
    result = run(*(names.get(argument, argument) for argument in arguments), code=code)
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_wrong_options_are_usage():
    assert mmsearch("search", "--nonsense").returncode == 2
    assert mmsearch("nonsense").returncode == 2


def test_the_default_model_is_for_new_indexes_only(index, gallery):
    mmsearch("index", gallery, "--index", index, MMSEARCH_MODEL="base", check=0)


@pytest.mark.slow
def test_an_index_in_use_is_said_so(index, gallery):
    from mmsearch.store.store import Store

    with Store(index).writer():
        result = run("index", gallery, "--index", index, code=4)
        assert "another process is writing" in result.stderr
        run("search", "x", "--index", index)


def test_a_damaged_catalog_is_said_so(index, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(index, broken)
    path = broken / "catalog.sqlite3"
    content = bytearray(path.read_bytes())
    content[100 : len(content)] = bytes(len(content) - 100)
    path.write_bytes(content)
    run("search", "x", "--index", broken, code=5)


def test_damage_is_found_and_repaired(index, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(index, broken)
    run("compact", "--index", broken)
    sound = json.loads(run("verify", "--deep", "--json", "--index", broken).stdout)
    assert (sound["sound"], sound["images"], sound["deep"]) == (True, 20, True)
    assert run("verify", "--index", broken).stdout.startswith("no damage in structure: 20 images")
    (path,) = (broken / "vectors").glob("*-image-*.faiss")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    run("verify", "--index", broken)  # which looks at no checksum
    told = run("verify", "--deep", "--index", broken, code=5)
    assert told.stdout == f"{path.name}: not what was written\n"
    assert "damage found (1); 'mmsearch repair'" in told.stderr
    assert "mmsearch repair" in run("search", "a cat", "--index", broken, code=5).stderr
    done = run("repair", "--index", broken).stdout
    assert "found: " in done
    assert "sound: 20 images" in done
    run("verify", "--deep", "--index", broken)
    again = json.loads(run("repair", "--json", "--index", broken).stdout)
    assert (again["found"], again["lost"], again["sound"]) == ([], [], True)
    run("verify", "--index", tmp_path / "none", code=3)
    run("repair", "--index", tmp_path / "none", code=3)


def test_a_backup_is_an_index_elsewhere(index, gallery, tmp_path):
    (tmp_path / "moved").symlink_to(gallery)
    file = tmp_path / "photos.backup"
    assert "MB written to" in run("backup", file, "--index", index).stdout
    assert "name a new file" in run("backup", file, "--index", index, code=2).stderr
    there = ("--index", tmp_path / "there")
    moved = ("--root", f"{gallery}={tmp_path / 'moved'}")
    assert "no indexed folder" in run("restore", file, "--root", "/a=/b", *there, code=2).stderr
    assert "OLD=NEW" in run("restore", file, "--root", "/a", *there, code=2).stderr
    assert "20 images" in run("restore", file, *moved, *there).stdout
    assert "already" in run("restore", file, *there, code=2).stderr
    run("verify", "--deep", *there)
    first = run("search", "a cat", "-k", "1", "--index", index).stdout
    second = run("search", "a cat", "-k", "1", *there).stdout
    assert Path(first.split()[-1]).name == Path(second.split()[-1]).name
    report = json.loads(run("index", "--json", *there).stdout)
    assert (report["unchanged"], report["added"]) == (20, 0)


def test_no_url_is_fetched(index):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.3)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cat.jpg"
        assert (
            "no such image file" in run("search", "--image", url, "--index", index, code=2).stderr
        )
        run("index", url, "--index", index, code=2)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.slow
def test_failures_are_tried_again(gallery, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(gallery, folder)
    bad = folder / "bad.png"
    bad.write_bytes(b"not an image")
    where = ("--index", tmp_path / "i")
    run("index", folder, "--model", "tiny", *where)
    good, stamp = (folder / "00.png").read_bytes(), bad.stat()
    bad.write_bytes(good)
    os.truncate(bad, stamp.st_size)  # as damaged as before, and just as long
    os.utime(bad, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert "bad.png" in run("errors", *where).stdout
    again = run("errors", "--retry", *where)
    assert "0 added" in again.stderr
    assert "1 failed" in again.stderr
    bad.unlink()
    assert "no file has failed" in run("errors", "--retry", *where).stderr


@pytest.mark.slow
def test_auto_takes_tiny_without_a_network_and_says_what_base_would_give(gallery, tmp_path):
    done = mmsearch(
        "index", gallery, "--index", tmp_path / "i", "--yes", check=0,
        HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    assert b"cannot be reached" in done.stderr
    assert b"'tiny'" in done.stderr
    assert b"20 added" in done.stdout


def test_a_search_imports_neither_torch_nor_open_clip(index):
    code = (
        "import os, sys\n"
        "os._exit = sys.exit\n"  # to see what was imported by then
        "from mmsearch.cli import main\n"
        f"sys.argv = ['mmsearch', 'search', 'a', 'face', '--index', {str(index)!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print('LOADED', sorted(loaded & {'torch', 'open_clip', 'sqlalchemy', 'PIL', 'tqdm'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert done.stdout.count(".png") == 10


def test_help_imports_nothing_heavy():
    code = (
        "import os, sys\nfrom mmsearch.cli import main\nsys.argv = ['mmsearch', '--help']\n"
        "os._exit = sys.exit\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'faiss', 'sqlalchemy', 'PIL', 'openvino'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_the_index_is_found_where_it_is_expected(gallery, tmp_path):
    (tmp_path / "index").mkdir()  # a stray folder of that name is not ours
    elsewhere = tmp_path / "elsewhere"
    done = mmsearch("index", gallery, "--model", "tiny", cwd=tmp_path, MMSEARCH_HOME=str(elsewhere),
                    check=0)  # fmt: skip
    assert done.returncode == 0
    assert (elsewhere / "index" / "catalog.sqlite3").is_file()
    shutil.copy(REPOSITORY / "index" / "mmsearch-index.json", tmp_path / "index")
    assert mmsearch("search", "x", cwd=tmp_path, MMSEARCH_HOME=str(elsewhere)).returncode == 3
    mmsearch("index", gallery, "--model", "tiny", cwd=tmp_path, check=0)
    assert (tmp_path / "index" / "catalog.sqlite3").is_file()
    other = tmp_path / "other"
    mmsearch("index", gallery, "--model", "tiny", cwd=tmp_path, MMSEARCH_INDEX=str(other), check=0)
    assert (other / "catalog.sqlite3").is_file()


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_done_and_says_so(tmp_path, tiny, hanging):
    folder = tmp_path / "many"
    for number in range(300):
        paint(folder / f"{number:03}.png", "red", mark=number + 1)
    (folder / "290.png").write_bytes(b"hang")  # so that it is not over before the interrupt
    command = [sys.executable, "-m", "mmsearch", "index", str(folder), "--index",
               str(tmp_path / "i"), "--model", "tiny"]  # fmt: skip
    # A shell's background jobs ignore Ctrl-C, and so does what they start: these tests may be one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, **hanging.environment})  # fmt: skip
    hanging.wait()  # which is only read when most of what comes before is committed
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"everything committed so far is kept" in errors
    kept = json.loads(run("status", "--index", tmp_path / "i", "--json").stdout)["images"]
    assert 64 <= kept < 300


@pytest.mark.slow
def test_an_interrupt_of_a_training_waits_for_no_decoder(tmp_path, tiny, hanging):
    for number in range(8):
        paint(tmp_path / "p" / f"{number}.png", "red", mark=number + 1)
        (tmp_path / "p" / f"{number}.txt").write_text(f"picture {number}")
    (tmp_path / "p" / "7.png").write_bytes(b"hang")
    command = [sys.executable, "-m", "mmsearch", "train", "align", str(tmp_path / "p"), "--base",
               "tiny", "--out", str(tmp_path / "m")]  # fmt: skip
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, **hanging.environment})  # fmt: skip
    hanging.wait()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)  # of the 60 that the decoder had left
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors


def test_status_and_models(index, gallery):
    text = run("status", "--index", index).stdout
    assert "20" in text
    assert str(gallery) in text
    listed = [
        json.loads(line) for line in run("models", "--index", index, "--json").stdout.splitlines()
    ]
    by_name = {row["name"]: row for row in listed}
    assert by_name["tiny"]["cached"]
    assert by_name["tiny"]["dim"] == KNOWN[TINY].dim
    assert by_name["tiny"]["indexed"] == str(index)
    assert "research only" in by_name["tiny"]["licence"]
    base = by_name["hf-hub:immich-app/ViT-B-32__laion2b-s34b-b79k (base)"]
    assert (base["cached"], base["licence"]) == (False, "MIT")


def test_models_that_can_be_fetched_are_listed_with_their_figures():
    text = run("models", "--available")
    assert "Crossmodal-3600" in text.stderr
    (found,) = (line.split() for line in text.stdout.splitlines() if "(base-multi" in line)
    assert found[:6] == ["73.2", "84.4", "62.6", "27.1", "1541", "3061"]
    assert "(base)" in text.stdout
    listed = run("models", "--available", "--json").stdout.splitlines()
    assert len(listed) == len(text.stdout.splitlines()) - 1
    rows = [json.loads(line) for line in listed]
    assert all(row["megabytes"] and row["licence"] and row["languages"] for row in rows)


def test_removing_takes_out_of_the_index_and_leaves_the_disk(gallery, tmp_path, tiny):
    where = ("--index", tmp_path / "i")
    run("index", gallery, *where, "--model", "tiny")
    assert run("remove", gallery / "03.png", *where).stdout == "1 removed\n"
    assert (gallery / "03.png").is_file()
    assert run("remove", gallery, *where).stdout == "19 removed\n"
    assert "20 added" not in run("index", *where).stdout


def test_benchmark_of_a_labelled_set_reproduces_from_its_export(gallery, tmp_path, tiny):
    rows = [f'{p.with_suffix(".png").name},"{line}"' for p in sorted(gallery.glob("*.txt"))
            for line in p.read_text().splitlines()]  # fmt: skip
    labels = tmp_path / "labels.csv"
    labels.write_text("image,caption\n" + "\n".join(rows) + "\nmissing.png,nothing\n")
    result = run("bench", labels, "--images", gallery, "--model", "tiny", "--json",
                 "--export", tmp_path / "out")  # fmt: skip
    report = json.loads(result.stdout)
    assert (report["images"], report["captions"], report["missing"]) == (20, 60, 1)
    assert "missing.png" in result.stderr
    image, text = (np.load(tmp_path / "out" / f"{name}.npy") for name in ("image", "text"))
    lines = (tmp_path / "out" / "captions.jsonl").read_text().splitlines()
    owner = [json.loads(line)["image_row"] for line in lines]
    scores = text @ image.T
    own = scores[np.arange(len(text)), owner][:, None]
    ranks = 1 + ((scores > own - 1e-6).sum(1) - 1)
    assert report["t2i"]["R@1"] == pytest.approx(100 * np.mean(ranks <= 1), abs=1e-3)
    assert report["t2i"]["index_loss"]["R@10"] == 0


def test_benchmark_by_judgments(gallery, tmp_path, tiny):
    qrels = tmp_path / "qrels"
    qrels.write_text("00.png#0 0 01.png 2\n00.png#0 0 gone.png 1\n")
    found = json.loads(run("bench", gallery, "--qrels", qrels, "--json").stdout)["t2i_judged"]
    assert (found["queries"], found["unknown_pairs"]) == (1, 1)
    assert found["R@10"] >= found["own_picture_only"]["R@10"]
    assert "nDCG@10" in run("bench", gallery, "--qrels", qrels).stdout
    assert "go with a DATASET" in run("bench", "--qrels", qrels, code=2).stderr
    (tmp_path / "bad").write_text("one two\n")
    refused = run("bench", gallery, "--qrels", tmp_path / "bad", code=2)
    assert "line 1 is not" in refused.stderr


def test_pictures_of_the_index_are_classified(index, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("a face\na vehicle\nan animal\n")
    lines = run("classify", "--labels", labels, "--index", index).stdout.splitlines()
    assert len(lines) == 20
    assert {line.split("\t")[1] for line in lines} <= {"a face", "a vehicle", "an animal"}
    command = ("classify", "--labels", labels, "--index", index, "--json")
    many, one = (json.loads(run(*command, *more).stdout)["pictures"]
                 for more in ((), ("--template", "{}!")))  # fmt: skip
    assert [picture["path"] for picture in many] == [picture["path"] for picture in one]
    assert many != one
    refused = run("classify", "--labels", labels, "--index", index, "--model", "tiny", code=2)
    assert "--model goes with a FOLDER" in refused.stderr
    labels.write_text("one\n")
    assert "at least two" in run("classify", "--labels", labels, code=2).stderr


def test_benchmark_of_the_index_itself(index):
    report = json.loads(run("bench", "--index", index, "--json").stdout)
    assert (report["images"], report["captions"]) == (20, 60)
    assert report["t2i"]["R@10"] > 90


@pytest.mark.slow
def test_export_and_import_give_the_same_hits(index, gallery, tmp_path):
    run("export", tmp_path / "out", "--index", index)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "img_emb", "text_emb", "metadata",
    }  # fmt: skip
    images = np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy")
    texts = np.load(tmp_path / "out" / "text_emb" / "text_emb_0.npy")
    assert images.shape == texts.shape == (60, KNOWN[TINY].dim)
    other = ("--index", tmp_path / "again")
    # Without --model: a new index takes the one that the export names.
    assert run("import", tmp_path / "out", *other).stdout == "20 images imported\n"
    for to in ("image", "caption"):
        query = ("search", "a", "happy", "face", "--to", to, "-k", 5, "--paths")
        assert run(*query, *other).stdout == run(*query, "--index", index).stdout
    assert run("import", tmp_path / "out", *other).stdout == "0 images imported\n"
    assert "20 unchanged" in run("index", gallery, *other).stdout


@pytest.mark.slow
def test_an_import_into_the_same_index_adds_nothing(gallery, tmp_path, tiny):
    where = ("--index", tmp_path / "i")
    for part in ("a", "b"):
        (tmp_path / "x" / part).mkdir(parents=True)
        shutil.copy(gallery / "01.png", tmp_path / "x" / part / "1.png")
        (tmp_path / "x" / part / "1.txt").write_text(f"it lies in {part}")
    run("index", tmp_path / "x" / "a", tmp_path / "x" / "b", *where, "--model", "tiny")
    run("export", tmp_path / "out", *where)
    assert run("import", tmp_path / "out", *where).stdout == "0 images imported\n"
    assert "2 unchanged" in run("index", tmp_path / "x", *where).stdout
    fresh = ("--index", tmp_path / "fresh")
    assert run("import", tmp_path / "out", *fresh).stdout == "2 images imported\n"
    assert "1 unchanged" in run("index", tmp_path / "x" / "a", *fresh).stdout
    assert "2 unchanged" in run("index", tmp_path / "x", *fresh).stdout
    held = json.loads(run("status", *fresh, "--json").stdout)
    assert (held["images"], held["captions"]) == (2, 2)


def test_a_file_that_an_import_brought_is_not_taken_in_twice(gallery, tmp_path, tiny):
    for part in ("a", "b"):
        (tmp_path / "x" / part).mkdir(parents=True)
        shutil.copy(gallery / "01.png", tmp_path / "x" / part / "1.png")
    run("index", tmp_path / "x", "--index", tmp_path / "i", "--model", "tiny")
    run("export", tmp_path / "out", "--index", tmp_path / "i")
    where = ("--index", tmp_path / "j")
    run("import", tmp_path / "out", *where)
    assert "1 unchanged" in run("index", tmp_path / "x" / "a" / "1.png", *where).stdout
    assert json.loads(run("status", *where, "--json").stdout)["images"] == 2


@pytest.mark.slow
def test_names_that_are_not_text_go_everywhere(gallery, tmp_path, tiny):
    folder = tmp_path / "odd"
    folder.mkdir()
    name = os.path.join(os.fsencode(folder), b"caf\xe9.png")
    shutil.copy(gallery / "02.png", name)
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("a cafe")
    where = ("--index", tmp_path / "i")
    run("index", folder, *where, "--model", "tiny")
    run("export", tmp_path / "out", *where)
    assert run("import", tmp_path / "out", "--index", tmp_path / "j").stdout.startswith("1 ")
    found = mmsearch("search", "x", "--index", tmp_path / "j", "--paths", check=0).stdout
    assert found == name + b"\n"
    run("bench", *where, "--export", tmp_path / "vectors")
    latin = mmsearch("search", "x", *where, check=0, PYTHONIOENCODING="latin-1")
    assert b"caf" in latin.stdout


def test_a_bad_file_elsewhere_does_not_end_a_benchmark(gallery, tmp_path, tiny):
    (tmp_path / "bad.png").write_bytes(b"no")
    labels = tmp_path / "l.csv"
    labels.write_text(f"image,caption\n01.png,one\n02.png,two\n{tmp_path / 'bad.png'},three\n")
    result = run("bench", labels, "--images", gallery, "--model", "tiny", "--json")
    assert json.loads(result.stdout)["missing"] == 1


def test_an_index_built_in_one_precision_is_not_reported_in_another(index):
    built = json.loads(run("bench", "--index", index, "--json").stdout)["precision"]
    other = "fp32" if built == "bf16" else "bf16"
    report = json.loads(run("bench", "--index", index, "--precision", other, "--json").stdout)
    assert report["precision"] == built


@pytest.mark.parametrize("command", [["index", ""], ["remove", ""], ["index", "--dry-run"],
                                     ["index", "~nosuchuser/x"]])  # fmt: skip
def test_paths_of_nothing_are_refused(command, tmp_path):
    result = run(*command, "--index", tmp_path / "none", code=3 if "--dry-run" in command else 2)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_demo_runs_twice_without_harm(tmp_path, tiny):
    first = run("demo", "--out", tmp_path / "demo")
    again = run("demo", "--out", tmp_path / "demo", "--index", tmp_path / "demo" / "index")
    assert "168 images" in first.stdout
    assert "(168 new" in first.stdout
    assert "(0 new" in again.stdout
    assert "text -> image" in again.stdout
    assert (tmp_path / "demo" / "contact-sheet.html").stat().st_size > 100_000


@pytest.mark.slow
def test_the_demo_on_a_folder_of_ones_own(tmp_path, gallery):
    result = run("demo", gallery, "--out", tmp_path / "demo")
    assert "R@1" not in result.stdout
    other = paint(tmp_path / "other" / "a.png", "red").parent
    assert "1 images" in run("demo", other, "--out", tmp_path / "demo").stdout
    assert len(list((tmp_path / "demo").glob("photos-*.html"))) == 2


def test_the_launcher_of_a_checkout_works():
    done = subprocess.run([sys.executable, "cli.py", "--version"], cwd=REPOSITORY,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.startswith("mmsearch ")

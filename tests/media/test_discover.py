"""Walking folders."""

from __future__ import annotations

import os

import pytest

from mmsearch.media.discover import FoundFile, Unreadable, walk


def found(root, start=b"", exclude=()):
    return [
        os.fsdecode(item.path) for item in walk(os.fsencode(root), start, exclude)
        if isinstance(item, FoundFile)
    ]  # fmt: skip


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_finds_images_by_their_names_in_a_stable_order(tmp_path):
    make(tmp_path, "b.JPG", "a.png", "sub/c.webp", "notes.txt", "d.heic", "e.AVIF", "f.tiff")
    assert found(tmp_path) == ["a.png", "b.JPG", "d.heic", "e.AVIF", "f.tiff", "sub/c.webp"]


def test_leaves_out_what_is_hidden_or_generated(tmp_path):
    make(tmp_path, ".hidden.png", ".git/a.png", "node_modules/b.png", "@eaDir/c.png", "d.png")
    assert found(tmp_path) == ["d.png"]


def test_excludes_by_name_and_by_path(tmp_path):
    make(tmp_path, "a.png", "a_thumb.png", "cache/b.png", "keep/c.png", "keep/raw/d.png")
    assert found(tmp_path, exclude=["*_thumb.*", "cache", "keep/raw"]) == ["a.png", "keep/c.png"]


def test_a_loop_of_links_ends_and_finds_each_file_once(tmp_path):
    make(tmp_path, "one/a.png", "two/b.png")
    (tmp_path / "one" / "up").symlink_to(tmp_path)
    (tmp_path / "one" / "two").symlink_to(tmp_path / "two")
    (tmp_path / "two" / "one").symlink_to(tmp_path / "one")
    assert found(tmp_path) == ["one/a.png", "two/b.png"]


def test_follows_links_to_folders_elsewhere(tmp_path):
    make(tmp_path, "elsewhere/a.png", "root/b.png")
    (tmp_path / "root" / "0link").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "root") == ["b.png", "0link/a.png"]


def test_follows_links_to_files(tmp_path):
    make(tmp_path, "elsewhere/a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    assert found(tmp_path / "root") == ["link.png"]


def test_names_that_are_not_text_survive(tmp_path):
    name = b"caf\xe9 \n.png"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(b"x")
    assert [item.path for item in walk(os.fsencode(tmp_path))] == [name]


def test_a_very_deep_tree_is_walked(tmp_path):
    deep = tmp_path
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(300):
            os.mkdir("d", dir_fd=here)
            lower = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = lower
            deep = deep / "d"
        os.close(os.open("a.png", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    finally:
        os.close(here)
    assert len(found(tmp_path)) == 1


def test_what_cannot_be_looked_at_is_reported(tmp_path):
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    make(tmp_path, "ok.png")
    reported = {os.fsdecode(i.path): i.reason for i in walk(os.fsencode(tmp_path))
                if isinstance(i, Unreadable)}  # fmt: skip
    assert reported == {
        "broken.png": "No such file or directory",
        "pipe.png": "not a regular file",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_closed_folder_is_reported_once(tmp_path):
    make(tmp_path, "shut/a.png")
    (tmp_path / "shut").chmod(0)
    try:
        (item,) = walk(os.fsencode(tmp_path))
        assert item.path == b"shut"
    finally:
        (tmp_path / "shut").chmod(0o700)


def test_a_start_inside_the_root_keeps_paths_relative_to_the_root(tmp_path):
    make(tmp_path, "a.png", "sub/b.png", "sub/deep/c.png")
    assert found(tmp_path, b"sub") == ["sub/b.png", "sub/deep/c.png"]
    assert found(tmp_path, b"sub/b.png") == ["sub/b.png"]


def test_sidecars_are_seen(tmp_path):
    make(tmp_path, "a.png", "a.txt", "b.png")
    sidecars = {item.path: item.sidecar is not None for item in walk(os.fsencode(tmp_path))}
    assert sidecars == {b"a.png": True, b"b.png": False}

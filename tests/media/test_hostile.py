"""Files that mean harm cost themselves, and nothing else: a sample of benchmarks/hostile.py."""

from __future__ import annotations

import json
import os
import random
import socket
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from html.parser import HTMLParser

import hostile
import pytest
from fakes import DECODERS, FakeEncoder, paint
from typer.testing import CliRunner

from mmsearch import Engine
from mmsearch.cli.app import app
from mmsearch.encoders.encoder_provider import GivenEncoder
from mmsearch.errors import DecodeError
from mmsearch.media.sandbox import Decoders

pytestmark = pytest.mark.slow

HOW = FakeEncoder().spec.preprocess
FLIPS = 40


def outcome(path, decoders=DECODERS):
    """Why a file is no picture; "" where it is one."""
    with decoders.open(os.fsencode(path)) as file:
        if file.reason:
            return file.reason
        try:
            file.pixels(asdict(HOW))
        except DecodeError as error:
            return str(error)
    return ""


@pytest.fixture(scope="module")
def wholes():
    return hostile.wholes()


@pytest.mark.parametrize("name", hostile.FORMATS)
def test_a_file_cut_at_any_tenth_is_damaged_not_half_a_picture(wholes, name, tmp_path):
    path = tmp_path / f"x{hostile.SUFFIX[name]}"
    path.write_bytes(wholes[name])
    assert outcome(path) == ""
    for cut in hostile.cuts(wholes[name]):
        path.write_bytes(cut)
        assert outcome(path) != ""


@pytest.mark.parametrize("name", hostile.FORMATS)
def test_flipped_bits_give_a_picture_or_a_reason(wholes, name, tmp_path):
    rng = random.Random(name)
    paths = []
    for number in range(FLIPS):
        paths.append(tmp_path / f"{number}{hostile.SUFFIX[name]}")
        paths[-1].write_bytes(hostile.flipped(wholes[name], rng))
    with ThreadPoolExecutor(2) as pool:
        reasons = list(pool.map(outcome, paths))
    assert all("\n" not in reason and len(reason) < 400 for reason in reasons)


QUICK = {
    "header.png": "too large",
    "none.png": "PNG that is damaged",
    "flat.png": "",
    "thin.png": "",
    "huge.gif": "too large",
    "frames.gif": "",
    "huge.bmp": "too large",
    "negative.bmp": "too large",
    "huge.tiff": "too large",
    "loop.tiff": "",
    "samples.tiff": "too large",
    "header.jpeg": "too large",
    "long.jpeg": "",
    "lies.avif": "AVIF that is damaged",
    "lies.heic": "too large",
    "zeros.jpeg": "its end is missing",
}


@pytest.fixture(scope="module")
def bombs():
    return hostile.bombs(quick=True)


@pytest.mark.parametrize("name", QUICK)
def test_a_bomb_costs_little(bombs, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(bombs[name])
    with Decoders(seconds=10, memory=512 << 20) as decoders:
        reason = outcome(path, decoders)
    assert QUICK[name] in reason
    assert bool(reason) == bool(QUICK[name])


def test_a_picture_that_takes_too_long_is_given_up(tmp_path):
    (tmp_path / "scans.jpeg").write_bytes(hostile.scans(3000))
    with Decoders(seconds=1) as decoders:
        reason = outcome(tmp_path / "scans.jpeg", decoders)
    assert reason.endswith("takes longer than 1 s")  # also where reading took that long


class Tags(HTMLParser):
    """The elements of a page, with the names of their attributes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, [name for name, _ in attrs]))


def controls(text):
    return [char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
            and char not in "\n\t"]  # fmt: skip


def test_names_and_captions_reach_no_terminal_as_they_are(tmp_path, tiny):
    folder = tmp_path / "photos"
    for number, name in enumerate(hostile.NAMES):
        paint(folder / "x.png", "red", mark=number + 1)
        os.rename(os.fsencode(folder / "x.png"), os.path.join(os.fsencode(folder), name))
    (folder / "~.txt").write_bytes(b"a \x1b[31mred\x1b[0m \x00thing \xe2\x80\xae!\n")
    (folder / "bad\x1b[1m.png").write_bytes(b"\x89PNG\x1b[2J")
    (folder / "bad\x1b[1m.txt").write_bytes(b"x" * (3 << 20))
    where = ("--index", str(tmp_path / "index"))
    runner = CliRunner()

    def run(*words):
        done = runner.invoke(app, list(words))
        assert done.exit_code == 0, done.output
        return done

    run("index", str(folder), *where, "--model", "tiny")
    with Engine.open(tmp_path / "index") as engine:
        assert engine.status().images == len(hostile.NAMES)
        assert len(engine.errors()) == 1
    page = tmp_path / "page.html"
    for words in (
        ("search", "red", "-k", "50"), ("search", "red", "--to", "caption"), ("status",),
        ("errors",), ("search", "red", "--html", str(page)), ("verify", "--deep"),
        ("bench",), ("remove", os.fsdecode(os.path.join(os.fsencode(folder), hostile.NAMES[0]))),
    ):  # fmt: skip
        done = run(*words, *where)
        assert controls(done.stdout) == [], words
        assert controls(done.stderr) == [], words
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    assert len(tags.found) > 30
    assert not [tag for tag, _ in tags.found if tag in ("script", "iframe", "object")]
    assert not [name for _, names in tags.found for name in names if name.startswith("on")]
    found = json.loads(run("search", "red", "-k", "50", "--json", *where).stdout.splitlines()[0])
    assert found


def test_what_is_no_file_is_listed_and_ends_nothing(tmp_path, monkeypatch, encoder):
    provider = GivenEncoder(encoder)
    folder = tmp_path / "photos"
    paint(folder / "good.png", "red")
    os.mkfifo(folder / "fifo.png")
    os.mkfifo(folder / "good.txt")
    (folder / "folder.png").mkdir()
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "self.png").symlink_to("self.png")
    (folder / "up").symlink_to(folder)
    (folder / "nowhere.png").symlink_to("/nowhere")
    paint(tmp_path / "elsewhere.png", "blue")
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "text.png").write_text("no picture")
    (folder / "empty.jpg").touch()
    (folder / "really.jpg").write_bytes(paint(tmp_path / "x.png", "green").read_bytes())
    monkeypatch.chdir(folder)  # a socket's name may not be long
    with (
        socket.socket(socket.AF_UNIX) as server,
        Engine.open(tmp_path / "index", provider=provider) as engine,
    ):
        server.bind("socket.png")
        report = engine.index([folder])
        assert report.added == 3
        failed = {failure.path.name for failure in engine.errors()}
        assert failed == {"fifo.png", "socket.png", "device.png", "self.png", "nowhere.png",
                          "text.png", "empty.jpg"}  # fmt: skip
        again = engine.index([folder])
        assert (again.added, again.unchanged) == (0, 3)

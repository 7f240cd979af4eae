"""A file that crashes, hangs or bloats its decoder costs itself, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import FakeEncoder, paint
from PIL import Image

from mmsearch.errors import DecodeError, UnreadableError
from mmsearch.media import sandbox
from mmsearch.media.fingerprint import NEVER, Stamp, content_hash
from mmsearch.media.fit import fit
from mmsearch.media.image import decode
from mmsearch.media.sandbox import Decoders

HOW = FakeEncoder().spec.preprocess


def picture(file, how=HOW):
    """What is said of a picture, and its pixels."""
    facts, segment = file.read({"image": dataclasses.asdict(how)})
    return SimpleNamespace(**vars(facts), pixels=segment.data)


#: What a decoder's C code might do: a Pillow plugin in the child, for files that begin with a word.
HOSTILE = """
import ctypes, os, time
from mmsearch.media import image
real = image.decode
def decode(content, *, at_least=None):
    if content == b"crash": ctypes.string_at(0)
    if content == b"hang":
        while True: time.sleep(1)
    if content == b"spin":
        while True: pass
    if content == b"bloat": return bytearray(3 << 30)
    if content == b"quit": os._exit(3)
    if content == b"chatter": os.write(1, b"x" * 99); os.write(2, b"\\x1b[2J")
    return real(content, at_least=at_least)
image.decode = decode
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """Makes decoders do as their files say."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HOSTILE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return tmp_path


def outcome(decoders, path):
    with decoders.open(os.fsencode(path)) as file:
        try:
            picture(file)
        except DecodeError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"crash", "its decoder crashed (SIGSEGV)"),
        (b"quit", "its decoder gave up"),
        (b"bloat", "not enough memory"),
        (b"chatter", "not an image"),
    ],
)
def test_what_a_decoder_does_is_the_reason_and_the_next_file_is_read(
    hostile, tmp_path, content, told, capfd
):
    (tmp_path / "bad.png").write_bytes(content)
    with Decoders(memory=1 << 30) as decoders:
        assert told in outcome(decoders, tmp_path / "bad.png")
        assert outcome(decoders, paint(tmp_path / "good.png", "red")) == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"hang", b"spin"])
def test_a_decoder_that_does_not_end_is_given_up_after_its_time(hostile, tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with Decoders(seconds=2.0) as decoders:
        assert outcome(decoders, tmp_path / "bad.png") == "takes longer than 2 s"
    with Decoders() as decoders:
        assert outcome(decoders, paint(tmp_path / "good.png", "red")) == ""


def test_pictures_are_those_of_this_process(tmp_path):
    paths = [
        paint(tmp_path / "a.png", "red", mark=3),
        paint(tmp_path / "b.jpg", "blue", mark=4),
    ]
    exif = Image.Exif()
    exif[0x0112], exif[0x0132] = 6, "2020:02:03 04:05:06"
    Image.new("RGB", (60, 30), "green").save(tmp_path / "c.jpg", exif=exif)
    paths.append(tmp_path / "c.jpg")
    how = dataclasses.replace(HOW, size=(16, 12), resize_mode="longest", fill_color=9)
    with Decoders() as decoders:
        for path in paths:
            content = path.read_bytes()
            expected = decode(content, at_least=how.size)
            with decoders.open(os.fsencode(path)) as file:
                assert file.reason == ""
                assert file.stamp == Stamp.of(path.stat())
                assert file.digest == content_hash(content)
                found = picture(file, how)
            np.testing.assert_array_equal(found.pixels, fit(expected.image, how))
            assert (found.width, found.height) == (expected.width, expected.height)
            assert found.captured == expected.captured
    assert (found.width, found.height) == (30, 60)
    assert found.captured.year == 2020


@pytest.fixture
def children():
    """Gives the ids of the processes that this one has started since."""
    if not Path("/proc/thread-self/children").exists():
        pytest.skip("this system does not tell of a process's children")

    def known():
        found = set()
        for path in Path("/proc/self/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended
                found |= {int(number) for number in path.read_text().split()}
        return found

    before = known()
    return lambda: known() - before


def test_many_threads_share_few_processes_and_each_gets_its_own(tmp_path, children):
    paths = [paint(tmp_path / f"{n}.png", "red", mark=n + 1) for n in range(40)]
    expected = [fit(decode(path.read_bytes()).image, HOW) for path in paths]
    with Decoders() as decoders:

        def pixels(path):
            with decoders.open(os.fsencode(path)) as file:
                return picture(file).pixels

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(pixels, paths * 5))
        assert 0 < len(children()) <= 4
    for one, other in zip(found, expected * 5, strict=True):
        np.testing.assert_array_equal(one, other)
    assert children() == set()


def test_what_cannot_be_read_has_a_reason_and_no_stamp(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    name = os.fsencode(tmp_path) + b"/\xff\n\x1b[2J.png"
    os.rename(paint(tmp_path / "x.png", "red"), name)
    with Decoders() as decoders:
        for path in (b"/nowhere.png", os.fsencode(tmp_path / "folder.png")):
            with decoders.open(path) as file:
                assert file.reason.startswith("cannot be read: ")
                assert file.stamp == NEVER
        assert outcome(decoders, tmp_path / "fifo.png") != ""
        with decoders.open(name) as file:
            assert picture(file).width == 40


def test_no_process_is_no_fault_of_a_file(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Decoders() as decoders, pytest.raises(UnreadableError, match="no process"):
        outcome(decoders, "/any.png")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Decoders() as decoders, pytest.raises(UnreadableError, match="no process"):
        outcome(decoders, "/any.png")


def test_modules_beside_the_photos_are_not_run(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("open('ran', 'w')")
    paint(tmp_path / "a.png", "red")
    monkeypatch.chdir(tmp_path)
    with Decoders() as decoders:
        assert outcome(decoders, tmp_path / "a.png") == ""
    assert not (tmp_path / "ran").exists()


def test_a_picture_comes_as_large_as_it_is_needed(tmp_path):
    image = Image.effect_noise((900, 300), 50).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    with Decoders() as decoders, decoders.open(os.fsencode(tmp_path / "a.png")) as file:
        found = file.pixels({"at_least": 100, "within": 0})
    assert found.shape == (900, 300, 3)
    np.testing.assert_array_equal(found, np.asarray(image.transpose(Image.Transpose.ROTATE_270)))
    with Decoders() as decoders, decoders.open(os.fsencode(tmp_path / "a.png")) as file:
        assert file.pixels({"at_least": 60, "within": 120}).shape == (120, 40, 3)


def test_a_process_that_was_started_ahead_is_the_one_that_is_asked(tmp_path, children):
    with Decoders() as decoders:
        decoders.start()
        decoders.start()
        started = children()
        assert len(started) == 1
        with decoders.open(os.fsencode(paint(tmp_path / "a.png", "red"))) as file:
            assert picture(file).width == 40
            assert children() == started


def test_a_path_is_taken_from_the_folder_that_the_caller_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "a.png", "red")
    with Decoders() as decoders:
        assert outcome(decoders, "a.png") == ""


def test_an_error_among_threads_does_not_wait_for_what_is_being_decoded(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HOSTILE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "hang.png").write_bytes(b"hang")
    begun = threading.Barrier(3)

    def hang(decoders):
        with decoders.open(os.fsencode(tmp_path / "hang.png")) as file:
            begun.wait(60)
            with pytest.raises(DecodeError, match="killed"):
                picture(file)

    with Decoders(seconds=600) as decoders:
        started = time.monotonic()

        def interrupted():
            with decoders.threads(2) as pool:
                futures.extend(pool.submit(hang, decoders) for _ in range(2))
                begun.wait(60)
                raise KeyboardInterrupt

        futures = []
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert time.monotonic() - started < 120  # of the 600 that the decoder had
        assert [future.exception() for future in futures] == [None, None]
        assert outcome(decoders, paint(tmp_path / "a.png", "red")) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="knows a process by Linux's /proc")
def test_an_interrupt_leaves_no_process(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HOSTILE)
    (tmp_path / "hang.png").write_bytes(b"hang")
    code = f"""
import os
from mmsearch.media import sandbox
with sandbox.Decoders() as decoders:
    with decoders.open({os.fsencode(tmp_path / "hang.png")!r}) as file:
        print(open(f"/proc/self/task/{{os.getpid()}}/children").read(), flush=True)
        list(file.read({{"image": {dataclasses.asdict(HOW)!r}}}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    child = int(process.stdout.readline())
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.wait(20)
    process.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.slow
def test_a_large_picture_takes_no_more_memory_than_it_may(tmp_path, children):
    out = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(out, "PNG")  # 169 megapixels in 20 KB
    (tmp_path / "bomb.png").write_bytes(out.getvalue())
    with Decoders(memory=64 << 20) as decoders:
        assert "not enough memory" in outcome(decoders, tmp_path / "bomb.png")
    peak = []
    with Decoders() as decoders, decoders.open(os.fsencode(tmp_path / "bomb.png")) as file:
        (child,) = children()
        done = threading.Event()

        def watch():
            while not done.is_set():
                with open(f"/proc/{child}/status") as status:
                    peak.extend(int(line.split()[1]) << 10 for line in status if "VmHWM" in line)
                time.sleep(0.02)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            picture(file)
        finally:
            done.set()
            thread.join()
    assert 100 << 20 < max(peak) < sandbox.LIMIT_BYTES


def test_a_process_that_was_killed_while_it_was_idle_costs_no_file(tmp_path, children):
    path = paint(tmp_path / "a.png", "red")
    with Decoders() as decoders:
        assert outcome(decoders, path) == ""
        (child,) = children()
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody knows
        assert outcome(decoders, path) == ""


#: Replies that no decoder of ours sends: a stranger's file might have taken over its process.
FACTS = {"width": 9, "height": 9, "captured": None, "duration_ms": None, "latitude": None,
         "longitude": None}  # fmt: skip
SEGMENT = {"modality": "image", "start_ms": None, "end_ms": None, "shape": [0], "dtype": "uint8"}
REPLIES = {
    "file": [
        "[]",
        "{}",
        "[" * 100_000,
        '{"stamp": [1, 1e99], "digest": "", "reason": "x"}',
        '{"stamp": [1, 2], "digest": "00", "reason": ""}',
    ],
    "picture": [
        '{"reason": "bad \\udce9"}',
        "7",
        "{}",
        '{"reason": "", "is_last": true, "parts": 7}',
        '{"reason": "", "is_last": true, "parts": [{}]}',
        *(
            json.dumps({"reason": "", "is_last": True, "parts": [FACTS | SEGMENT | strange]})
            for strange in (
                {"shape": [-1, 9, 3]},
                {"shape": [9, 9, 3]},
                {"dtype": "object"},
                {"dtype": "O"},
                {"start_ms": 1e99},
                {"modality": 7},
            )
        ),
        *(
            json.dumps({"reason": "", "is_last": True, "parts": [FACTS | strange]})
            for strange in (
                {"width": 1e99},
                {"captured": "now"},
                {"latitude": "north"},
                {"duration_ms": 0.5},
            )
        ),
        '{"reason": "", "is_last": true, "parts": [{"text": 7, "segment": null}]}',
    ],
}


@pytest.mark.parametrize(
    ("which", "reply"), [(which, reply) for which, replies in REPLIES.items() for reply in replies]
)
def test_a_reply_that_makes_no_sense_is_the_files_fault(tmp_path, monkeypatch, which, reply):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import json\n"
        "real = json.dumps\n"
        f"key = {'digest' if which == 'file' else 'reason'!r}\n"
        f"replied = {reply!r}\n"
        f"is_picture = {which == 'picture'}\n"
        "def dumps(value, **options):\n"
        "    hit = key in value and ('digest' in value) != is_picture\n"
        "    return replied if hit else real(value, **options)\n"
        "json.dumps = dumps\n"
    )
    path = paint(tmp_path / "a.png", "red")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "site"))
        with Decoders() as decoders:
            told = outcome(decoders, path)
    assert "its decoder gave up" in told or told == "bad ?"

"""The program where a system gives it less than usual: one clear line, and the exit code."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakes import paint

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, "-m", "mmsearch"]


def start(*arguments, environment=None, **options):
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})}, **options,
    )  # fmt: skip


def ended(process, seconds=120):
    """Exit code, output and the lines of stderr."""
    out, err = process.communicate(timeout=seconds)
    assert b"Traceback" not in err, err.decode()
    return process.returncode, out.decode(), err.decode().splitlines()


@pytest.fixture(scope="module")
def index(tmp_path_factory, tiny):
    top = tmp_path_factory.mktemp("surroundings")
    paint(top / "p" / "a.png", "red")
    process = start("index", top / "p", "--index", top / "i", "--model", "tiny")
    assert ended(process)[0] == 0
    return top / "i"


#: A user whom /etc/passwd does not know, who may read and write everything.
NOBODY = """
import os, pwd, sys
def unknown(*_): raise KeyError("uid not found")
pwd.getpwuid = pwd.getpwnam = unknown
os.environ.pop("HOME", None)
sys.argv[0] = "mmsearch"
from mmsearch.cli import main
main()
"""


def as_nobody(*arguments, **environment):
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("XDG_", "MMSEARCH_"))}
    return subprocess.Popen(
        [sys.executable, "-c", NOBODY, *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**kept, **environment}, cwd="/",
    )  # fmt: skip


def test_a_user_without_a_home_searches_where_all_is_named(index):
    assert ended(as_nobody("status", "--index", index))[0] == 0
    cache = os.environ["MMSEARCH_CACHE"]
    code, out, _ = ended(as_nobody("search", "red", "--index", index, MMSEARCH_CACHE=cache))
    assert (code, "a.png" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "variable"),
    [(("status",), "MMSEARCH_HOME"), (("search", "red", "--index", "INDEX"), "MMSEARCH_CACHE")],
)
def test_a_user_without_a_home_is_told_what_to_set(index, tmp_path, arguments, variable):
    named = [index if one == "INDEX" else one for one in arguments]
    code, _, (line,) = ended(as_nobody(*named))
    assert code == 2
    assert "no home folder" in line
    assert variable in line


def test_a_cache_that_cannot_be_written_is_told_with_a_way_out(index):
    process = start("search", "red", "--index", index, environment={"MMSEARCH_CACHE": "/proc/x"})
    code, _, lines = ended(process)
    assert code == 4
    assert "MMSEARCH_CACHE" in lines[-1]


def test_a_folder_that_was_deleted_under_the_program(index, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    for arguments, expected in (
        (("search", "red", "--index", index), 0), (("status", "--index", index), 0),
        (("search", "red", "--index", "relative"), 4), (("index", "here", "--index", index), 4),
        (("train", "align", tmp_path / "p", "--out", tmp_path / "m"), 4),
    ):  # fmt: skip
        process = subprocess.Popen(  # not by -m, for which Python itself looks into that folder
            [Path(sys.executable).with_name("mmsearch"), *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=gone, preexec_fn=gone.rmdir,
        )  # fmt: skip
        code, _, lines = ended(process)
        assert code == expected, lines
        if expected:
            (line,) = lines
            assert "the current folder was deleted" in line
        gone.mkdir()


def test_an_index_that_vanishes_is_not_reported_as_success(tmp_path, tiny):
    for number in range(400):
        paint(tmp_path / "p" / f"{number}.png", "red", mark=number + 1)
    process = start("index", tmp_path / "p", "--index", tmp_path / "i", "--model", "tiny")
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        try:
            path = tmp_path / "i" / "catalog.sqlite3"
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
                if connection.execute("SELECT count(*) FROM media").fetchone()[0]:
                    break
        except sqlite3.Error:
            pass
        time.sleep(0.01)
    shutil.rmtree(tmp_path / "i")
    code, out, lines = ended(process)
    assert code in (3, 4)
    assert "added" not in out
    assert "i: " in lines[-1]


def test_a_searcher_hears_that_its_index_was_deleted(tmp_path, index):
    from mmsearch import Engine
    from mmsearch.errors import IndexNotFound

    shutil.copytree(index, tmp_path / "i")
    with Engine.open(tmp_path / "i") as engine:
        assert engine.search("red")
        shutil.rmtree(tmp_path / "i")
        with pytest.raises(IndexNotFound, match="the index is gone"):
            engine.search("red")


def test_an_index_in_a_folder_whose_name_is_no_text(tmp_path, index):
    folder = os.path.join(os.fsencode(tmp_path), b"Ann\xe9e")
    os.mkdir(folder)
    where = os.fsdecode(os.path.join(folder, b"i"))
    shutil.copytree(index, where)
    for arguments in (("compact",), ("search", "red"), ("verify", "--deep"), ("index",)):
        code, _, lines = ended(start(*arguments, "--index", where))
        assert code == 0, lines
    assert any(
        name.endswith(b".faiss")
        for name in os.listdir(os.path.join(os.fsencode(where), b"vectors"))
    )
    backup, other = os.path.join(folder, b"b.backup"), where + "-2"
    assert ended(start("backup", os.fsdecode(backup), "--index", where))[0] == 0
    assert ended(start("restore", os.fsdecode(backup), "--index", other))[0] == 0
    code, out, _ = ended(start("search", "red", "--index", other))
    assert (code, "a.png" in out) == (0, True)


def test_little_memory_is_one_line_and_no_traceback(index):
    codes = []
    for megabytes in (250, 500, 600):
        size = megabytes << 20
        code, _, lines = ended(
            start(
                "search", "red", "--index", index,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),  # noqa: B023 - called at once
            )
        )  # fmt: skip
        codes.append(code)
        if code != -signal.SIGSEGV:  # of a library's own threads, which nothing here can catch
            assert code == 4
            assert "memory" in lines[-1]
    assert 4 in codes


def test_an_interrupt_while_the_program_starts_is_one_line(index):
    """Whenever it comes after Python itself has started, which takes some 30 ms."""
    for wait in (0.06, 0.09, 0.12, 0.16, 0.2, 0.3):
        process = start(
            "search", "red", "--index", index,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        timer = threading.Timer(wait, process.send_signal, [signal.SIGINT])
        timer.start()
        _, err = process.communicate(timeout=60)
        timer.cancel()
        if b"Traceback" in err and b"mmsearch/" not in err:
            continue  # Python itself was still starting
        assert (process.returncode, err) in ((130, b"mmsearch: interrupted\n"), (0, b"")), err


def test_an_interrupt_that_is_ignored_stays_so(index):
    process = start("search", "red", "--index", index,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # fmt: skip
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 0


def test_an_interrupt_while_a_decoder_hangs_ends_at_once(tmp_path, tiny, hanging):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(b"hang")
    process = start("index", tmp_path / "p", "--index", tmp_path / "i", "--model", "tiny",
                    environment=hanging.environment)  # fmt: skip
    hanging.wait()
    process.send_signal(signal.SIGINT)
    code, _, lines = ended(process, seconds=30)  # of the 60 that the decoder had left
    assert code == 130
    assert "interrupted" in lines[-1]


def test_names_from_files_reach_no_terminal_as_they_are(tmp_path, index):
    bad = "\x1b[2J\x07.png"
    labels = tmp_path / "c\x1b[31m.csv"
    labels.write_text(f'image,caption\n{bad},"never closed\n')
    for arguments in (
        ("index", tmp_path, "--captions", labels), ("bench", labels, "--model", "tiny"),
        ("search", "--image", tmp_path / bad), ("remove", tmp_path / bad),
        ("search", "x", "--html", tmp_path / "\x1b[1m" / "x.html"),
    ):  # fmt: skip
        code, out, lines = ended(start(*arguments, "--index", index))
        assert code == 2
        assert not [char for char in out + "".join(lines) if ord(char) < 32 and char != "\n"]
        assert len(lines) == 1

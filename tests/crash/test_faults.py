"""A kill, a power cut, a failing disk: nothing committed is lost, nothing is half done.

A sample of what benchmarks/faults.py does in full.
"""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import faults
import pytest

from mmsearch import Engine

pytestmark = pytest.mark.slow

KILLS, CUTS_EVERY, FAILURES = 25, 29, 24


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    if faults.compiler() is None:
        assert not os.environ.get("CI"), "no C compiler, without which these tests prove nothing"
        pytest.skip("no C compiler: install gcc or clang")
    folder = tmp_path_factory.mktemp("faults")
    return faults.Bench(faults.build(folder), folder)


@pytest.fixture(scope="module")
def scenarios(bench, tiny):
    return {one.name: one for one in faults.prepare(bench.folder / "made")}


def in_parallel(trial, trials):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(trial, trials))


def test_a_kill_at_any_moment_loses_nothing(bench, scenarios):
    def trial(one):
        scenario, fault = one
        done = bench.run(scenario, **fault)
        bench.settle(scenario, done)
        return done.code

    chosen = list(faults.kills(list(scenarios.values()), bench, KILLS))
    codes = in_parallel(trial, chosen)
    assert codes.count(-9) > KILLS // 2


@pytest.mark.parametrize(
    "name",
    ["new", "update", "compact", "remove", "import", "restore", "switch", "migrate", "repair"],
)
def test_a_power_cut_loses_nothing_that_was_committed(bench, scenarios, name):
    states = 0
    for place, told, counts in faults.power_cuts(scenarios[name], bench, every=CUTS_EVERY):
        faults.check_after_cut(place, told, counts, must_be_sound=scenarios[name].is_sound_before)
        if name == "repair":  # whatever is there then, another repair ends it
            with Engine.open(place, notify=lambda line: None) as engine:
                engine.repair()
            faults.check_whole(place)
            faults.assert_same(faults.state_of(place), bench.undisturbed(scenarios[name]))
        states += 1
    assert states > 5


@pytest.mark.parametrize(
    "lax",
    [
        # Commits that are not synced, as SQLite's usual setting with a log has it.
        (
            "real_connect = catalog._connect\n"
            "def connect(path):\n"
            "    found = real_connect(path)\n"
            "    found.execute('PRAGMA synchronous = NORMAL')\n"
            "    return found\n"
            "catalog._connect = connect\n"
        ),
        "from mmsearch.store import files\nfiles.sync_folder = lambda path: None\n",
        "from mmsearch.store import files\nfiles.sync_file = lambda path: None\n",
        (
            "from mmsearch.store import files, store\n"
            "store.make_folder = lambda path: path.mkdir(exist_ok=True)\n"
        ),
    ],
)
def test_a_program_that_syncs_less_is_caught(bench, scenarios, tmp_path, lax):
    """What the tests above are worth: without any one of our syncs they fail."""
    worse = dataclasses.replace(bench, folder=tmp_path, sabotage=lax)
    cuts = (
        cut
        for name in ("new", "compact", "remove")
        for cut in faults.power_cuts(scenarios[name], worse, every=3)
    )
    with pytest.raises(AssertionError):
        check_all(cuts)


def check_all(cuts):
    for place, told, counts in cuts:
        faults.check_after_cut(place, told, counts)


def test_a_call_that_fails_is_told_of_and_loses_nothing(bench, scenarios):
    rng = random.Random(2)
    chosen = [
        (
            scenario,
            {"do": "fail", "at": rng.randint(1, bench.calls(scenario)),
             "errno": rng.choice(faults.ERRORS), **rng.choice([{}, {"sticky": 1}])},
        )
        for scenario in list(scenarios.values()) * 3
    ][:FAILURES]  # fmt: skip

    def trial(one):
        scenario, fault = one
        done = bench.run(scenario, **fault)
        faults.check_message(done)
        bench.settle(scenario, done)
        return done.code

    codes = in_parallel(trial, chosen)
    assert codes.count(4) > FAILURES // 4


def mmsearch(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "mmsearch", *map(str, words)], capture_output=True, text=True,
        check=False, **options,
    )  # fmt: skip


def test_a_disk_that_fills_up_is_told_of_and_the_run_goes_on_when_there_is_room(
    scenarios, bench, tmp_path
):
    """A limit on the size of files: SQLite's log is stopped by it, and so is a vector file."""
    photos = scenarios["new"].command[1]
    for limit in (40_000, 150_000, 400_000):
        index = tmp_path / f"index{limit}"

        def small(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        words = ("index", photos, "--index", index, "--model", "tiny")
        done = mmsearch(*words, preexec_fn=small)
        assert done.returncode == 4, done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        faults.check_whole(index)
        assert mmsearch(*words).returncode == 0
        faults.assert_same(faults.state_of(index), bench.undisturbed(scenarios["new"]))


@pytest.mark.mount
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_for_real(scenarios, bench, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1400k", "none", disk]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        words = ("index", scenarios["new"].command[1], "--index", disk / "index", "--model", "tiny")
        (disk / "ballast").write_bytes(bytes(300_000))
        done = mmsearch(*words)
        assert done.returncode == 4, done.stderr
        assert "full" in done.stderr or "No space left" in done.stderr
        faults.check_whole(disk / "index")
        assert mmsearch("search", "x", "--index", disk / "index").returncode in (0, 3, 4)
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert mmsearch(*words).returncode == 0
        faults.assert_same(faults.state_of(disk / "index"), bench.undisturbed(scenarios["new"]))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.mount
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk read-only")
def test_a_disk_that_may_only_be_read(scenarios, tmp_path):
    """Searches go on; whatever writes is refused in one line."""
    disk = tmp_path / "disk"
    shutil.copytree(scenarios["compact"].before, disk / "index")
    commands = (["mount", "--bind", disk, disk], ["mount", "-o", "remount,ro,bind", disk])
    for command in commands:
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("may not mount here")
    try:
        where = ("--index", disk / "index")
        for words in (("search", "a cat"), ("status",), ("verify", "--deep")):
            done = mmsearch(*words, *where)
            assert done.returncode == 0, done.stderr
        for words in (("index",), ("compact",), ("remove", scenarios["remove"].command[1])):
            done = mmsearch(*words, *where)
            assert done.returncode == 4, done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
    finally:
        subprocess.run(["umount", "-l", disk], check=True)

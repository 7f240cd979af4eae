"""Faults on purpose: commands that are killed, cut off from power or failed at a chosen call.

`shim.c`, compiled here and preloaded into the program, counts what it does to its index's files.
A `Scenario` is a command and the index that it finds; a trial runs it with one fault and tells
what became of the index. tests/crash and benchmarks/faults.py use this.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from format4 import make_older

from mmsearch import Engine
from mmsearch.datasets import scene_art, scenes
from mmsearch.encoders.registry import BUNDLED
from mmsearch.errors import IndexNotFound
from mmsearch.store import catalog
from mmsearch.store.store import REPAIRED

SOURCE = Path(__file__).with_name("shim.c")
ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT)

#: Runs the program and tells the recording of every commit: revision, images, captions.
MARKING = """
import os, sys
from contextlib import contextmanager
from mmsearch.cli import main
from mmsearch.store import catalog, writer
# SABOTAGE
real = writer.Writer.change
@contextmanager
def change(self):
    with real(self) as one:
        yield one
    with self.catalog.read() as c:
        numbers = [c.revision(), c.count("media"), c.count("caption")]
    try:
        os.unlink(os.environ["FAULT_DIR"] + "/mark:" + ":".join(map(str, numbers)))
    except FileNotFoundError:
        pass
writer.Writer.change = change
main()
"""


def compiler() -> str | None:
    """The C compiler of this machine."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path) -> Path:
    """Compiles the shim."""
    path = folder / "shim.so"
    command = [
        compiler() or "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        path,
        SOURCE,
        "-ldl",
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    return path


@dataclass(frozen=True)
class Scenario:
    """A command, with INDEX in the place of the index's folder, and what it finds there."""

    name: str
    command: tuple[str, ...]
    before: Path | None
    """An index to begin with, which each trial gets a copy of; None for none."""
    is_sound_before: bool = True
    over: str = ""
    """What the command says, with exit code 2, where it had done all before it was killed."""


@dataclass(frozen=True)
class Trial:
    """What a command with a fault left behind."""

    code: int
    errors: str
    top: Path

    @property
    def index(self) -> Path:
        return self.top / "index"


@dataclass
class Bench:
    """Where trials run: the shim, scratch folders, and the undisturbed outcomes."""

    shim: Path
    folder: Path
    sabotage: str = ""
    """Statements that a recorded program runs first, to be worse than it is."""
    _number: int = 0
    _undisturbed: dict[str, State] = field(default_factory=dict)

    def run(self, scenario: Scenario, *, after: float | None = None, **fault: object) -> Trial:
        """Runs a scenario in a folder of its own, with a fault (`do`, `at`, `errno`, ...).

        Args:
            after: kill it after so many seconds.
        """
        self._number += 1
        top = self.folder / f"{scenario.name}-{self._number}"
        top.mkdir()
        if scenario.before is not None:
            shutil.copytree(scenario.before, top / "index")
        return self.again(scenario, top, after=after, **fault)

    def again(
        self, scenario: Scenario, top: Path, *, after: float | None = None, **fault: object
    ) -> Trial:
        """Runs it on what an earlier trial left."""
        environment = dict(os.environ)
        if fault:
            environment |= {"LD_PRELOAD": str(self.shim), "FAULT_DIR": str(top)}
            environment |= {f"FAULT_{name.upper()}": str(value) for name, value in fault.items()}
        marking = MARKING.replace("# SABOTAGE", self.sabotage)
        start = ["-c", marking] if fault.get("do") == "record" else ["-m", "mmsearch"]
        command = [word.replace("INDEX", str(top / "index")) for word in scenario.command]
        process = subprocess.Popen(
            [sys.executable, *start, *command], env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        if after is not None:
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
        return Trial(process.returncode, errors.decode("utf-8", "replace"), top)

    def calls(self, scenario: Scenario) -> int:
        """How many calls a scenario makes."""
        count = self.folder / "count"
        trial = self.run(scenario, do="before", at=0, count=count)
        assert trial.code == 0, trial.errors
        self._undisturbed[scenario.name] = state_of(trial.index)
        shutil.rmtree(trial.top)
        return int(count.read_text())

    def undisturbed(self, scenario: Scenario) -> State:
        """What the index is after the command alone."""
        if scenario.name not in self._undisturbed:
            self.calls(scenario)
        return self._undisturbed[scenario.name]

    def settle(self, scenario: Scenario, trial: Trial) -> None:
        """Asserts that nothing is lost: the index is whole, and the same command completes it."""
        check_whole(trial.index, must_be_sound=scenario.is_sound_before)
        if scenario.before is not None:
            assert any((trial.index / name).is_file() for name in (catalog.FILE_NAME, REPAIRED))
        done = self.again(scenario, trial.top)
        is_over = done.code == 2 and scenario.over and scenario.over in done.errors
        assert done.code == 0 or is_over, done.errors
        check_whole(trial.index)
        assert_same(state_of(trial.index), self.undisturbed(scenario))
        shutil.rmtree(trial.top)


@dataclass(frozen=True)
class State:
    """What must be the same in the end: model, images and captions with their vectors."""

    model: str
    images: dict[bytes, np.ndarray]
    captions: dict[tuple[bytes, str], np.ndarray]


def state_of(index: Path) -> State:
    with Engine.open(index, notify=lambda line: None) as engine:
        held = engine.store.contents()
        place = dict(zip(held.image_ids.tolist(), held.image_paths, strict=True))
        owners = [place[number] for number in held.caption_media.tolist()]
        return State(
            engine.status().model,
            dict(zip(held.image_paths, held.image_vectors, strict=True)),
            dict(
                zip(zip(owners, held.caption_texts, strict=True), held.caption_vectors, strict=True)
            ),
        )


def assert_same(found: State, expected: State) -> None:
    assert found.model == expected.model
    for some, others in ((found.images, expected.images), (found.captions, expected.captions)):
        assert set(some) == set(others)
        assert all(float(some[key] @ others[key]) > 0.9999 for key in some)


def check_whole(index: Path, *, must_be_sound: bool = True) -> int:
    """Asserts that it is no index yet, or sound, and finds every committed row; how many images."""
    with Engine.open(index, notify=lambda line: None) as engine:
        try:
            found = engine.verify(deep=True)
        except IndexNotFound:
            return 0
        if not must_be_sound and found.damages:
            return 0
        assert found.damages == (), found.damages
        space = engine.store.active_space()
        if space is None:
            return 0
        held = engine.store.contents()
        for modality, ids, vectors in (
            ("image", held.image_ids, held.image_vectors),
            ("text", held.caption_ids, held.caption_vectors),
        ):
            with engine.store.reader() as reader:
                answers = reader.nearest(modality, vectors, len(ids) + 9)
            for (scores, found_ids), vector in zip(answers, vectors, strict=True):
                assert sorted(found_ids.tolist()) == ids.tolist()
                assert scores[0] > float(vector @ vector) - 1e-5
        return len(held.image_ids)


def check_message(trial: Trial) -> None:
    """Asserts that a command that failed said so in one line, with a documented code."""
    assert trial.code in (0, 4, 5), (trial.code, trial.errors)
    assert "Traceback" not in trial.errors, trial.errors
    if trial.code:
        lines = [line for line in trial.errors.splitlines() if line]
        assert lines[-1].startswith("mmsearch: "), trial.errors


# -- power -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One recorded call: its letter (shim.c), path, second path, offset and data."""

    kind: str
    path: str
    other: str
    offset: int
    data: bytes


def recording(path: Path) -> list[Operation]:
    """What the shim wrote into its log."""
    content, place, found = path.read_bytes(), 0, []
    header = struct.Struct("<ciiqq")
    while place < len(content):
        kind, first, second, offset, size = header.unpack_from(content, place)
        place += header.size
        words = content[place : place + first + second]
        place += first + second
        found.append(
            Operation(
                kind.decode(),
                os.fsdecode(words[:first]),
                os.fsdecode(words[first:]),
                offset,
                content[place : place + size],
            )
        )
        place += size
    return found


@dataclass
class _File:
    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Writes that were not synced: offset and data, or a length to cut to and None."""

    def change(self, one: Operation) -> None:
        if one.kind == "S":
            self.durable, self.pending = one.data, []
        elif one.kind == "W":
            self.pending.append((one.offset, one.data))
        elif one.kind == "T":
            self.pending.append((one.offset, None))
        elif one.offset:  # opened anew, and emptied
            self.pending.append((0, None))


class Disk:
    """What a disk holds after some recorded calls, as POSIX promises it and no better.

    Content is safe once its file was synced, a name once its folder was.
    """

    def __init__(self, top: Path) -> None:
        self._top = str(top)
        self._names: dict[str, _File | None] = {}  # None is a folder
        for path in sorted(top.rglob("*")):
            self._names[str(path)] = None if path.is_dir() else _File(path.read_bytes())
        self._safe = dict(self._names)

    def apply(self, one: Operation) -> None:
        names, path = self._names, one.path
        match one.kind:
            case "D":
                self._sync_names(path)
            case "M":
                names[path] = None
            case "R":
                names[one.other] = names.pop(path, None) or _File()
            case "U":
                names.pop(path, None)
            case "S" | "W" | "T" | "C":
                file = names.setdefault(path, _File())
                assert file is not None
                file.change(one)

    def _sync_names(self, folder: str) -> None:
        for name in {*self._names, *self._safe}:
            if os.path.dirname(name) == folder:
                if name in self._names:
                    self._safe[name] = self._names[name]
                else:
                    del self._safe[name]

    def lay_out(self, to: Path, how: str, rng: random.Random) -> None:
        """Writes what may be there after a power cut.

        Args:
            how: "nothing more" than is promised; "names" without the content that was not synced;
                "torn": with some of that, in no order and by sectors of 512 bytes.
        """
        names = self._safe if how == "nothing more" else self._names
        for name, file in sorted(names.items()):
            place = to / os.path.relpath(name, self._top)
            # A folder that is not safe takes what is in it along.
            above = [str(parent) for parent in Path(name).parents if str(parent) in self._names]
            if any(parent not in names for parent in above) or name.endswith("-shm"):
                continue
            if file is None:
                place.mkdir(parents=True, exist_ok=True)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(_torn(file, rng) if how == "torn" else file.durable)


def _torn(file: _File, rng: random.Random) -> bytes:
    content = bytearray(file.durable)
    for offset, data in file.pending:
        if rng.random() < 0.4:
            continue
        if data is None:
            del content[offset:]
            continue
        for start in range(0, len(data), 512):
            if rng.random() < 0.9:
                piece = data[start : start + 512]
                place = offset + start
                if len(content) < place:
                    content.extend(bytes(place - len(content)))
                content[place : place + len(piece)] = piece
    return bytes(content)


HOW = ("nothing more", "names", "torn")


def power_cuts(
    scenario: Scenario, bench: Bench, *, every: int = 1, seed: int = 0
) -> Iterator[tuple[Path, int, dict[int, tuple[int, int]]]]:
    """The indexes that a power cut may leave, at every so-manieth call of a scenario.

    Each with the newest revision that the program had been told is committed, and the images and
    captions of each revision.
    """
    log = bench.folder / f"log-{scenario.name}"
    log.unlink(missing_ok=True)
    trial = bench.run(scenario, do="record", log=log)
    assert trial.code == 0, trial.errors
    with (
        Engine.open(trial.index, notify=lambda line: None) as engine,
        engine.store.catalog.read() as queries,
    ):
        last = queries.revision()
    operations = recording(log)
    log.unlink()
    marks = {
        index: tuple(map(int, one.path.split("mark:")[1].split(":")))
        for index, one in enumerate(operations) if one.kind == "K"
    }  # fmt: skip
    counts = {revision: (images, captions) for revision, images, captions in marks.values()}
    shutil.rmtree(trial.top)
    if scenario.before is not None:
        shutil.copytree(scenario.before, trial.top / "index")
    else:
        trial.top.mkdir()
    disk, told, rng = Disk(trial.top), 0, random.Random(seed)
    shutil.rmtree(trial.top)
    place = bench.folder / f"cut-{scenario.name}"
    for number, one in enumerate(operations):
        disk.apply(one)
        if number in marks:
            told = marks[number][0]
        if number == len(operations) - 1:
            told = last  # the command has ended well
        if number % every and number != len(operations) - 1:
            continue
        for how in HOW:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            disk.lay_out(place, how, rng)
            yield place / "index", told, counts
    shutil.rmtree(place, ignore_errors=True)


def check_after_cut(
    index: Path, told: int, counts: dict[int, tuple[int, int]], *, must_be_sound: bool = True
) -> None:
    """Asserts that all that was said to be committed is there, and all of it or none."""
    images = check_whole(index, must_be_sound=must_be_sound)
    if not must_be_sound:
        assert any((index / name).is_file() for name in (catalog.FILE_NAME, REPAIRED))
        return
    try:
        with (
            Engine.open(index, notify=lambda line: None) as engine,
            engine.store.catalog.read() as queries,
        ):
            revision = queries.revision()
            captions = queries.count("caption")
    except IndexNotFound:
        assert told == 0
        return
    assert revision >= told
    if revision in counts:
        assert (images, captions) == counts[revision]


# -- what is tried ---------------------------------------------------------------------------------


def draw(folder: Path, numbers: range, seed: int = 1) -> None:
    """Drawn scenes with a caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in zip(numbers, scenes.gallery(len(numbers), seed=seed), strict=True):
        scene_art.render(scene).resize((96, 96)).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(scenes.captions(scene)[0])


def prepare(folder: Path) -> list[Scenario]:
    """The scenarios, with their photos and the indexes that they begin with."""

    def engine(name: str) -> Engine:
        return Engine.open(folder / name, model="tiny", notify=lambda line: None)

    def tiny(*command: str) -> tuple[str, ...]:
        return (*command, "--index", "INDEX", "--model", "tiny")

    draw(folder / "photos", range(70))
    found = [Scenario("new", tiny("index", str(folder / "photos")), None)]

    changing = folder / "changing"
    draw(changing, range(40))
    with engine("update") as made:
        made.index([changing])
        made.compact()
    for number in range(5):
        (changing / f"{number:03}.png").unlink()
        shutil.copy(folder / "photos" / f"{number + 50:03}.png", changing / f"{number + 10:03}.png")
        (changing / f"{number + 20:03}.png").rename(changing / f"moved{number}.png")
        (changing / f"{number + 30:03}.txt").write_text("another caption")
    draw(changing, range(60, 80), seed=3)
    found.append(Scenario("update", tiny("index"), folder / "update"))

    sub = folder / "photos" / "sub"
    with engine("compact") as made:
        draw(sub, range(100, 110), seed=4)
        made.index([folder / "photos"])
        made.compact()
        draw(folder / "more", range(12), seed=5)
        made.index([folder / "more"])
        made.remove([sub])
        made.export_embeddings(folder / "export")
        made.backup(folder / "backup")
    shutil.rmtree(sub)
    index = folder / "compact"
    found.append(Scenario("compact", ("compact", "--index", "INDEX"), index))
    gone = str(folder / "more")
    found.append(Scenario("remove", ("remove", gone, "--index", "INDEX"), index, over="nothing in"))
    found.append(Scenario("import", tiny("import", str(folder / "export")), None))
    found.append(
        Scenario(
            "restore", ("restore", str(folder / "backup"), "--index", "INDEX"), None, over="already"
        )
    )

    other = folder / "other-model"
    shutil.copytree(BUNDLED / "tiny", other)
    config = other / "open_clip_config.json"
    how = json.loads(config.read_text())
    how["preprocess_cfg"]["mean"][0] += 0.01  # another space
    config.write_text(json.dumps(how))
    moved = ("index", "--index", "INDEX", "--model", f"local-dir:{other}")
    found.append(Scenario("switch", moved, index))

    shutil.copytree(index, folder / "old")
    make_older(folder / "old" / catalog.FILE_NAME)
    found.append(Scenario("migrate", ("status", "--index", "INDEX"), folder / "old"))

    shutil.copytree(index, folder / "damaged")
    damage(folder / "damaged")
    found.append(
        Scenario(
            "repair", ("repair", "--index", "INDEX"), folder / "damaged", is_sound_before=False
        )
    )
    return found


def damage(index: Path) -> None:
    """Damages an index in ways that leave everything to be had again."""
    with closing(sqlite3.connect(index / catalog.FILE_NAME)) as raw:
        raw.execute("UPDATE embedding SET vector = zeroblob(length(vector)) WHERE id % 7 = 0")
        raw.execute("UPDATE words SET sidecar = 'nonsense' WHERE rowid = 3")
        raw.execute("PRAGMA foreign_keys = OFF")
        raw.execute("INSERT INTO embedding (space_id, tower, item_id, vector) "
                    "SELECT space_id, tower, 987654, vector FROM embedding LIMIT 1")  # fmt: skip
        raw.commit()
    (path,) = (index / "vectors").glob("*-caption-*.faiss")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def kills(
    scenarios: list[Scenario], bench: Bench, count: int, seed: int = 0
) -> Iterator[tuple[Scenario, dict[str, object]]]:
    """So many kills: four in five before or after a chosen call, the others at any time."""
    rng = random.Random(seed)
    points: dict[str, list[dict[str, object]]] = {}
    for scenario in scenarios:
        calls = bench.calls(scenario)
        own: list[dict[str, object]] = [
            {"do": do, "at": number} for number in range(1, calls + 1) for do in ("before", "after")
        ]
        rng.shuffle(own)
        points[scenario.name] = own
    for number in range(count):
        scenario = scenarios[number % len(scenarios)]
        own = points[scenario.name]
        if own and rng.random() < 0.8:
            yield scenario, own.pop()
        else:
            yield scenario, {"after": rng.uniform(0.05, 1.6)}

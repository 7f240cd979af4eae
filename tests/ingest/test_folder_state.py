"""Hypothesis changes a folder, an index follows and is cut off: against a plain picture of both."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from fakes import WORDS, FakeEncoder, FakeProvider, paint
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from mmsearch import Engine
from mmsearch.media.fit import fit
from mmsearch.media.image import decode
from mmsearch.store.writer import Writer

pytestmark = pytest.mark.slow

FOLDERS = ("a", "b", "b/c")
ENCODERS = {name: FakeEncoder(name) for name in ("one", "two")}
ENCODERS["two"].basis = np.random.default_rng(8).normal(size=(4, 16)).astype(np.float32)


class CutOff(BaseException):
    """As a kill at a commit: nothing of ours runs after it."""


class FolderMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.top = Path(tempfile.mkdtemp())
        self.folder = self.top / "photos"
        for name in FOLDERS:
            (self.folder / name).mkdir(parents=True)
        self.model, self.made = "one", 0
        self.engine = None
        self.is_in_step = False
        self.open()
        self.index()

    def teardown(self):
        self.engine.close()
        shutil.rmtree(self.top)

    def open(self, model=None):
        if self.engine is not None:
            self.engine.close()
        index = self.top / "index"
        if not index.exists():
            model = self.model
        self.engine = Engine.open(
            index, model=model, notify=lambda line: None, provider=FakeProvider(*ENCODERS.values())
        )

    def files(self):
        return sorted(path for path in self.folder.rglob("*.png"))

    def chosen(self, number):
        files = self.files()
        return files[number % len(files)]

    # -- what people do to a folder --------------------------------------------------------

    @rule(folder=st.sampled_from(FOLDERS), colour=st.sampled_from(WORDS), same=st.booleans())
    def add(self, folder, colour, same):
        self.made += 1
        mark = 1 if same else self.made % 200 + 1  # the same content may lie there twice
        paint(self.folder / folder / f"{self.made}.png", colour, mark=mark)
        self.is_in_step = False

    @precondition(lambda self: self.files())
    @rule(number=st.integers(0, 99), colour=st.sampled_from(WORDS))
    def change(self, number, colour):
        self.made += 1
        path = self.chosen(number)
        before = path.stat()
        paint(path, colour, mark=self.made % 200 + 1)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000 * self.made))
        self.is_in_step = False

    @precondition(lambda self: self.files())
    @rule(number=st.integers(0, 99), folder=st.sampled_from(FOLDERS), with_text=st.booleans())
    def move(self, number, folder, with_text):
        self.made += 1
        path = self.chosen(number)
        to = self.folder / folder / f"moved{self.made}.png"
        path.rename(to)
        text = path.with_suffix(".txt")
        if with_text and text.exists():
            text.rename(to.with_suffix(".txt"))
        self.is_in_step = False

    @precondition(lambda self: self.files())
    @rule(number=st.integers(0, 99), folder=st.sampled_from(FOLDERS))
    def copy(self, number, folder):
        self.made += 1
        shutil.copy2(self.chosen(number), self.folder / folder / f"copy{self.made}.png")
        self.is_in_step = False

    @precondition(lambda self: len(self.files()) > 1)  # an empty folder may be an unmounted disk
    @rule(number=st.integers(0, 99))
    def delete(self, number):
        self.chosen(number).unlink()
        self.is_in_step = False

    @precondition(lambda self: self.files())
    @rule(number=st.integers(0, 99), lines=st.lists(st.sampled_from(WORDS), max_size=3))
    def caption(self, number, lines):
        self.made += 1
        path = self.chosen(number).with_suffix(".txt")
        path.write_text("\n".join(f"{line} {place}" for place, line in enumerate(lines)))
        stamp = 10**18 + 1000 * self.made
        os.utime(path, ns=(stamp, stamp))
        self.is_in_step = False

    # -- what the index does ---------------------------------------------------------------

    @rule()
    def index(self):
        self.engine.index([self.folder])
        self.is_in_step = True
        self.check()

    @rule(at=st.integers(1, 6), retry=st.booleans())
    def cut_off(self, at, retry):
        left, real = [at], Writer.change

        @contextmanager
        def change(writer):
            left[0] -= 1
            if left[0] == 0:
                raise CutOff
            with real(writer) as one:
                yield one

        with mock.patch.object(Writer, "change", change):
            try:
                self.engine.index([self.folder])
            except CutOff:
                self.is_in_step = False
            else:
                self.is_in_step = True
        self.open()
        self.check_sound()
        if retry:
            self.index()

    @rule(at=st.none() | st.integers(1, 8))
    def switch(self, at):
        self.model = "two" if self.model == "one" else "one"
        self.open(self.model)
        if at is not None:
            self.cut_off(at, retry=False)
            self.check_sound()
            self.open(self.model)
        self.index()
        self.open()
        assert self.engine.status().model == self.model
        self.check()

    @rule()
    def compact(self):
        self.engine.compact()
        self.check_sound()

    @rule(folder=st.sampled_from(FOLDERS))
    def take_out(self, folder):
        held = [
            os.fsencode(self.folder / folder) + b"/" in path for path in self.held().image_paths
        ]
        if any(held):
            self.engine.remove([self.folder / folder])
            self.is_in_step = False
        self.check_sound()

    @rule()
    def reopen(self):
        self.open()
        if self.is_in_step:
            self.check()

    # -- what must hold --------------------------------------------------------------------

    def held(self):
        return self.engine.store.contents()

    def check_sound(self):
        """Nothing is damaged, and all that is in there is found."""
        assert self.engine.verify(deep=True).damages == ()
        if self.engine.store.active_space() is None:
            return
        held = self.held()
        hits = self.engine.search("red", k=500, fusion="image")
        assert sorted(os.fsencode(hit.path) for hit in hits) == sorted(held.image_paths)

    def check(self):
        """The index is what the folder is."""
        self.check_sound()
        encoder, held = ENCODERS[self.model], self.held() if self.files() else None
        if held is None:
            return
        assert sorted(held.image_paths) == sorted(map(os.fsencode, self.files()))
        captions = {}
        for owner, text in zip(held.caption_media.tolist(), held.caption_texts, strict=True):
            captions.setdefault(owner, []).append(text)
        for number, path, vector in zip(
            held.image_ids.tolist(), held.image_paths, held.image_vectors, strict=True
        ):
            pixels = fit(
                decode(Path(os.fsdecode(path)).read_bytes()).image, encoder.spec.preprocess
            )
            np.testing.assert_allclose(encoder.encode("image", pixels[None])[0], vector, atol=1e-6)
            text = Path(os.fsdecode(path)).with_suffix(".txt")
            lines = text.read_text().splitlines() if text.exists() else []
            assert sorted(captions.get(number, [])) == sorted(lines)
        vectors = encoder.encode("text", list(held.caption_texts))
        np.testing.assert_allclose(vectors, held.caption_vectors, atol=1e-6)


TestFolder = FolderMachine.TestCase
TestFolder.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)

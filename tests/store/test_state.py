"""Hypothesis drives a store against a dictionary of what must be found."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from fakes import FakeEncoder, nearest, new_media, root_at, unit_vectors
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mmsearch.store.store import Store

SPEC = FakeEncoder().spec
QUERIES = unit_vectors(np.random.default_rng(5), 3)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory()
        self.store = Store.create(Path(self.scratch.name) / "index")
        self.reader = Store(self.store.folder)
        self.images, self.captions, self.owner = {}, {}, {}
        self.rng = np.random.default_rng(0)
        self.made = 0

    def teardown(self):
        self.store.close()
        self.reader.close()
        self.scratch.cleanup()

    @rule(count=st.integers(1, 4), captions=st.integers(0, 3))
    def add(self, count, captions):
        with self.store.writer() as writer:
            space = writer.space_of(SPEC, "fp32")
            root = root_at(writer, b"/r")
            with writer.change() as change:
                for _ in range(count):
                    self.made += 1
                    vectors = unit_vectors(self.rng, 1 + captions)
                    name = f"{self.made}".encode()
                    texts = [(str(i), vector) for i, vector in enumerate(vectors[1:])]
                    number = change.add_media(
                        new_media(root, name, vectors[0], captions=texts), space
                    )
                    self.images[number] = vectors[0]
                    self.owner[name] = number
        with self.store.catalog.read() as queries:
            rows = queries.captions_of(list(self.images))
            space = queries.active_space()
            for number, own in rows.items():
                ids = [row.id for row in own]
                stored = queries.vectors_of(space.towers["text"], ids)
                for caption_id, content in stored.items():
                    self.captions[caption_id] = (number, np.frombuffer(content, "<f4"))

    @precondition(lambda self: self.owner)
    @rule(choice=st.randoms(use_true_random=False))
    def remove(self, choice):
        name = choice.choice(sorted(self.owner))
        number = self.owner.pop(name)
        del self.images[number]
        self.captions = {c: own for c, own in self.captions.items() if own[0] != number}
        with self.store.writer() as writer:
            writer.remove([b"/r/" + name])

    @rule()
    def compact(self):
        with self.store.writer() as writer:
            writer.compact()

    @rule()
    def reopen(self):
        self.store.close()
        self.store = Store(self.store.folder)

    @invariant()
    def finds_what_is_there(self):
        for store in (self.store, self.reader):
            if store.active_space() is None:
                continue
            self._check(store, "image", self.images)
            self._check(store, "caption", {c: vector for c, (_, vector) in self.captions.items()})
            self._check_words(store)

    def _check_words(self, store):
        """Kept beside the captions, and always what those make."""
        with store.catalog.read() as queries:
            kept = queries.cursor("SELECT rowid, file FROM words").fetchall()
            texts = queries.cursor("SELECT media_id, text FROM caption").fetchall()
        made = {}
        for owner, text in texts:
            made.setdefault(owner, []).append(text)
        assert {owner: sorted(text.split("\n")) for owner, text in kept} == {
            owner: sorted(own) for owner, own in made.items()
        }

    def _check(self, store, to, truth):
        answers = nearest(store, QUERIES, to, len(truth) + 3)
        for query, answer in zip(QUERIES, answers, strict=True):
            expected = sorted(((-float(v @ query), n) for n, v in truth.items()))
            assert set(answer.ids) == set(truth)
            np.testing.assert_allclose(answer.scores, [-s for s, _ in expected], atol=1e-5)
            for number, score in zip(answer.ids, answer.scores, strict=True):
                assert abs(float(truth[number] @ query) - score) < 1e-5


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)

"""Queries, terms and filters are valid from the moment they exist."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from mmsearch import Filter, Query, Term
from mmsearch.errors import UsageError
from mmsearch.types import expanded, several

RED = Term(text="red")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of them"),
        ({"text": "a", "image": "a.png"}, "give one of them"),
        ({"text": ""}, "empty text"),
        ({"text": " \n"}, "empty text"),
        ({"text": b"bytes"}, "is a str"),
        ({"image": 7}, "a path is a text"),
        ({"text": "a", "weight": 1e48}, "a weight is a number"),
        ({"text": "a", "weight": float("nan")}, "a weight is a number"),
        ({"text": "a", "weight": -float("inf")}, "a weight is a number"),
        ({"text": "a", "weight": "1"}, "a weight is a number"),
        ({"text": "a", "weight": True}, "a weight is a number"),
        ({"text": "a", "weight": 10**400}, "a weight is a number"),
    ],
)
def test_a_term_of_nonsense_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        Term(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"terms": ()}, "nothing to search for"),
        ({"terms": ("red",)}, "are `Term`s"),
        ({"to": "a video"}, "to is 'image', 'caption' or another modality, not 'a video'"),
        ({"fusion": "mean"}, "fusion is one of auto, image"),
        ({"compose": "x"}, "compose is one of auto"),
        ({"k": 0}, "k is a whole number from 1"),
        ({"k": 10**20}, "k is a whole number from 1"),
        ({"k": 2.5}, "k is a whole number"),
        ({"k": True}, "k is a whole number"),
        ({"rerank": -1}, "rerank is a whole number from 0"),
        ({"min_score": float("nan")}, "min_score is a number"),
        ({"min_score": "0.3"}, "min_score is a number"),
    ],
)
def test_a_query_of_nonsense_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        Query(**({"terms": (RED,)} | fields))


def test_what_is_meant_is_taken():
    query = Query([RED, Term(image="~/a.png", weight=np.float32(0.5))], k=np.int64(3))
    assert query.terms[0] is RED
    assert query.terms[1].image == Path.home() / "a.png"
    assert Query(RED).terms == (RED,)
    assert Filter(under="~").under == Path.home()
    assert not Filter()


def test_a_moment_with_a_zone_is_that_moment_in_local_time(monkeypatch):
    monkeypatch.setenv("TZ", "Etc/GMT-3")  # three hours ahead of UTC
    time.tzset()
    try:
        plain = datetime(2024, 5, 1, 12)
        assert Filter(after=plain).after == plain
        assert Filter(after=datetime(2024, 5, 1, 12, tzinfo=UTC)).after == datetime(2024, 5, 1, 15)
        there = timezone(timedelta(hours=5))
        assert Filter(before=datetime(2024, 5, 1, 12, tzinfo=there)).before == datetime(
            2024, 5, 1, 10
        )
        for far in (datetime(1, 1, 1, tzinfo=there), datetime(9999, 12, 31, 23, tzinfo=UTC)):
            with pytest.raises(UsageError, match="no local time is"):
                Filter(after=far)
    finally:
        monkeypatch.undo()
        time.tzset()
    for nonsense in ("2024", date(2024, 5, 1), 2024):
        with pytest.raises(UsageError, match="is a datetime"):
            Filter(after=nonsense)
    with pytest.raises(UsageError, match="a path is a text"):
        Filter(under=3)


def test_one_path_is_one_path_not_its_letters():
    assert several("abc") == ["abc"]
    assert several(Path("a")) == [Path("a")]
    assert several(["a", "b"]) == ["a", "b"]
    assert expanded("~/x") == Path.home() / "x"

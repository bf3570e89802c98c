"""Lanes: several streams of answers in threads, as one. The answers themselves are tested in test_decode.py."""

import itertools
import threading

import pytest

from medplib_jax.decode.stream import merge


def test_merging_loses_nothing():
    assert sorted(merge([iter(range(100)), iter(range(100, 150)), iter(())])) == list(range(150))


def test_an_error_in_one_stream_ends_all():
    before = threading.active_count()

    def failing():
        yield 1
        raise ValueError("prompt 7 is broken")

    with pytest.raises(ValueError, match="prompt 7 is broken"):
        list(merge([itertools.count(), failing()]))
    assert threading.active_count() == before


def test_streams_end_when_nobody_listens():
    before = threading.active_count()
    merged = merge([itertools.count(), itertools.count()])
    next(merged)
    merged.close()
    assert threading.active_count() == before

"""Values are made once, kept within bounds, shared between processes, and made anew when their file changes."""

import os

import numpy as np
import pytest

from medplib_jax.data.cache import DiskCache, MemoryCache, fingerprint
from medplib_jax.data.images import Blob


def value(number, size=10):
    return {"a": np.full(size, number, np.uint8), "b": np.arange(6, dtype=np.int32).reshape(2, 3)}


def never():
    raise AssertionError("made again")


def test_memory_keeps_the_latest_within_its_limit():
    cache = MemoryCache(limit=100)
    for number in range(3):  # 34 bytes each: two of them fit
        cache.get(number, lambda number=number: value(number))
        cache.get(0, lambda: value(0))
    assert cache.get(0, never)["a"][0] == 0 and cache.get(2, never)["a"][0] == 2
    with pytest.raises(AssertionError):
        cache.get(1, never)


def test_memory_holds_nothing_without_room():
    cache = MemoryCache(limit=0)
    cache.get("a", lambda: value(1))
    assert cache.get("a", lambda: value(2))["a"][0] == 2


def test_disk_gives_back_what_was_made(tmp_path):
    DiskCache(str(tmp_path)).get(("picture", 336, "a.png"), lambda: value(7))
    found = DiskCache(str(tmp_path)).get(("picture", 336, "a.png"), never)
    for name, array in value(7).items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert DiskCache(str(tmp_path)).get(("picture", 224, "a.png"), lambda: value(8))["a"][0] == 8


def test_a_broken_file_is_made_anew(tmp_path):
    cache = DiskCache(str(tmp_path))
    cache.get("a", lambda: value(1))
    (path,) = [os.path.join(place, name) for place, _, names in os.walk(tmp_path) for name in names]
    with open(path, "r+b") as file:
        file.truncate(20)
    assert cache.get("a", lambda: value(2))["a"][0] == 2
    assert cache.get("a", never)["a"][0] == 2


def test_an_error_leaves_no_file(tmp_path):
    with pytest.raises(AssertionError):
        DiskCache(str(tmp_path)).get("a", never)
    assert not os.listdir(tmp_path)


def test_fingerprints_change_with_the_content(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    before = fingerprint(str(path))
    assert fingerprint(str(path)) == before
    os.utime(path, ns=(1, 1))
    assert fingerprint(str(path)) != before
    assert fingerprint(Blob("a", b"one")) == fingerprint(Blob("a", b"one")) != fingerprint(Blob("a", b"two"))

"""Images and jobs on disk: whole or not at all, one client's own, bounded."""

import os
import time
from pathlib import Path

import pytest

from medplib_jax.serve.refusals import Refused
from medplib_jax.serve.store import ENTRY, Bounds, Store


def add(store: Store, client: str = "a", size: int = 1) -> str:
    with store.add("images", client) as (name, folder, content):
        (folder / "file").write_bytes(b"x" * size)
        content["note"] = size
    return name


def test_an_entry_is_there_when_it_is_whole(tmp_path):
    store = Store(tmp_path, Bounds())
    with store.add("images", "a") as (name, folder, _):
        assert store.names("images") == []
    assert store.names("images") == [name] and store.entry("images", name, "a")["client"] == "a"
    assert not folder.exists() and tmp_path.stat().st_mode & 0o777 == 0o700


def test_nothing_is_left_of_what_failed(tmp_path):
    store = Store(tmp_path, Bounds())
    with pytest.raises(OSError, match="full"), store.add("images", "a"):
        raise OSError("disk full")
    assert list((tmp_path / "images").iterdir()) == []


def test_what_a_killed_server_left_half_made_is_removed(tmp_path):
    name = add(Store(tmp_path, Bounds()))
    (tmp_path / "jobs/.half").mkdir()
    assert Store(tmp_path, Bounds()).names("images") == [name]
    assert list((tmp_path / "jobs").iterdir()) == []


@pytest.mark.parametrize("name", ["0" * 32, "..", "../images", "", "\0", "a/b", "." + "0" * 31])
def test_no_other_name_is_an_entry(tmp_path, name):
    store = Store(tmp_path, Bounds())
    with pytest.raises(Refused) as found:
        store.path("images", name, "a")
    assert found.value.status == 404


def test_another_clients_entry_is_as_if_it_were_not_there(tmp_path):
    store = Store(tmp_path, Bounds())
    name = add(store, "a")
    with pytest.raises(Refused) as found:
        store.entry("images", name, "b")
    assert found.value.status == 404


def test_number_and_size_are_bounded(tmp_path):
    store = Store(tmp_path, Bounds(entries=2, bytes=1000))
    add(store)
    add(store)
    with pytest.raises(Refused, match="keeps 2 images") as found:
        add(store)
    assert found.value.status == 429 and found.value.retry_after
    store.remove("images", store.names("images")[0])
    add(store, size=2000)
    store.remove("images", store.names("images")[0])
    with pytest.raises(Refused, match="keeps 1000 bytes"):
        add(store)


def test_entries_that_are_being_made_count(tmp_path):
    store = Store(tmp_path, Bounds(entries=1))
    with store.add("images", "a"), pytest.raises(Refused, match="keeps 1 images"):
        add(store)


def test_an_entry_may_go_while_it_is_looked_at(tmp_path, monkeypatch):
    store = Store(tmp_path, Bounds(hours=1))
    gone, kept = add(store), add(store)
    stat = Path.stat

    def stat_of_gone(path, **more):
        if path.name == gone:
            raise FileNotFoundError(path)
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", stat_of_gone)
    assert store.names("images") == [kept]
    store.sweep({})
    (tmp_path / "images" / gone / ENTRY).unlink()  # as when it is removed just after it was seen
    with pytest.raises(Refused) as found:
        store.path("images", gone, "a")
    assert found.value.status == 404


def test_a_stranger_keeps_no_entry_alive(tmp_path):
    store = Store(tmp_path, Bounds(hours=1))
    name = add(store)
    os.utime(tmp_path / "images" / name, (0, 0))
    with pytest.raises(Refused):
        store.path("images", name, "b")
    store.sweep({})
    assert store.names("images") == []


def test_what_was_not_used_for_long_goes_unless_it_is_needed(tmp_path):
    store = Store(tmp_path, Bounds(hours=1))
    old, needed, used = add(store), add(store), add(store)
    for name in (old, needed, used):
        os.utime(tmp_path / "images" / name, (time.time() - 7200,) * 2)
    store.entry("images", used, "a")
    store.sweep({"images": {needed}})
    assert set(store.names("images")) == {needed, used}

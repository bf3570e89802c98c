"""The lock of a folder between processes, and between hosts that share nothing but its file."""

import json
import signal
import subprocess
import sys
import threading

import pytest

from medplib_jax.parallel import lock
from medplib_jax.parallel.lock import FolderInUse, folder_lock
from tests.paths import ROOT

HOLD = """
import signal, sys
from pathlib import Path
from medplib_jax.parallel.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process of this host that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_by_the_first_ones_name(holder, tmp_path):
    with pytest.raises(FolderInUse, match=rf"{tmp_path}/run is in use by process {holder.pid} on .* since 20\d\d-"):
        with folder_lock(tmp_path / "run" / ".lock"):
            raise AssertionError("both are in")


def test_a_killed_holder_leaves_the_folder_free(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with folder_lock(tmp_path / "run" / ".lock"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["process"] != holder.pid


def test_one_that_waits_gets_it_when_it_is_given_back(tmp_path):
    file, order = tmp_path / ".lock", []

    def second():
        with folder_lock(file, wait_seconds=60):
            order.append("second")

    with folder_lock(file):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_an_error_inside_gives_it_back(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), folder_lock(tmp_path / ".lock"):
            raise KeyError


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The file of a holder on another host, whose lock this host does not see."""
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.02)
    file = tmp_path / ".lock"

    def write(beat: int) -> None:
        words = {"host": "some-other-host", "process": 7, "since": "2026-01-01", "beat": beat}
        file.write_text(json.dumps(words))

    write(0)
    return file, write


def test_a_holder_on_another_host_that_beats_is_named(elsewhere, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 60.0)  # a busy machine may beat late
    file, write = elsewhere
    over, beats = threading.Event(), iter(range(1, 10**6))

    def beat():
        while not over.wait(0.05):
            write(next(beats))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(FolderInUse, match="process 7 on some-other-host"), folder_lock(file):
            raise AssertionError("both are in")
    finally:
        over.set()
        thread.join()


def test_one_that_does_not_beat_is_taken_over(elsewhere):
    file, _ = elsewhere
    with folder_lock(file):
        assert json.loads(file.read_text())["host"] != "some-other-host"


def test_a_file_system_without_locks_is_told_by_the_beat(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with folder_lock(tmp_path / ".lock"), pytest.raises(FolderInUse, match="is in use by process"):
        with folder_lock(tmp_path / ".lock"):
            raise AssertionError("both are in")
    with folder_lock(tmp_path / ".lock"):
        pass

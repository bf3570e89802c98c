"""One process at a time writes a folder, on one machine or on a disk that several machines share.

The lock is a file that says who holds it: host, process and since when. On the holder's own host the operating system
keeps it (`flock`), and frees it with the process, even one that was killed by SIGKILL. Hosts whose file system does
not share such locks tell by a beat: the holder writes the file anew every BEAT_SECONDS, and one that has not moved
for STALE_SECONDS is free. Clocks need not agree.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

BEAT_SECONDS = 10.0
STALE_SECONDS = 45.0
POLL_SECONDS = 0.2


class FolderInUse(ValueError):
    """Another process holds the lock of a folder."""


@contextlib.contextmanager
def folder_lock(file: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Holds the lock `file` (its folder is made) within the context; FolderInUse, naming the holder, when it is not
    free in `wait_seconds`.

    A lock that a process of another host left behind is taken over once it was seen not to move for STALE_SECONDS.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    while (descriptor := _take(file)) is None:
        if time.monotonic() > deadline:
            raise FolderInUse(_in_use(file))
        time.sleep(POLL_SECONDS)
    try:
        with _beating(descriptor):
            yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take(file: Path) -> int | None:
    """The open lock file, now held by this process; None while another holds it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    died_here = socket.gethostname()  # a holder of this host, if the lock that it had is free
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        died_here = ""  # a file system without locks: the beat alone tells
    if _beats(file, but_not=died_here):
        os.close(descriptor)
        return None
    return descriptor


def _beats(file: Path, but_not: str) -> bool:
    """Whether the holder that the file names is alive, by its beat; one of the host `but_not` is not."""
    before = file.read_bytes()
    if not before or _holder(before).get("host") == but_not:
        return False
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        if (now := file.read_bytes()) != before:
            return bool(now)  # empty: it was given back
    return False


def _holder(content: bytes) -> dict:
    try:
        return json.loads(content)
    except ValueError:  # it is being written
        return {}


def _in_use(file: Path) -> str:
    holder = _holder(file.read_bytes())
    who = f"process {holder['process']} on {holder['host']} since {holder['since']}" if holder else "another process"
    return f"{file.parent} is in use by {who}: expected one at a time; wait until it ends, or take another folder"


@contextlib.contextmanager
def _beating(descriptor: int) -> Iterator[None]:
    holder = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S%z")}
    over = threading.Event()

    def beat():
        words = json.dumps(holder | {"beat": secrets.token_hex(4)}).encode()
        os.pwrite(descriptor, words, 0)
        os.ftruncate(descriptor, len(words))
        os.fsync(descriptor)

    def keep_beating():
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a disk that is away for a moment
                beat()

    beat()
    thread = threading.Thread(target=keep_beating, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

"""Prepared arrays kept for the next time: in memory, bounded, and on disk, for later epochs and runs."""

import collections
import hashlib
import os
import threading
from collections.abc import Callable, Hashable

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from medplib_jax.data.images import Blob

VERSION = 2  # of what the keys stand for; another number leaves all old files aside
Arrays = dict[str, np.ndarray]


class MemoryCache:
    """Least recently used values by key, bounded by the bytes of their arrays. Threads share it."""

    def __init__(self, limit: int):
        self._limit, self._bytes = limit, 0
        self._values: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Arrays]) -> Arrays:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._bytes += _bytes(value)
            while self._bytes > self._limit:
                self._bytes -= _bytes(self._values.popitem(last=False)[1])
        return value


class DiskCache:
    """Values by key, one file each, never removed. Processes share the folder: a file is there when it is whole.

    A key must say all that the value depends on, `fingerprint` of its files included. A file that cannot be read is
    made anew.
    """

    def __init__(self, folder: str):
        self._folder = folder

    def get(self, key: Hashable, make: Callable[[], Arrays]) -> Arrays:
        digest = hashlib.blake2b(repr((VERSION, key)).encode(), digest_size=16).hexdigest()
        path = os.path.join(self._folder, digest[:2], digest[2:])
        try:
            return safetensors.numpy.load_file(path)  # a fifth of the time of `load` on the bytes
        except (OSError, SafetensorError):
            value = make()
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{os.getpid()}.{threading.get_ident()}"
        with open(temporary, "wb") as file:
            file.write(safetensors.numpy.save(value))
        os.replace(temporary, path)
        return value


def fingerprint(file: str | Blob) -> tuple:
    """What changes when a file's content does: size and time of a file, the content's hash of a blob."""
    if isinstance(file, Blob):
        return file.name, hashlib.blake2b(file.content, digest_size=16).hexdigest()
    status = os.stat(file)
    return file, status.st_size, status.st_mtime_ns


def _bytes(value: Arrays) -> int:
    return sum(array.nbytes for array in value.values())

"""What the model made of a picture, and of prompts up to their last picture, kept by content."""

import collections
import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")


def content_key(*arrays: np.ndarray) -> bytes:
    """A digest of the arrays' shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.digest()


class FeatureCache:
    """The most recently used features, at most `capacity` bytes of them. For one thread."""

    def __init__(self, capacity: int):
        self._capacity, self._bytes = capacity, 0
        self._kept: collections.OrderedDict[bytes, Any] = collections.OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: bytes, make: Callable[[], T]) -> T:
        """The array or arrays of this key, made if they are not there."""
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        features = make()
        self._kept[key] = features
        self._bytes += _size(features)
        while self._bytes > self._capacity and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= _size(dropped)
        return features


def _size(arrays: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(arrays))

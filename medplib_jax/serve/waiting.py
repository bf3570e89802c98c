"""Who waits for an answer: a bounded queue that takes turns over clients, so that none can keep the others waiting."""

import collections
import threading
from typing import Protocol


class Waiting(Protocol):
    """What stands in the queue."""

    client: str


class FairQueue:
    """Items of each client in their order; clients in turns.

    At most `capacity` items wait in all. Safe to use from several threads.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._lines: collections.OrderedDict[str, collections.deque] = collections.OrderedDict()
        self._count = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._count

    def put(self, item: Waiting) -> bool:
        """False when the queue is full; then nothing is added."""
        with self._changed:
            if self._count >= self._capacity:
                return False
            self._lines.setdefault(item.client, collections.deque()).append(item)
            self._count += 1
            self._changed.notify()
            return True

    def take(self, count: int) -> list:
        """Up to `count` items, one client after the other."""
        with self._changed:
            taken = []
            while self._count and len(taken) < count:
                client, line = self._lines.popitem(last=False)
                taken.append(line.popleft())
                self._count -= 1
                if line:
                    self._lines[client] = line
            return taken

    def wait(self, seconds: float) -> None:
        """Returns when something waits, or after that time."""
        with self._changed:
            if not self._count:
                self._changed.wait(seconds)

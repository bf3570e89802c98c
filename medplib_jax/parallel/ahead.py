"""Work that is done by a few threads before it is asked for."""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

THREADS = 6  # most wait for the disk while two or three compute


def ahead(tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What the tasks return, in their order; a few threads work on the next ones meanwhile."""
    tasks, running = iter(tasks), collections.deque()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        try:
            running.extend(map(pool.submit, itertools.islice(tasks, THREADS)))
            while running:
                made = running.popleft().result()
                running.extend(map(pool.submit, itertools.islice(tasks, 1)))
                yield made
        finally:
            pool.shutdown(cancel_futures=True)

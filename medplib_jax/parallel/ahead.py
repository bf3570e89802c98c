"""Work that is done by a few threads before it is asked for."""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

THREADS = 6  # most wait for the disk while two or three compute
MAX_BYTES = 1 << 30  # of all tasks under way; a larger task runs alone


def ahead(tasks: Iterable[Callable[[], T]], sizes: Iterable[int] = itertools.repeat(0)) -> Iterator[T]:
    """What the tasks return, in their order; a few threads work on the next ones meanwhile.

    `sizes`: the bytes that each task holds until what it returned is no longer used, that is until the next one's is
    asked for. A task begins only when it and all others under way hold at most `MAX_BYTES`.
    """
    todo, running, held = zip(tasks, sizes, strict=False), collections.deque(), 0  # sizes may never end
    upcoming = next(todo, None)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        try:
            while running or upcoming:
                while upcoming and len(running) < THREADS and (not running or held + upcoming[1] <= MAX_BYTES):
                    task, size = upcoming
                    running.append((pool.submit(task), size))
                    held, upcoming = held + size, next(todo, None)
                yield running[0][0].result()
                held -= running.popleft()[1]
        finally:
            pool.shutdown(cancel_futures=True)

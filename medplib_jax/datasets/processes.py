"""Who makes the shards of a dataset: processes of this machine, or a runner of Apache Beam."""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Shard = TypeVar("Shard")
Result = TypeVar("Result")
FEW = 64  # fewer items are not worth starting processes for


@dataclasses.dataclass(frozen=True)
class Workers:
    """`count` processes of this machine (None: one for each core; 0: this process), or Beam's `runner` by its name.

    `options` are words for Beam, such as --direct_num_workers=4, which has workers of its own: ValueError for a count
    beside a runner, for options without one, and where Beam is wanted and not installed.
    """

    count: int | None = None
    runner: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self):
        if self.runner:
            from medplib_jax.datasets import beam

            if self.count is not None:
                raise ValueError(f"--workers: expected without --beam_runner, found {self.count}; see --beam_options")
            beam.check(self.runner)
        elif self.options:
            raise ValueError(f"--beam_options: expected with --beam_runner, found {' '.join(self.options)}")


CORES, HERE = Workers(), Workers(0)


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Where Beam's workers leave results, so that a killed run goes on with them; unused by local processes.

    folder: seen by all workers under this path. key: of a shard, changes with all that its result is made of (None: a
    result is never used again). whole: whether the files that a result tells of (None: it tells of
    none) are still there.
    """

    folder: str
    key: Callable[..., str] | None = None
    whole: Callable[..., bool] | None = None


def map_shards(
    make: Callable[[Shard], Result], shards: Sequence[Shard], workers: Workers, keeping: Keeping | None = None
) -> Iterator[Result]:
    """What `make` returns of each shard, in order. `make`, shards and results are pickled. Beam needs `keeping`.

    After an exception, Ctrl-C too, the shards under way are finished and no other is begun. RuntimeError for what Beam
    says of a failure.
    """
    if workers.runner:
        from medplib_jax.datasets import beam

        yield from beam.map_shards(make, shards, workers.runner, workers.options, keeping)
    elif workers.count == 0:
        yield from map(make, shards)
    else:
        with make_pool(workers.count) as pool:
            waiting = collections.deque(pool.submit(make, shard) for shard in shards)
            try:
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def map_items(
    make: Callable[[Shard], Result], items: Sequence[Shard], processes: int | None = None
) -> Iterator[Result]:
    """What `make` returns of each of many small items, in order. `processes`: None takes every core."""
    processes = processes or os.cpu_count() or 1
    if processes == 1 or len(items) < FEW:
        yield from map(make, items)
        return
    with make_pool(processes) as pool:
        yield from pool.map(make, items, chunksize=16)


def make_pool(workers: int | None = None) -> concurrent.futures.ProcessPoolExecutor:
    """A pool of fresh processes (None: one for each core) that end with this one, however it ends.

    Without that, the workers of a killed run go on writing beside those of the next one.
    """
    return concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )


def _end_with_parent() -> None:
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

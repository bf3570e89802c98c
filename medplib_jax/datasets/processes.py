"""Worker processes of the builders."""

import concurrent.futures
import multiprocessing
import os
import threading


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

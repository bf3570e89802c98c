import functools
import threading

import pytest

from medplib_jax.parallel import ahead as module
from medplib_jax.parallel.ahead import THREADS, ahead

LIMIT = 10


@pytest.fixture
def held(monkeypatch):
    """A function that runs tasks of these sizes; returns what came out and the most bytes that were held at once."""
    monkeypatch.setattr(module, "MAX_BYTES", LIMIT)
    lock, all_run = threading.Lock(), threading.Event()

    def run(sizes, together):
        holding, most = [], []

        def task(size):
            with lock:
                holding.append(size)
                most.append(sum(holding))
                if len(holding) == together:
                    all_run.set()
            assert all_run.wait(60)
            return size

        made = []
        for size in ahead((functools.partial(task, size) for size in sizes), sizes):
            made.append(size)
            with lock:
                holding.remove(size)
        return made, max(most)

    return run


def test_tasks_hold_no_more_than_the_limit(held):
    sizes = [4, 5, 3, 1, 6, 2, 2, 9, 1]
    made, most = held(sizes, together=2)
    assert made == sizes and most <= LIMIT


def test_a_task_over_the_limit_runs_alone(held):
    sizes = [1, 25, 1, 25, 25]
    assert held(sizes, together=1) == (sizes, 25)


def test_small_tasks_use_all_threads(held):
    sizes = [0] * 3 * THREADS
    assert held(sizes, together=THREADS) == (sizes, 0)


def test_an_error_ends_it_and_begins_no_more():
    begun = []

    def task(number):
        begun.append(number)
        if number == 1:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(ahead(functools.partial(task, number) for number in range(100)))
    assert len(begun) <= 2 * THREADS

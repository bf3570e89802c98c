"""Clients take turns, nothing is lost, and the queue is bounded."""

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from medplib_jax.serve.waiting import FairQueue


@dataclasses.dataclass(frozen=True)
class Item:
    client: str
    number: int


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.integers(1, 7))
def test_everything_comes_out_once_and_each_client_in_order(clients, together):
    queue = FairQueue(100)
    items = [Item(client, number) for number, client in enumerate(clients)]
    assert all(queue.put(item) for item in items)
    taken = list(itertools.chain.from_iterable(iter(lambda: queue.take(together), [])))
    assert sorted(taken, key=lambda item: item.number) == items
    for client in set(clients):
        own = [item.number for item in taken if item.client == client]
        assert own == sorted(own)


def test_one_client_with_many_questions_does_not_hold_the_others():
    queue = FairQueue(100)
    for number in range(10):
        queue.put(Item("many", number))
    queue.put(Item("one", 0))
    assert Item("one", 0) in queue.take(2)


def test_a_full_queue_takes_nothing():
    queue = FairQueue(2)
    assert queue.put(Item("a", 0)) and queue.put(Item("b", 0)) and not queue.put(Item("c", 0))
    assert len(queue) == 2 and len(queue.take(5)) == 2 and queue.put(Item("c", 0))

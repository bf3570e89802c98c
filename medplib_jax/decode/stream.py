"""Answers to a stream of prompts, as they end (continuous batching).

A slot whose answer has ended is refilled with the next prompt while the other slots go on. A lane is a thread with
slots of its own; several lanes take prompts from the same stream.
"""

import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from medplib_jax.batch import Batch, Params
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.slots import Generation, Slots
from medplib_jax.parallel.sharding import BATCH_AXES, axis_size

# Each lane reads all weights of the decoder for each token that it draws. A core's cache (a few tens of MB on servers)
# holds the weights of a decoder of at most this many bytes, so that several lanes cost no traffic to memory.
CACHED_WEIGHTS = 2**25
ROWS_PER_LANE = 8  # with more slots, the KV cache of the demo's model no longer fits there beside the weights


def stream_answers(
    generator: Generator,
    prompts: Iterable[Batch],
    *,
    slots: int,
    refill: int,
    lanes: int = 1,
    seed: int = 0,
    limits: Mapping[int, int] | None = None,
) -> Iterator[tuple[Batch, Generation]]:
    """Answers as they end: (prompt, generation) of one record each, with a batch axis of 1, on the host.

    prompts: batches of one length; filler rows are left out. slots: answers in the making, and refill: prompts that are
    run together once as many slots are free (`refill` = `slots` are static batches); both count per device of the data
    and fsdp axes. lanes: threads that share these slots out, each filling and running its own (`lanes_for`). limits:
    most tokens of a record's answer where it is less than the generator's `max_new_tokens`. ValueError unless 1 <=
    refill <= slots and 1 <= lanes <= slots: more prompts than slots would wait for ever.
    """
    if not (1 <= refill <= slots and 1 <= lanes <= slots):
        raise ValueError(
            f"slots {slots}, refill {refill}, lanes {lanes}: expected 1 <= refill <= slots and 1 <= lanes <= slots"
        )
    shared, refill = _Shared(_rows_of(prompts)), max(1, refill // lanes)
    streams = [Lane(generator, slots // lanes, refill, seed, limits or {}).answers(shared) for _ in range(lanes)]
    yield from streams[0] if lanes == 1 else merge(streams)


def lanes_for(params: Params, slots: int) -> int:
    """How many lanes `slots` answers in the making are best spread over:

    One, but on a CPU several for a model so small that its steps keep only one core busy. Not a matter of how many
    cores there are, so that every machine runs the same programs and gets the same answers.
    """
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(params["llm"])) <= CACHED_WEIGHTS
    return max(1, slots // ROWS_PER_LANE) if small and jax.default_backend() == "cpu" else 1


class Lane:
    """Slots of one generator, the prompts in them, and the answers that still wait for their masks."""

    def __init__(self, generator: Generator, slots: int, refill: int, seed: int, limits: Mapping[int, int]):
        self._generator, self._seed, self._limits = generator, seed, limits
        self._parts = axis_size(generator.mesh, BATCH_AXES)
        self._refill = refill
        self._asked: list[Batch | None] = [None] * (slots * self._parts)  # the prompt in each slot
        self._ended: list[tuple[Batch, Generation, np.ndarray]] = []  # still without masks
        self._state: Slots | None = None

    def answers(self, waiting: Iterator[Batch]) -> Iterator[tuple[Batch, Generation]]:
        """Until nothing waits any more."""
        exhausted, together = False, self._refill * self._parts
        while True:
            while not exhausted and self._asked.count(None) >= together:
                exhausted = not self._start(waiting)
            if not any(self._asked):
                break
            self._ended += self._advance(0 if exhausted else len(self._asked) - together)
            while len(self._ended) >= together:
                yield from self._with_masks(self._ended[:together])
                self._ended = self._ended[together:]
        if self._ended:
            yield from self._with_masks(self._ended)

    def _start(self, waiting: Iterator[Batch]) -> bool:
        """Runs prompts and puts them into free slots. False: fewer were waiting than there was room for."""
        index_DxR, places = _free_slots(self._asked, self._parts, self._refill)
        chosen = list(itertools.islice(waiting, len(places)))
        if chosen:
            rows: list[Batch | None] = [None] * index_DxR.size
            for prompt, (row, slot) in zip(chosen, places[: len(chosen)], strict=True):
                rows[row] = self._asked[slot] = prompt
            for row, _ in places[len(chosen) :]:
                index_DxR[np.unravel_index(row, index_DxR.shape)] = len(self._asked)
            batch, most = stack_rows(rows), self._generator.options.max_new_tokens
            limits_P = np.array(
                [min(self._limits.get(record, most), most) for record in batch.record.tolist()], np.int32
            )
            draws = self._generator.draws(self._seed, batch.record)
            self._state = self._generator.start(self._state, batch, limits_P, draws, index_DxR, len(self._asked))
        return len(chosen) == len(places)

    def _advance(self, keep: int) -> Iterator[tuple[Batch, Generation, np.ndarray]]:
        """Draws tokens until no more than `keep` slots are active and empties those whose answer ended:

        Its prompt, its answer without masks, and the states [1, M, D] that prompt these.
        """
        state, seg_hidden, mask_valid = self._generator.advance(self._state, keep)
        self._state = state
        fetched = jax.device_get((state.active, state.tokens, state.lengths, mask_valid, state.choices, seg_hidden))
        for slot, prompt in enumerate(self._asked):
            if prompt is not None and not fetched[0][slot]:
                tokens, lengths, valid, choices, hidden = jax.tree.map(
                    lambda x, slot=slot: x[slot : slot + 1], fetched[1:]
                )
                self._asked[slot] = None
                yield prompt, Generation(tokens, lengths, valid, None, None, choices), hidden

    def _with_masks(self, ended: Sequence[tuple[Batch, Generation, np.ndarray]]) -> Iterator[tuple[Batch, Generation]]:
        """Draws the masks of as many answers as are refilled at most, those that have any, in one batch."""
        speaking, drawn = [i for i, (_, generation, _) in enumerate(ended) if generation.mask_valid.any()], {}
        if speaking:
            fillers = self._refill * self._parts - len(speaking)
            batch = stack_rows([ended[i][0] for i in speaking] + [None] * fillers)
            hidden = np.pad(np.concatenate([ended[i][2] for i in speaking]), ((0, fillers), (0, 0), (0, 0)))
            logits, predicted_iou = jax.device_get(self._generator.masks(hidden, batch))
            drawn = {i: (logits[k : k + 1], predicted_iou[k : k + 1]) for k, i in enumerate(speaking)}
        for i, (prompt, generation, _) in enumerate(ended):
            M, grid = generation.mask_valid.shape[1], self._generator.mask_grid
            nothing = (np.zeros((1, M, grid, grid), np.float32), np.zeros((1, M), np.float32)) if M else (None, None)
            logits, predicted_iou = drawn.get(i, nothing)
            yield prompt, generation.replace(mask_logits=logits, predicted_iou=predicted_iou)


def merge(streams: Sequence[Iterator]) -> Iterator:
    """The items of all streams as they come, each stream run in a thread of its own.

    The first error in one ends all.
    """
    ready, closed, end = queue.Queue(len(streams)), threading.Event(), object()

    def run(stream):
        try:
            for item in stream:
                ready.put((item, None))
                if closed.is_set():
                    break
        except BaseException as error:  # whatever it is, it must not be lost with the thread
            ready.put((None, error))
        finally:
            ready.put(end)

    threads = [threading.Thread(target=run, args=[stream]) for stream in streams]
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        while running:
            found = ready.get()
            if found is end:
                running -= 1
                continue
            item, error = found
            if error:
                raise error
            yield item
    finally:
        closed.set()
        while running:  # a thread may wait for room
            running -= ready.get() is end
        for thread in threads:
            thread.join()


class _Shared:
    """An iterator that several threads may take from."""

    def __init__(self, items: Iterator):
        self._items, self._lock = items, threading.Lock()

    def __iter__(self):
        return self

    def __next__(self):
        with self._lock:
            return next(self._items)


def _free_slots(asked: Sequence[Batch | None], parts: int, refill: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Where the next prefill may go:

    [parts, refill] slots within each device (beyond them: nowhere), and the (row, slot) pairs meant.
    """
    slots = len(asked) // parts
    index, places = np.full((parts, refill), slots, np.int32), []
    for part in range(parts):
        free = [slot for slot in range(slots) if asked[part * slots + slot] is None][:refill]
        index[part, : len(free)] = free
        places += [(part * refill + r, part * slots + slot) for r, slot in enumerate(free)]
    return index, places


def _rows_of(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for i in np.flatnonzero(np.asarray(batch.record) >= 0):
            yield jax.tree.map(lambda x, i=i: x[i : i + 1], batch)


def stack_rows(rows: Sequence[Batch | None]) -> Batch:
    """One batch of single rows; filler rows where there is none."""
    if len(rows) == 1 and rows[0] is not None:
        return rows[0]
    filler = next(row for row in rows if row is not None)
    filler = filler.replace(record=np.full_like(filler.record, -1))
    return jax.tree.map(lambda *x: np.concatenate(x), *[filler if row is None else row for row in rows])

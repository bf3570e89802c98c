"""What is in each batch: a pure function of the seed, so that the position in the data IS the step number."""

import functools
import math
from collections.abc import Sequence

import numpy as np

MAX_REPLACEMENTS = 100  # bad records in a row before giving up on a row


class BatchPlan:
    """Which records make up the batch of a step: a pure function of the arguments and the step.

    lengths: one array per source, the final length of each record; 0 leaves a record out. Records are numbered through
    all sources. Every epoch is shuffled anew. Batches hold records of one bucket; what does not fill a batch joins the
    next longer bucket, and what is left in the end makes one batch that is filled up with -1. So, without weights, an
    epoch has each record exactly once. With `weights`, an epoch has the same number of rows, shared among the sources
    by weight; a source starts over when it is used up. With `groups`, a row holds several records: what is said of
    records above goes for groups, and groups[i] are the records of group i.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        bucket_lengths: Sequence[int],
        batch_size: int,
        seed: int,
        weights: Sequence[float] = (),
        groups: Sequence[np.ndarray] = (),
    ):
        self._groups = groups
        self._lengths = np.concatenate([np.asarray(one, np.int64) for one in lengths])
        starts = np.cumsum([0, *map(len, lengths)])
        self._sources = [start + np.flatnonzero(np.asarray(one)) for start, one in zip(starts, lengths, strict=False)]
        self._bucket_lengths = np.asarray(bucket_lengths)
        self.batch_size, self._seed = batch_size, seed
        total = sum(map(len, self._sources))
        if not total:
            raise ValueError("no usable record in any source")
        if self._lengths.max() > self._bucket_lengths[-1]:
            raise ValueError(
                f"a record of length {self._lengths.max()} does not fit the longest bucket {self._bucket_lengths[-1]}"
            )
        self._shares = _shares(total, weights) if weights else [len(source) for source in self._sources]
        if any(share and not len(source) for share, source in zip(self._shares, self._sources, strict=True)):
            raise ValueError("a source with a positive weight has no usable record")
        self.steps_per_epoch = math.ceil(total / batch_size)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled_epoch)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled_epoch)

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """Length of the bucket and the record (or group) numbers of a step.

        The numbers are int64 [batch_size]; -1 where a row is left empty.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[position]

    def records(self, number: int) -> tuple[int, ...]:
        """The records of a row with this number in its `batch`; none for -1."""
        if number < 0:
            return ()
        return tuple(self._groups[number].tolist()) if len(self._groups) else (int(number),)

    def replacements(self, step: int, row: int) -> np.ndarray:
        """Records of the batch's bucket to try, in this order, in place of the one in this row."""
        bucket, _ = self.batch(step)
        usable = np.concatenate([source for share, source in zip(self._shares, self._sources, strict=True) if share])
        same = usable[self._bucket_of(usable) == np.searchsorted(self._bucket_lengths, bucket)]
        return np.random.default_rng([self._seed, 2, step, row]).permutation(same)[:MAX_REPLACEMENTS]

    def generator(self, step: int, row: int) -> np.random.Generator:
        """Random numbers for the augmentation of a row."""
        return np.random.default_rng([self._seed, 3, step, row])

    def _bucket_of(self, records: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._bucket_lengths, self._lengths[records])

    def _shuffled_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = np.random.default_rng([self._seed, 0, epoch])
        order = rng.permutation(np.concatenate([self._draw(source, epoch) for source in range(len(self._sources))]))
        bucket_of = self._bucket_of(order)
        batches, rest = [], order[:0]
        for bucket in range(len(self._bucket_lengths)):
            rows = np.concatenate([rest, order[bucket_of == bucket]])
            full = len(rows) // self.batch_size * self.batch_size
            batches.extend(rows[:full].reshape(-1, self.batch_size))
            rest = rows[full:]
        if len(rest):
            batches.append(np.pad(rest, (0, self.batch_size - len(rest)), constant_values=-1))
        buckets = [int(self._bucket_lengths[self._bucket_of(rows[rows >= 0]).max()]) for rows in batches]
        return [(buckets[i], batches[i]) for i in rng.permutation(len(batches))]

    def _draw(self, source: int, epoch: int) -> np.ndarray:
        """The source's rows of an epoch: a stretch of the endless row of its permutations."""
        records, share = self._sources[source], self._shares[source]
        if not share:
            return records[:0]
        first, last = epoch * share, (epoch + 1) * share
        passes = range(first // len(records), -(-last // len(records)))
        stream = np.concatenate(
            [np.random.default_rng([self._seed, 1, source, i]).permutation(records) for i in passes]
        )
        return stream[first - passes.start * len(records) :][:share]


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights that sum to the total (largest remainders)."""
    exact = np.asarray(weights, np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares.tolist()

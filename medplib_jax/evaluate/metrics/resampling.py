"""How sure a metric is: bootstrap intervals, and paired tests between two sets of answers to the same questions.

Records are resampled in groups (the questions about one image), because answers about one picture are not independent.
Everything is a product of a matrix of counts with the sums of each group, so that thousands of resamples of a file take
a fraction of a second.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from medplib_jax.evaluate.metrics.summary import Statistic

CONFIDENCE = 0.95
BOOTSTRAPS = 2_000
PERMUTATIONS = 10_000
_TIE = 1e-6  # differences this close count as equal: sums are float32
_CHUNK = 4_000_000  # numbers in a matrix of counts, which bounds the memory


def grouped(statistic: Statistic, group_N: np.ndarray, count: int) -> Statistic:
    """The statistic of `count` groups of its records; record n belongs to group_N[n]."""
    sums = [np.bincount(group_N, weights=column, minlength=count) for column in statistic.parts.T]
    return dataclasses.replace(statistic, parts=np.stack(sums, axis=1))


def bootstrap(blocks: Sequence[tuple[np.ndarray, Sequence[Statistic]]], count: int, seed: int) -> list[np.ndarray]:
    """Values [BOOTSTRAPS, statistics] of each block when `count` groups are resampled; NaN where a resample counts
    nothing.

    A block is (indices [n] of the groups that it looks at, statistics of these n groups). All blocks see the same
    resamples.
    """
    parts = [(members, *_side_by_side([statistic.parts for statistic in statistics])) for members, statistics in blocks]
    found: list[list[np.ndarray]] = [[] for _ in blocks]
    rng = np.random.default_rng(seed)
    for size in _chunks(BOOTSTRAPS, count):
        drawn_RxG = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float32)
        for values, (members, columns, edges), (_, statistics) in zip(found, parts, blocks, strict=True):
            resampled = np.split(drawn_RxG[:, members] @ columns, edges, axis=1)
            values.append(
                np.stack(
                    [statistic.of_sums(sums) for statistic, sums in zip(statistics, resampled, strict=True)], axis=1
                )
            )
    return [np.concatenate(values) for values in found]


def intervals(values_RxN: np.ndarray) -> np.ndarray:
    """Percentile intervals [2, N] (low, high) at CONFIDENCE; NaN where less than half of the resamples have a value."""
    ordered = np.sort(values_RxN, axis=0)  # NaN last
    known_N = np.count_nonzero(~np.isnan(ordered), axis=0)
    place_2xN = np.array([[(1 - CONFIDENCE) / 2], [(1 + CONFIDENCE) / 2]]) * np.maximum(known_N - 1, 0)
    below = np.floor(place_2xN).astype(int)
    low, high = (
        np.take_along_axis(ordered, np.minimum(at, np.maximum(known_N - 1, 0)), axis=0) for at in (below, below + 1)
    )
    return np.where(2 * known_N >= len(ordered), low + (high - low) * (place_2xN - below), np.nan)


def paired_p_values(
    blocks: Sequence[tuple[np.ndarray, Sequence[tuple[Statistic, Statistic]]]], count: int, seed: int
) -> list[list[float]]:
    """For each pair of each block the two-sided p of the hypothesis that its two sets of answers could be exchanged (a
    permutation test).

    Blocks as in `bootstrap`, with pairs (a, b) of one metric. Each permutation exchanges the answers in a random half
    of the groups and compares the metrics' difference with the observed one. NaN when one of the two has no value.
    """
    parts = [(members, *_side_by_side([b.parts - a.parts for a, b in pairs])) for members, pairs in blocks]
    observed = [np.array([abs(a.value() - b.value()) for a, b in pairs]) for _, pairs in blocks]
    at_least = [np.zeros(len(pairs)) for _, pairs in blocks]
    rng = np.random.default_rng(seed)
    for size in _chunks(PERMUTATIONS, count):
        exchanged_PxG = rng.integers(0, 2, (size, count), np.int8).astype(np.float32)
        for (members, columns, edges), (_, pairs), seen, hits in zip(parts, blocks, observed, at_least, strict=True):
            for i, moved in enumerate(np.split(exchanged_PxG[:, members] @ columns, edges, axis=1)):
                of_a, of_b = (
                    statistic.of_sums(statistic.parts.sum(0) + sign * moved)
                    for statistic, sign in zip(pairs[i], (1, -1), strict=True)
                )
                hits[i] += np.sum(np.abs(of_a - of_b) >= seen[i] - _TIE)
    p_values = (
        (1 + hits) / (1 + PERMUTATIONS) + 0 * seen for hits, seen in zip(at_least, observed, strict=True)
    )  # 0 * NaN is NaN
    return [values.tolist() for values in p_values]


def _side_by_side(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The arrays as columns of one, float32, and where to split it again."""
    return np.concatenate(arrays, axis=1, dtype=np.float32), np.cumsum([array.shape[1] for array in arrays])[:-1]


def _chunks(total: int, width: int) -> Iterator[int]:
    """Sizes that add up to `total`, each at most _CHUNK / width."""
    size = max(1, _CHUNK // max(width, 1))
    for start in range(0, total, size):
        yield min(size, total - start)

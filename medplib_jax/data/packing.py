"""Several short conversations in one row: which records share a row."""

import numpy as np

OPEN_ROWS = 64  # rows that are tried for a record before another one is begun


def pack(costs: np.ndarray, limits: tuple[int, ...], alone: np.ndarray, seed: int) -> list[np.ndarray]:
    """Groups of records that fit into a row each: first fit, in a random order.

    Each column of `costs` sums to at most its limit in every group. costs: int [n, k], such as positions, images and
    regions of each record; a row of zeros leaves a record out. alone: bool [n], records that share with none. A group
    is an ascending int64 array of row numbers; each usable record is in one.
    """
    usable = np.flatnonzero(costs.any(axis=1))
    groups = [np.array([index]) for index in usable[alone[usable]]]
    open_groups: list[list[int]] = []
    left = np.zeros((0, len(limits)), np.int64)
    for index in np.random.default_rng([seed, 4]).permutation(usable[~alone[usable]]):
        fits = (left >= costs[index]).all(axis=1)
        if fits.any():
            place = int(np.argmax(fits))
        else:
            if len(open_groups) == OPEN_ROWS:
                fullest = int(np.argmin(left[:, 0]))
                groups.append(np.sort(open_groups.pop(fullest)))
                left = np.delete(left, fullest, axis=0)
            place = len(open_groups)
            open_groups.append([])
            left = np.append(left, [limits], axis=0)
        open_groups[place].append(int(index))
        left[place] -= costs[index]
    return groups + [np.sort(group) for group in open_groups]

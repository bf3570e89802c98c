"""Masks as run lengths, for JSON."""

import numpy as np


def encode_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Boolean mask [I, J] as uncompressed COCO run lengths.

    {"size": [I, J], "counts": [zeros, ones, zeros, ...]}, column by column.
    """
    flat = mask.astype(bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=flat.size).tolist()}


def decode_rle(rle: dict[str, list[int]]) -> np.ndarray:
    """The boolean mask [I, J] of `encode_rle`. Raises ValueError when the runs do not fill it."""
    values = np.arange(len(rle["counts"])) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, rle["counts"]).reshape(rle["size"], order="F"))

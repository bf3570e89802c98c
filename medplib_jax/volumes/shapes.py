"""What is done to a mask of a volume after it was drawn: slices between others, its largest part, a smooth surface."""

from collections.abc import Sequence

import numpy as np


def interpolate(planes: np.ndarray, known: Sequence[int]) -> None:
    """Fills the slices between neighbours of `known` in bool [slices, rows, columns], in place.

    Shape-based (Raya and Udupa 1990): the signed distance to the outline is interpolated. Between a slice with a mask
    and one without, the mask ends at the former.
    """
    for first, last in zip(known, known[1:], strict=False):
        if last - first < 2 or not (planes[first].any() and planes[last].any()):
            continue
        start, end = _signed_distance(planes[first]), _signed_distance(planes[last])
        for number in range(first + 1, last):
            share = (number - first) / (last - first)
            planes[number] = (1 - share) * start + share * end > 0


def _signed_distance(plane: np.ndarray) -> np.ndarray:
    """Pixels to the outline, positive inside."""
    from scipy import ndimage  # here and below: slow to import, and few need it

    padded = np.pad(plane, 1)  # beyond the slice is outside
    inside, outside = ndimage.distance_transform_edt(padded), ndimage.distance_transform_edt(~padded)
    return (inside - outside)[1:-1, 1:-1]


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The part of most voxels (26 neighbours); the first of several of one size. An empty mask stays empty."""
    from scipy import ndimage

    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    if count < 2:
        return mask
    return parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))


def smooth(mask: np.ndarray, spacing: np.ndarray, sigma: float) -> np.ndarray:
    """The mask after a Gaussian of `sigma` mm, cut at one half."""
    from scipy import ndimage

    return ndimage.gaussian_filter(mask.astype(np.float32), sigma / np.asarray(spacing), mode="nearest") > 0.5

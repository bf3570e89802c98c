"""Outlines of masks as paths that a page draws, small enough for hundreds of cases."""

from collections.abc import Sequence
from typing import cast

import contourpy
import numpy as np

GRID = 512  # masks with a longer side are thinned to it
_SCALE = 2  # coordinates are halves of a pixel: outlines run between pixels


def outlines(mask: np.ndarray, size: tuple[int, int]) -> str:
    """The outlines of a mask bool [h, w] as an SVG path over a picture of `size` (height, width); empty for no pixel.

    Holes are outlines, too, to be filled by the rule evenodd.
    """
    step = max(1, -(-max(mask.shape) // GRID))
    thinned = np.asarray(mask[::step, ::step], bool)
    rows, columns = np.flatnonzero(thinned.any(1)), np.flatnonzero(thinned.any(0))
    if not len(rows):
        return ""
    inside = np.pad(thinned[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(float), 1)
    lines = cast(Sequence[np.ndarray], contourpy.contour_generator(z=inside).lines(0.5))
    scale = np.array([size[1] / mask.shape[1], size[0] / mask.shape[0]]) * step
    start = np.array([columns[0], rows[0]]) - 0.5  # the rim is a pixel wide, and a pixel's middle is its place
    return "".join(_path((line + start) * scale) for line in lines)


def _path(points_Nx2: np.ndarray) -> str:
    """A closed path with relative steps, points on a straight line left out."""
    points = np.round(points_Nx2 * _SCALE).astype(int)
    points = points[np.any(np.diff(points, axis=0, prepend=points[:1] - 1) != 0, axis=1)]
    steps = np.diff(points, axis=0)
    turns = steps[1:, 0] * steps[:-1, 1] != steps[1:, 1] * steps[:-1, 0]
    kept = points[np.concatenate([[True], turns, [True]])] if len(points) > 2 else points
    moves = np.diff(kept, axis=0)
    start = " ".join(f"{value / _SCALE:g}" for value in kept[0])
    return f"M{start}l" + " ".join(f"{x / _SCALE:g},{y / _SCALE:g}" for x, y in moves) + "z"


def box_path(box: Sequence[float], grid: float, size: tuple[int, int]) -> str:
    """A box x1 y1 x2 y2 on a grid that is stretched over a picture of `size` (height, width)."""
    x1, y1, x2, y2 = (value * side / grid for value, side in zip(box, (size[1], size[0]) * 2, strict=True))
    return f"M{x1:.1f} {y1:.1f}H{x2:.1f}V{y2:.1f}H{x1:.1f}z"

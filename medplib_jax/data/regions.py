"""Regions of a question (mask file, point, box, polygon, scribble) to the points at which image features are sampled.

As in the original (spec sections 3 and 4): mask at image size -> square canvas of 336 -> grid of 24 x 24 -> largest
component -> points. The grid is that of the original for every model size, because points are relative to the square
image.
"""

import math
import re
from typing import cast

import numpy as np
from PIL import Image, ImageDraw

from medplib_jax.data.errors import DataError
from medplib_jax.data.images import to_canvas

CANVAS, STRIDE = 336, 14
GRID = CANVAS // STRIDE
LEAST_SHARE, LEAST_CELLS = 0.2, 10  # of a region, in its augmentation
SHAPES = ("point", "box", "polygon", "scribble")
_MINIMUM_POINTS = {"point": 1, "box": 2, "polygon": 3, "scribble": 1}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")


def is_shape(reference: str) -> bool:
    """Whether the reference is drawn in words and is no mask file.

    Forms: "point:x,y", "box:x0,y0,x1,y1", "polygon:x,y x,y ...", "scribble:...".
    """
    return reference.split(":")[0] in SHAPES and ":" in reference


def draw(reference: str, size: tuple[int, int]) -> np.ndarray:
    """Mask uint8 [h, w] of an inline shape in pixel coordinates of the picture of that size (h, w).

    A scribble is as wide as a cell of the grid, so that the grid sees it. DataError (file: the reference) when the
    coordinates are not numbers, too few, or outside the picture.
    """
    shape, _, text = reference.partition(":")
    points = _parse(reference, shape, text)
    height, width = size
    if points.min() < 0 or points[:, 0].max() > width or points[:, 1].max() > height:
        raise DataError(
            reference,
            None,
            "region is outside the picture",
            f"x in [0, {width}], y in [0, {height}]",
            str(points.tolist()),
        )
    x, y = np.minimum(points, (width - 1, height - 1)).T
    mask = np.zeros(size, np.uint8)
    if shape == "point":
        mask[int(y[0]), int(x[0])] = 1
    elif shape == "box":
        # the box covers [x0, x1) x [y0, y1), at least one pixel
        (x0, x1), (y0, y1) = np.sort(points, axis=0).T
        mask[
            int(y.min()) : max(int(np.ceil(y1)), int(y.min()) + 1),
            int(x.min()) : max(int(np.ceil(x1)), int(x.min()) + 1),
        ] = 1
    else:
        image = Image.fromarray(mask)
        outline = list(zip(x.tolist(), y.tolist(), strict=True))
        if shape == "polygon":
            ImageDraw.Draw(image).polygon(outline, fill=1, outline=1)
        else:
            thickness = max(1, round(max(size) / GRID))
            ImageDraw.Draw(image).line(
                outline * 2 if len(outline) == 1 else outline, fill=1, width=thickness, joint="curve"
            )
        mask = np.array(image)
        mask[y.astype(int), x.astype(int)] = 1
    return mask


def scale(reference: str, size: tuple[int, int]) -> str:
    """The reference in pixels of a picture of this size (h, w), whose coordinates were shares of its width and height.

    DataError as `draw`, and for shares that are not between 0 and 1.
    """
    shape, _, text = reference.partition(":")
    shares = _parse(reference, shape, text)
    if shares.min() < 0 or shares.max() > 1:
        raise DataError(reference, None, "region is outside the picture", "shares from 0 to 1", str(shares.tolist()))
    points = shares * size[::-1]
    return f"{shape}:" + " ".join(f"{x:.4f},{y:.4f}" for x, y in points.tolist())


def _parse(reference: str, shape: str, text: str) -> np.ndarray:
    numbers = re.split(r"[\s,]+", text.strip())
    if not all(map(_NUMBER.fullmatch, numbers)) or len(numbers) % 2 or len(numbers) < 2 * _MINIMUM_POINTS[shape]:
        raise DataError(
            reference,
            None,
            "region cannot be read",
            f"{shape}:x,y with at least {_MINIMUM_POINTS[shape]} points",
            repr(text),
        )
    points = np.array(numbers, np.float64).reshape(-1, 2)
    if shape in ("point", "box") and len(points) != _MINIMUM_POINTS[shape]:
        raise DataError(reference, None, "region cannot be read", f"{2 * _MINIMUM_POINTS[shape]} numbers", repr(text))
    return points


def grid_cells(mask: np.ndarray) -> np.ndarray:
    """The cells of the region's largest 8-connected component, bool [GRID, GRID].

    Of several of one size it is the first in row order. A region too small to meet any cell's sample takes the cell
    that holds its centroid (the original drops the example's labels). ValueError when the mask is empty.
    """
    canvas, (top, left, height, width) = to_canvas(mask, CANVAS, 0)
    cells = canvas[::STRIDE, ::STRIDE] > 0  # OpenCV's nearest: the first pixel of each cell
    if not cells.any():
        rows, columns = np.nonzero(mask)
        if not len(rows):
            raise ValueError("empty region")
        row = top + (rows.mean() + 0.5) * height / mask.shape[0]
        column = left + (columns.mean() + 0.5) * width / mask.shape[1]
        cells[int(row // STRIDE), int(column // STRIDE)] = True
        return cells
    from scipy import ndimage  # slow to import, and few questions have a region

    labels, count = cast(tuple[np.ndarray, int], ndimage.label(cells, structure=np.ones((3, 3))))
    return labels == 1 + np.argmax(np.bincount(labels[labels > 0] - 1, minlength=count))


def sub_component(cells: np.ndarray, rng: np.random.Generator, *, reference: bool = False) -> np.ndarray:
    """A random connected part of a connected region, bool [GRID, GRID].

    Its area is uniform in 20 to 100 % of the region's, at least `LEAST_CELLS`. The part grows from a random cell to
    random neighbours (8-connected), so that training sees incomplete and odd-shaped regions (paper: a region stands for
    what a user marks by hand). A region below `LEAST_CELLS` stays whole. With `reference` the upper bound of the share
    is the region's area in cells instead of 1, as in the original, where a variable is shadowed: nearly always the
    whole.
    """
    area = int(cells.sum())
    if area < LEAST_CELLS:
        return cells
    share = rng.uniform(LEAST_SHARE, area if reference else 1.0)
    target = min(area, max(LEAST_CELLS, math.ceil(area * share)))
    left, part = cells.copy(), np.zeros_like(cells)
    starts = np.argwhere(cells)
    border = [tuple(starts[rng.integers(len(starts))])]
    left[border[0]] = False
    for _ in range(target):
        row, column = border.pop(rng.integers(len(border)))
        part[row, column] = True
        window = (slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2))
        border += [(window[0].start + r, window[1].start + c) for r, c in np.argwhere(left[window])]
        left[window] = False
    return part


def cell_points(cells: np.ndarray, max_points: int) -> np.ndarray:
    """Where features of a region are sampled, float32 [n, 2], n <= max_points.

    (x, y) in [0, 1) of the region's cells on the padded square picture, without half-cell shift. More cells than
    `max_points` are thinned to a subset that looks random but is always the same one.
    """
    rows, columns = np.nonzero(cells)
    points = np.stack([columns, rows], axis=1).astype(np.float32) / GRID
    if len(points) > max_points:
        chosen = np.random.default_rng(len(points)).choice(len(points), max_points, replace=False)
        points = points[np.sort(chosen)]
    return points

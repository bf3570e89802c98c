"""Outlines of masks as polygons along the edges of their pixels, for GeoJSON, COCO and whatever draws them."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np

Ring = list[list[int]]  # corners (x, y), the first one not repeated
Polygon = list[Ring]  # the outline, then its holes


def polygons(mask: np.ndarray) -> list[Polygon]:
    """One polygon for each part of a mask, bool [h, w], whose pixels share edges.

    Corners are those of pixels: pixel (x, y) reaches from x to x + 1. Outlines run with y down clockwise, holes against
    that, and no ring meets itself.
    """
    from scipy import ndimage  # few questions need it

    parts, _ = cast(tuple[np.ndarray, int], ndimage.label(mask))
    found = []
    for number, place in enumerate(ndimage.find_objects(parts), start=1):
        rings = list(_rings(parts[place] == number))
        shift = place[1].start, place[0].start
        outline_first = sorted(rings, key=_area, reverse=True)
        found.append([[[x + shift[0], y + shift[1]] for x, y in ring] for ring in outline_first])
    return found


def _area(ring: Ring) -> float:
    """Positive for an outline, negative for a hole."""
    x, y = np.array(ring).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _rings(part: np.ndarray) -> Iterator[Ring]:
    """The closed lines around the pixels of one part, which lies on the right hand of each step (y runs down).

    Where two pixels meet in a corner only, a line turns left: the part holds together elsewhere, so the corner is where
    an outline touches a hole.
    """
    steps = set(_steps(part))
    while steps:
        x, y, dx, dy = min(steps)  # its beginning is a corner: nothing lies further left
        ring: Ring = []
        heading = None
        while (x, y, dx, dy) in steps:
            steps.remove((x, y, dx, dy))
            if (dx, dy) != heading:
                ring.append([x, y])
            heading, x, y = (dx, dy), x + dx, y + dy
            turns = ((dy, -dx), (dx, dy), (-dy, dx))  # left, on, right
            dx, dy = next((turn for turn in turns if (x, y, *turn) in steps), heading)
        yield ring


def _steps(part: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Pixel edges between the part and what is not: beginning (x, y) and heading (dx, dy)."""
    padded = np.pad(part, 1)
    inside = padded[1:-1, 1:-1]
    for neighbour, (x, y), heading in (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (0, 1)),
        (padded[2:, 1:-1], (1, 1), (-1, 0)),
        (padded[1:-1, :-2], (0, 1), (0, -1)),
    ):
        rows, columns = np.nonzero(inside & ~neighbour)
        yield from ((c + x, r + y, *heading) for r, c in zip(rows.tolist(), columns.tolist(), strict=True))


def geojson(masks: Iterable[tuple[str, np.ndarray]]) -> dict[str, Any]:
    """Masks with their names as QuPath reads them: a feature each, in pixels; none for an empty one."""
    features = []
    for name, mask in masks:
        if found := polygons(mask):
            closed = [[[*ring, ring[0]] for ring in polygon] for polygon in found]
            features.append(
                {
                    "type": "Feature",
                    "geometry": {"type": "MultiPolygon", "coordinates": closed},
                    "properties": {"objectType": "annotation", "name": name, "classification": {"name": name}},
                }
            )
    return {"type": "FeatureCollection", "features": features}

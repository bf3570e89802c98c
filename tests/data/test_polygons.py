"""Polygons of masks: exactly the mask's pixels, whatever its shape."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medplib_jax.data.polygons import geojson, polygons

masks = arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.booleans())


def inside(ring: list[list[int]], shape: tuple[int, int]) -> np.ndarray:
    """Whether the middle of each pixel lies in a ring, by counting edges to its left."""
    count = np.zeros(shape, int)
    for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
        assert (x0 == x1) != (y0 == y1)
        if x0 == x1:
            count[min(y0, y1) : max(y0, y1), x0:] += 1
    return count % 2 == 1


def area(ring: list[list[int]]) -> float:
    x, y = np.array(ring).T
    return (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2


@given(masks)
def test_polygons_cover_the_mask_and_nothing_else(mask):
    drawn = np.zeros(mask.shape, int)
    for outline, *holes in polygons(mask):
        assert area(outline) > 0 and all(area(hole) < 0 for hole in holes)
        part = inside(outline, mask.shape).astype(int) - sum(inside(hole, mask.shape).astype(int) for hole in holes)
        assert part.min() >= 0
        drawn += part
    np.testing.assert_array_equal(drawn, mask)


@given(masks)
def test_no_ring_meets_itself(mask):
    for polygon in polygons(mask):
        for ring in polygon:
            assert len({tuple(corner) for corner in ring}) == len(ring)


def test_a_ring_that_closes_in_a_corner_has_a_hole():
    mask = np.ones((4, 4), bool)
    mask[1:3, 1:3] = False
    mask[0, 0] = False
    ((outline, hole),) = polygons(mask)
    assert [1, 1] in outline and hole == [[1, 1], [1, 3], [3, 3], [3, 1]]


def test_geojson_is_closed_and_named():
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2:5] = True
    (feature,) = geojson([("liver", mask), ("spleen", ~mask & mask)])["features"]
    assert feature["properties"]["classification"] == {"name": "liver"}
    assert feature["geometry"]["coordinates"] == [[[[2, 1], [5, 1], [5, 3], [2, 3], [2, 1]]]]

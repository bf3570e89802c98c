"""Regions against the original's grid, and properties that hold for any region."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medplib_jax.data import regions
from medplib_jax.data.errors import DataError
from medplib_jax.data.images import load_image, load_mask
from tests.paths import GOLDEN

PREPROCESS = GOLDEN / "preprocess"
ARRAYS = np.load(PREPROCESS / "arrays.npz")
sides = st.integers(1, 90)
some = settings(max_examples=25)


@pytest.mark.parametrize("name", ["synth_wide", "synth_large"])
def test_cells_equal_the_originals(name):
    size = load_image(str(PREPROCESS / f"{name}.png")).shape[:2]
    cells = regions.grid_cells(load_mask(str(PREPROCESS / f"{name}_region.png"), size))
    np.testing.assert_array_equal(cells, ARRAYS[f"{name}_region_24"])


def test_points_are_cells_as_x_y():
    mask = np.zeros((336, 336), np.uint8)
    mask[28, 14:29] = 1  # row 2, columns 1 and 2
    np.testing.assert_allclose(
        regions.cell_points(regions.grid_cells(mask), 10), [[1 / 24, 2 / 24], [2 / 24, 2 / 24]], rtol=1e-6
    )


def test_the_largest_component_counts_with_diagonal_neighbours():
    mask = np.zeros((336, 336), np.uint8)
    for i in (0, 14, 28):
        mask[i, i] = 1  # three cells in a diagonal
    mask[200:203, 196:211] = 1  # no more than two cells
    assert {tuple(cell) for cell in np.argwhere(regions.grid_cells(mask))} == {(0, 0), (1, 1), (2, 2)}


def test_more_cells_than_points_are_thinned_the_same_way_each_time():
    mask = np.ones((50, 50), np.uint8)
    first, again = regions.cell_points(regions.grid_cells(mask), 40), regions.cell_points(regions.grid_cells(mask), 40)
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first, axis=0)) == 40


@some
@given(sides, sides, st.data())
def test_any_region_gives_points_in_the_unit_square(height, width, data):
    mask = np.zeros((height, width), np.uint8)
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask[row : row + data.draw(st.integers(1, 40)), column : column + data.draw(st.integers(1, 40))] = 1
    points = regions.cell_points(regions.grid_cells(mask), 16)
    assert points.dtype == np.float32 and 1 <= len(points) <= 16
    assert points.min() >= 0 and points.max() < 1


@some
@given(sides, sides, st.data())
def test_a_vanishing_region_takes_the_cell_it_lies_in(height, width, data):
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    mask = regions.draw(f"point:{x},{y}", (height, width))
    assert mask.sum() == 1 and mask[y, x] == 1
    scale, longest = 24 / max(height, width), max(height, width)
    expected = np.array([x + 0.5 + (longest - width) / 2, y + 0.5 + (longest - height) / 2]) * scale
    found = regions.cell_points(regions.grid_cells(mask), 600) * 24
    assert np.abs(found.mean(axis=0) + 0.5 - expected).max() <= 1.0 + 0.5 * scale


@some
@given(sides, sides, st.data())
def test_a_box_is_its_pixels(height, width, data):
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    expected = np.zeros((height, width), np.uint8)
    expected[y0:y1, x0:x1] = 1
    np.testing.assert_array_equal(regions.draw(f"box:{x0},{y0},{x1},{y1}", (height, width)), expected)
    np.testing.assert_array_equal(regions.draw(f"box:{x1},{y1},{x0},{y0}", (height, width)), expected)


def test_a_polygon_and_a_scribble_cover_what_they_draw():
    polygon = regions.draw("polygon:10,10 40,10 40,30 10,30", (60, 80))
    assert polygon[10:31, 10:41].all() and polygon.sum() == 21 * 31
    scribble = regions.draw("scribble:5,5 70,5 70,50", (60, 80))
    assert scribble[5, 5:70].all() and scribble[5:50, 70].all()
    assert scribble.sum() < 0.15 * scribble.size
    assert regions.grid_cells(scribble).sum() >= 24


@pytest.mark.parametrize("reference", ["point:80,60", "box:0,0,80,60", "scribble:80,60", "polygon:0,0 80,0 80,60"])
def test_the_border_belongs_to_the_picture(reference):
    assert regions.draw(reference, (60, 80)).any()


@pytest.mark.parametrize(
    "reference", ["point:81,3", "point:3,-1", "box:0,0,80,61", "polygon:0,0 5,5 90,1", "scribble:1,1 2,70"]
)
def test_outside_the_picture_is_refused(reference):
    with pytest.raises(DataError, match=r"region is outside the picture; expected x in \[0, 80\], y in \[0, 60\]"):
        regions.draw(reference, (60, 80))


UNREADABLE = (
    *("point:", "point:1", "point:1,2,3,4", "point:nan,1", "point:1e3,1"),
    *("box:1,2", "box:1,2,3,4,5,6", "polygon:1,1 2,2", "scribble:1,a"),
)


@pytest.mark.parametrize("reference", UNREADABLE)
def test_unreadable_coordinates_are_refused(reference):
    with pytest.raises(DataError, match="region cannot be read"):
        regions.draw(reference, (60, 80))


@st.composite
def components(draw):
    """A connected region on the grid, grown at random."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    cells = np.zeros((regions.GRID, regions.GRID), bool)
    cells[tuple(rng.integers(regions.GRID, size=2))] = True
    for _ in range(draw(st.integers(0, 300))):
        around = ndimage.binary_dilation(cells, np.ones((3, 3))) & ~cells
        places = np.argwhere(around)
        cells[tuple(places[rng.integers(len(places))])] = True
    return cells


@some
@given(components(), st.integers(0, 2**32), st.booleans())
def test_a_part_is_connected_inside_its_region_and_of_the_asked_area(cells, seed, reference):
    part = regions.sub_component(cells, np.random.default_rng(seed), reference=reference)
    assert part.any() and not (part & ~cells).any()
    assert ndimage.label(part, np.ones((3, 3)))[1] == 1
    area = cells.sum()
    assert max(0.2 * area, min(area, 10)) <= part.sum() <= area
    np.testing.assert_array_equal(part, regions.sub_component(cells, np.random.default_rng(seed), reference=reference))


def test_parts_have_every_share_and_the_originals_slip_keeps_the_whole():
    cells = np.ones((regions.GRID, regions.GRID), bool)
    shares = [regions.sub_component(cells, np.random.default_rng(seed)).mean() for seed in range(40)]
    assert min(shares) < 0.35 and max(shares) > 0.85 and 0.45 < np.mean(shares) < 0.75  # uniform in 0.2 to 1
    slipped = [regions.sub_component(cells, np.random.default_rng(seed), reference=True).all() for seed in range(40)]
    assert np.mean(slipped) > 0.9


def test_an_empty_region_is_refused():
    with pytest.raises(ValueError, match="empty region"):
        regions.grid_cells(np.zeros((5, 5), np.uint8))


def test_files_are_not_shapes():
    assert regions.is_shape("point:1,2")
    assert not regions.is_shape("masks/point.png") and not regions.is_shape("pointer") and not regions.is_shape("point")

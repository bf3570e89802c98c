"""Outlines as paths: filled again they are the mask."""

import re

import numpy as np
import pytest
from matplotlib.path import Path
from scipy import ndimage

from medplib_jax.evaluate.report.contours import box_path, outlines


def fill(path, size):
    """bool [h, w]: the pixels whose middles lie inside, by the rule evenodd."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    inside = np.zeros(size, bool)
    for start, steps in re.findall(r"M([\d. -]+)l([^z]*)z", path):
        points = np.cumsum([np.array(start.split(), float), *(np.array(s.split(","), float) for s in steps.split())], 0)
        inside ^= Path(points).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(size)
    return inside


@pytest.mark.parametrize("seed", range(3))
def test_outlines_enclose_the_mask_with_its_holes(seed):
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(90, 120)), 4)
    mask = smooth > np.quantile(smooth, 0.7)
    mask[40:60, 50:80] = True
    mask[46:52, 60:70] = False
    assert np.array_equal(fill(outlines(mask, (90, 120)), (90, 120)), mask)
    large = fill(outlines(mask, (180, 240)), (180, 240))
    assert np.mean(large != mask.repeat(2, 0).repeat(2, 1)) < 0.03  # corners are cut


def test_a_mask_without_pixels_has_no_outline_and_a_large_one_is_thinned():
    assert outlines(np.zeros((5, 5), bool), (5, 5)) == ""
    mask = np.zeros((2000, 2000), bool)
    mask[400:1200, 200:1000] = True
    found = fill(outlines(mask, (500, 500)), (500, 500))
    rows, columns = np.nonzero(found)
    ends = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    np.testing.assert_allclose(ends, (50, 250, 100, 300), atol=1)
    assert len(outlines(mask, (500, 500))) < 200  # points on straight lines are left out


def test_a_box_is_stretched_over_the_picture():
    assert box_path((100, 200, 500, 1000), 1000, (50, 200)) == "M20.0 10.0H100.0V50.0H20.0z"

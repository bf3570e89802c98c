"""Planes of a scan: each in radiological orientation with square pixels, and masks back onto the voxels exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medplib_jax.data.errors import DataError
from medplib_jax.volumes.geometry import PLANES, cut, mask_on_grid
from medplib_jax.volumes.volume import Volume


def volume_of(shape, affine, slice_axis=2, **more):
    return Volume(np.zeros(shape, np.uint8), affine, "x", slice_axis=slice_axis, **more)


@st.composite
def affines(draw):
    """RAS, LPS, permuted, flipped and oblique, with voxels of very different sides."""
    matrix = np.eye(3)[list(draw(st.permutations(range(3))))] * draw(
        st.sampled_from([(1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, 1, 1)])
    )
    angles = draw(st.lists(st.floats(-30, 30), min_size=3, max_size=3))
    spacing = draw(st.lists(st.floats(0.3, 7), min_size=3, max_size=3))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ matrix * spacing
    affine[:3, 3] = draw(st.lists(st.floats(-300, 300), min_size=3, max_size=3))
    return affine


@given(affines(), st.sampled_from(PLANES), st.tuples(*[st.integers(1, 12)] * 3), st.integers(0, 2), st.integers(0, 999))
@settings(max_examples=200)
def test_masks_come_back_voxel_for_voxel(affine, plane, shape, slice_axis, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.4
    way = cut(volume_of(shape, affine, slice_axis), plane)
    back = np.zeros(shape, bool)
    for number in range(len(way)):
        picture = way.mask_on_picture(way.reoriented(mask)[number])
        assert picture.shape == way.size
        way.reoriented(back)[number] = way.mask_on_plane(picture)
    np.testing.assert_array_equal(back, mask)


@given(affines(), st.sampled_from(PLANES[1:]))
@settings(max_examples=50)
def test_pictures_lie_as_radiologists_expect(affine, plane):
    way = cut(volume_of((6, 7, 8), affine), plane)
    towards = [affine[:3, axis] * (-1 if flip else 1) for axis, flip in zip(way.axes, way.flips, strict=True)]
    across, down, right = (int(np.abs(vector).argmax()) for vector in towards)
    assert {"sagittal": (0, 2, 1), "coronal": (1, 2, 0), "axial": (2, 1, 0)}[plane] == (across, down, right) or _tilted(
        affine
    )
    assert towards[0][across] > 0 and towards[1][down] < 0 and towards[2][right] < 0 or _tilted(affine)


def _tilted(affine):
    """Whether the nearest axes are a matter of opinion."""
    return np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).max(axis=0).min() < 0.85


def test_acquired_slices_of_a_sagittal_scan_are_no_slivers():
    affine = np.array([[0, 0, 4.0, 0], [-0.5, 0, 0, 0], [0, -0.5, 0, 0], [0, 0, 0, 1]])
    scan = volume_of((256, 256, 15), affine)
    assert (len(cut(scan)), cut(scan).size) == (15, (256, 256))
    assert (len(cut(scan, "axial")), cut(scan, "axial").size) == (256, (256, 120))


def test_pixels_are_square():
    scan = volume_of((20, 30, 4), np.diag([2.0, 1, 5, 1]))
    way = cut(scan)
    assert way.size == (30, 40)
    row = np.repeat(np.array([[0, 255]], np.uint8), 30, axis=0).repeat(10, axis=1)
    assert way.picture(row).shape == (30, 40)


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda a: a @ np.diag([1.01, 1, 1, 1]), "spacing"),
        (lambda a: np.array([[1, 0, 0, 0.01], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ a, "origin"),
        (
            lambda a: (
                np.block([[Rotation.from_euler("z", 1, degrees=True).as_matrix(), np.zeros((3, 1))], [0, 0, 0, 1]]) @ a
            ),
            "direction",
        ),
    ],
)
def test_a_mask_on_another_grid_says_what_differs(change, what):
    affine = np.diag([0.8, 0.8, 3, 1.0])
    affine[:3, 3] = -200, -180, 40
    scan = volume_of((6, 7, 8), affine)
    mask = np.zeros((6, 7, 8), bool)
    assert mask_on_grid("m", mask, affine.astype(np.float32).astype(float), scan).shape == mask.shape
    with pytest.raises(DataError, match=f"another grid than its scan: {what} differs"):
        mask_on_grid("m", mask, change(affine), scan)
    with pytest.raises(DataError, match="shape differs"):
        mask_on_grid("m", mask[1:], affine, scan)


def test_a_mask_stored_in_other_axes_is_brought_onto_the_scans():
    affine = np.array([[0, 0, 2.0, 5], [-1, 0, 0, 6], [0, 3, 0, 7], [0, 0, 0, 1]])
    mask = np.random.default_rng(0).random((3, 4, 5)) < 0.5
    scan = volume_of((3, 4, 5), affine)
    stored = mask.transpose(2, 0, 1)[:, ::-1]
    matrix = np.eye(4)[[1, 2, 0, 3]] @ np.diag([1, -1, 1, 1.0])
    matrix[0, 3] = 2
    np.testing.assert_array_equal(mask_on_grid("m", stored, affine @ matrix, scan), mask)


def test_other_planes_need_a_place_in_the_patient():
    with pytest.raises(DataError, match="how it lies"):
        cut(volume_of((4, 4, 4), np.eye(4), located=False), "axial")
    with pytest.raises(ValueError, match="--plane"):
        cut(volume_of((4, 4, 4), np.eye(4)), "transversal")

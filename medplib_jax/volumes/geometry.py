"""Where voxels lie: planes of a scan as pictures and back, and whether two grids are the same."""

import dataclasses

import numpy as np
from PIL import Image

from medplib_jax.data.errors import DataError
from medplib_jax.data.images import MAX_PIXELS
from medplib_jax.volumes.volume import Volume

PLANES = ("acquired", "axial", "coronal", "sagittal")
_ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis of RAS+ along which a plane's slices follow each other
_DOWN = {0: 2, 1: 2, 2: 1}  # across -> the axis of RAS+ that runs up the picture; the remaining one runs to the left
TOLERANCE = 1e-6  # ITK's: of the first spacing for coordinates, of a unit vector for directions
_FLOAT32 = float(np.finfo(np.float32).eps)  # files of NIfTI store coordinates with this relative error
SHEAR = 1e-3  # cosine between axes from which a grid counts as sheared


@dataclasses.dataclass(frozen=True)
class Cut:
    """A scan cut into pictures, one per step along an array axis; no voxel is interpolated across slices.

    Pictures lie as radiologists expect them: axial with the front up, coronal and sagittal with the head up, the
    patient's right on the left, sagittal with the front on the left. Slices are counted towards right, front or head.
    Pixels are square: the coarser of the two axes is stretched to the finer one.

    axes: the array axes across slices, down and to the right of a picture; flips: which of them run against the array.
    size: (h, w) of the pictures.
    """

    shape: tuple[int, int, int]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    size: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[self.axes[0]]

    def reoriented(self, array: np.ndarray) -> np.ndarray:
        """A view [slices, rows, columns, ...] of an array [i, j, k, ...] on the scan's grid."""
        view = array.transpose(*self.axes, *range(3, array.ndim))
        return view[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]

    def picture(self, pixels: np.ndarray) -> np.ndarray:
        """A plane's grey or colour uint8 [rows, columns, ...] with square pixels, uint8 [h, w, ...] (bilinear)."""
        if pixels.shape[:2] == self.size:
            return np.ascontiguousarray(pixels)
        return np.asarray(
            Image.fromarray(np.ascontiguousarray(pixels)).resize(self.size[::-1], Image.Resampling.BILINEAR)
        )

    def mask_on_picture(self, plane: np.ndarray) -> np.ndarray:
        """A plane of a mask, bool [rows, columns], on the picture's pixels, bool [h, w] (nearest)."""
        rows, columns = (_nearest(to, have) for to, have in zip(self.size, plane.shape, strict=True))
        return plane[rows[:, None], columns]

    def mask_on_plane(self, mask: np.ndarray) -> np.ndarray:
        """A picture's mask, bool [h, w], on its plane's voxels, bool [rows, columns]; undoes `mask_on_picture` exactly.

        Each voxel takes the pixel under its centre. That pixel's own centre lies within the voxel, as pixels are not
        larger than voxels.
        """
        plane = [self.shape[axis] for axis in self.axes[1:]]
        rows, columns = (_nearest(to, have) for to, have in zip(plane, self.size, strict=True))
        return mask[rows[:, None], columns]


def _nearest(to: int, have: int) -> np.ndarray:
    """For each of `to` cells that divide a line evenly, which of `have` cells lies under its centre."""
    return (2 * np.arange(to) + 1) * have // (2 * to)


def cut(volume: Volume, plane: str = "acquired") -> Cut:
    """How `volume` is cut into slices of a plane (one of `PLANES`).

    DataError for a plane other than "acquired" when the file does not say how the scan lies or its axes are sheared
    (gantry tilt), and for voxels so long that the pictures would be too large.
    """
    if plane not in PLANES:
        raise ValueError(f"--plane: expected one of {', '.join(PLANES)}, found {plane!r}")
    if plane != "acquired" and not volume.located:
        raise DataError(volume.file, None, "scan does not say how it lies in the patient", "--plane acquired", plane)
    if plane != "acquired" and is_sheared(volume.affine):
        raise DataError(volume.file, None, "slices are sheared (gantry tilt)", "--plane acquired", plane)
    world, signs = world_axes(volume.affine)
    across = world[volume.slice_axis] if plane == "acquired" else _ACROSS[plane]
    down = _DOWN[across]
    axes = tuple(world.index(axis) for axis in (across, down, 3 - across - down))
    flips = tuple(bool(signs[axis] != wanted) for axis, wanted in zip(axes, (1, -1, -1), strict=True))
    spacing, side = volume.spacing[list(axes[1:])], min(volume.spacing[list(axes[1:])])
    size = tuple(max(1, round(volume.shape[axis] * step / side)) for axis, step in zip(axes[1:], spacing, strict=True))
    if size[0] * size[1] > MAX_PIXELS // 4:
        raise DataError(
            volume.file, None, "slices with square pixels are too large", f"at most {MAX_PIXELS // 4} pixels", str(size)
        )
    return Cut(volume.shape, axes, flips, size)


def world_axes(affine: np.ndarray) -> tuple[list[int], list[int]]:
    """The nearest axis of RAS+ for each array axis, each taken once, and whether it runs along (1) or against (-1)."""
    from nibabel.orientations import io_orientation  # only scans need it

    found = io_orientation(affine)
    return [int(axis) for axis in found[:, 0]], [int(sign) for sign in found[:, 1]]


def is_sheared(affine: np.ndarray) -> bool:
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > SHEAR)


def onto(array: np.ndarray, affine: np.ndarray, like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The array and its affine with axes swapped and flipped to run as those of the affine `like`; a view, no copy."""
    turn = np.linalg.inv(like[:3, :3]) @ affine[:3, :3]
    source = np.abs(turn).argmax(axis=1)  # for each axis of `like` the array axis that runs along it
    if len(set(source.tolist())) != 3:
        return array, affine
    flips = [turn[axis, source[axis]] < 0 for axis in range(3)]
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for axis, flip in enumerate(flips):
        matrix[source[axis], axis] = -1 if flip else 1
        matrix[source[axis], 3] = array.shape[source[axis]] - 1 if flip else 0
    turned = array.transpose(*source, *range(3, array.ndim))[
        tuple(slice(None, None, -1 if flip else 1) for flip in flips)
    ]
    return turned, affine @ matrix


def difference(shape, affine: np.ndarray, other_shape, other: np.ndarray) -> tuple[str, str, str] | None:
    """(shape, spacing, direction or origin; expected; found): where another grid differs first. None for the same grid.

    Tolerances are ITK's (ImageToImageFilter), widened by the rounding of coordinates stored in float32.
    """
    spacing, other_spacing = (np.linalg.norm(a[:3, :3], axis=0) for a in (affine, other))
    corner = np.abs(affine[:3] @ np.vstack([np.diag(np.array(shape) - 1.0), np.ones(3)])).max()
    room = TOLERANCE * spacing[0] + 4 * _FLOAT32 * max(corner, np.abs(affine[:3, 3]).max())
    compared = (
        ("shape", np.array(shape), np.array(other_shape), 0.0),
        ("spacing", spacing, other_spacing, TOLERANCE * spacing[0] + 4 * _FLOAT32 * spacing.max()),
        ("direction", affine[:3, :3] / spacing, other[:3, :3] / other_spacing, TOLERANCE + 8 * _FLOAT32),
        ("origin", affine[:3, 3], other[:3, 3], room),
    )
    for what, expected, found, tolerance in compared:
        if np.abs(expected - found).max() > tolerance:
            return what, *(
                np.array2string(np.asarray(x, np.float64), precision=6, separator=", ") for x in (expected, found)
            )
    return None


def mask_on_grid(file: str, mask: np.ndarray, affine: np.ndarray, volume: Volume) -> np.ndarray:
    """A mask [i, j, k] on the scan's own axes. DataError says in what its grid differs from the scan's."""
    turned, place = onto(mask, affine, volume.affine)
    if found := difference(volume.shape, volume.affine, turned.shape, place):
        what, expected, other = found
        raise DataError(
            file,
            None,
            f"mask on another grid than its scan: {what} differs",
            expected.replace("\n", ""),
            other.replace("\n", ""),
        )
    return turned

"""A scan in memory: its voxels, where they lie in the patient, and how its values are shown."""

import dataclasses
import hashlib

import numpy as np

from medplib_jax.data.errors import DataError, Notice
from medplib_jax.volumes.windows import Tone

MAX_VOXELS = 2**30  # a larger scan is refused before it is read
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])  # DICOM and ITK count towards left and behind, NIfTI towards right and front


@dataclasses.dataclass(frozen=True)
class Volume:
    """A scan, or one time point of it. The array has the file's own axes; for DICOM these are column, row, slice.

    values: [i, j, k] in the scan's units (HU, SUV, ...), or uint8 [i, j, k, 3] for colour.
    affine: [4, 4], voxel index to millimetres in RAS+ (towards the patient's right, front and head).
    name: for files that are written; no part of it comes from a patient's name or number.
    modality: in words, "" when the file does not tell. patient: a hash, "" when the file does not tell.
    tone: the file's own window. inverted: low values are shown bright (MONOCHROME1).
    located: False when the file does not say where the picture lies in the patient; the affine then only scales.
    measured: False when the file does not say how large voxels are in the patient; the affine is in proportion then.
    slice_axis: the axis along which slices were acquired.
    files: the files it comes from; for a DICOM series in the order of the slices.
    notices: what is unusual about the files, though they are used.
    """

    values: np.ndarray
    affine: np.ndarray
    name: str
    modality: str = ""
    patient: str = ""
    tone: Tone | None = None
    inverted: bool = False
    located: bool = True
    measured: bool = True
    slice_axis: int = 2
    files: tuple[str, ...] = ()
    notices: tuple[Notice, ...] = ()

    @property
    def file(self) -> str:
        """For messages."""
        return self.files[0] if self.files else self.name

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.values.shape[:3]

    @property
    def is_colour(self) -> bool:
        return self.values.ndim == 4

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres from voxel to voxel along each axis, float64 [3]."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def hashed(text: str, digits: int = 12) -> str:
    """A short name for something that must not be written down itself; "" for nothing."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits] if text else ""


def check_size(file: str, shape: tuple[int, ...], most: int = MAX_VOXELS) -> None:
    """DataError for an array that is empty or has more than `most` voxels. Runs before the array is read."""
    if not all(0 < size < 2**31 for size in shape):
        raise DataError(file, None, "scan has no voxels", "sizes above 0", str(shape))
    if np.prod(shape, dtype=np.float64) > most:
        raise DataError(file, None, "scan is too large", f"at most {most} voxels", str(shape))


def check_affine(file: str, affine: np.ndarray) -> np.ndarray:
    """The affine itself. DataError when voxels have no extent, or their sizes cannot be millimetres."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or (spacing < 1e-4).any() or (spacing > 1e4).any():
        raise DataError(file, None, "voxel size cannot be used", "0.0001 to 10000 mm", np.array2string(spacing))
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.05:
        raise DataError(
            file, None, "axes of the scan lie in one plane", "three directions", str(affine[:3, :3].tolist())
        )
    return affine

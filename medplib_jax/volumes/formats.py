"""Volumes in one file: NIfTI, and what ITK reads (NRRD, MetaImage)."""

import os

import numpy as np

from medplib_jax.data.errors import DataError, Notice
from medplib_jax.volumes.volume import LPS_TO_RAS, MAX_VOXELS, Volume, check_affine, check_size

NIFTI = (".nii.gz", ".nii")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = NIFTI + ITK
_STEPS = (b"spacings:", b"space directions:", b"elementspacing", b"elementsize")  # of NRRD and MetaImage
_HEADER = 2**16  # bytes in which they stand
_UNITS = {1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's code -> mm


def without_suffix(name: str) -> str:
    """The name without the suffix of a volume or picture."""
    known = next((end for end in SUFFIXES if name.lower().endswith(end)), os.path.splitext(name)[1])
    return name[: len(name) - len(known)]


def read_volume_file(path: str, name: str, index: int | None = None, most: int = MAX_VOXELS) -> Volume:
    """The volume of a NIfTI, NRRD or MetaImage file. index: which of a fourth axis. most: voxels that are allowed.

    DataError for what cannot be used.
    """
    try:
        read = _read_nifti if path.lower().endswith(NIFTI) else _read_itk
        return read(path, name, index, most)
    except DataError:
        raise
    except ImportError as error:
        raise DataError(path, None, "a package is missing", "pip install 'medplib_jax[dicom]'", str(error)) from error
    except Exception as error:  # the readers raise errors of many types on broken files
        kind = "NIfTI" if path.lower().endswith(NIFTI) else "NRRD or MetaImage"
        raise DataError(
            path, None, "scan cannot be read", kind, f"{type(error).__name__}: {error}".splitlines()[-1][:300]
        ) from error


def volumes_in(path: str) -> int:
    """How many volumes lie along a file's fourth axis; 1 for a file that has none, or cannot be read."""
    try:
        shape = _nifti_shape(path) if path.lower().endswith(NIFTI) else _itk_shape(path)
    except Exception:  # whoever reads the file is told what is wrong with it
        return 1
    return shape[3] if len(shape) > 3 else 1


def _nifti_shape(path: str) -> tuple[int, ...]:
    import nibabel  # only scans need it

    return nibabel.load(path).shape


def _itk_shape(path: str) -> tuple[int, ...]:
    import SimpleITK as sitk  # only scans need it

    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return reader.GetSize()


def _read_nifti(path: str, name: str, index: int | None, most: int) -> Volume:
    import nibabel  # only scans need it

    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Pair):
        raise DataError(path, None, "scan cannot be read", "NIfTI", type(image).__name__)
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    check_size(path, shape[:3], most)
    pick = _pick(path, shape, index)
    values = _plain_values(
        path,
        np.asarray(
            image.dataobj[(slice(None),) * 3 + (0,) * (len(image.shape) - 3)]
            if pick is None
            else image.dataobj[..., pick]
        ),
    )
    unit = _UNITS.get(int(image.header["xyzt_units"]) & 7, 1.0)
    affine = np.diag([unit, unit, unit, 1.0]) @ np.asarray(image.affine, np.float64)
    notices = ()
    if not (int(image.header["sform_code"]) or int(image.header["qform_code"])):
        notices = (
            Notice(
                path, None, "orientation is not given", "an sform or qform", "neither; axes taken as left, front, head"
            ),
        )
    spacing = np.linalg.norm(check_affine(path, affine)[:3, :3], axis=0)
    return Volume(
        values,
        affine,
        name,
        slice_axis=_slice_axis(image.header.get_dim_info()[2], spacing),
        files=(path,),
        notices=notices,
    )


def _pick(path: str, shape: tuple[int, ...], index: int | None) -> int | None:
    """Which entry of a fourth axis; None for a volume of three axes."""
    if len(shape) == 3:
        if index not in (None, 0):
            raise DataError(path, None, "no such volume in the file", "index 0", str(index))
        return None
    if len(shape) != 4:
        raise DataError(path, None, "not a volume of three axes", "[x, y, z]", f"{shape}")
    if index is None or not 0 <= index < shape[3]:
        found = f"{shape}" if index is None else str(index)
        raise DataError(
            path, None, "several volumes in one file", f"an index from 0 to {shape[3] - 1} (--index)", found
        )
    return index


def _plain_values(path: str, values: np.ndarray) -> np.ndarray:
    """Numbers in native byte order, float32 for longer ones; colour as uint8 [..., 3]."""
    if values.dtype.names:
        if tuple(name.upper() for name in values.dtype.names[:3]) != ("R", "G", "B"):
            raise DataError(path, None, "kind of values cannot be used", "numbers or RGB", str(values.dtype))
        return np.stack([values[name] for name in values.dtype.names[:3]], axis=-1).astype(np.uint8)
    if values.dtype.kind not in "biuf":
        raise DataError(path, None, "kind of values cannot be used", "integers or real numbers", str(values.dtype))
    if values.dtype.kind == "f" or values.dtype.itemsize > 4:
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _slice_axis(said: int | None, spacing: np.ndarray) -> int:
    """The axis of acquired slices: what the file says, else the one with by far the longest steps, else the third."""
    if said is not None:
        return said
    longest = int(np.argmax(spacing))
    return longest if spacing[longest] > 1.2 * np.delete(spacing, longest).max() else 2


def _read_itk(path: str, name: str, index: int | None, most: int) -> Volume:
    import SimpleITK as sitk  # only scans need it

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    size = reader.GetSize()
    check_size(path, size[:3], most)
    pick = _pick(path, tuple(size), index)
    if len(size) == 4:
        reader.SetExtractSize([*size[:3], 0])
        reader.SetExtractIndex([0, 0, 0, pick])
    image = reader.Execute()
    values = sitk.GetArrayViewFromImage(image).copy()
    if image.GetNumberOfComponentsPerPixel() == 3 and values.dtype == np.uint8:
        values = values.transpose(2, 1, 0, 3)
    elif image.GetNumberOfComponentsPerPixel() == 1:
        values = _plain_values(path, values.transpose(2, 1, 0))
    else:
        found = f"{image.GetNumberOfComponentsPerPixel()} of {values.dtype}"
        raise DataError(path, None, "kind of values cannot be used", "numbers or RGB of 8 bits", found)
    affine = itk_affine(image)
    return Volume(
        values,
        check_affine(path, affine),
        name,
        measured=_tells_steps(path),
        slice_axis=_slice_axis(None, np.array(image.GetSpacing())),
        files=(path,),
    )


def _tells_steps(path: str) -> bool:
    """Whether a header of NRRD or MetaImage says how far apart voxels are; where it does not, ITK takes 1 mm."""
    with open(path, "rb") as file:
        header = file.read(_HEADER).lower()
    return any(step in header for step in _STEPS)


def itk_affine(image) -> np.ndarray:
    """Index to RAS+ millimetres of an image of SimpleITK."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return LPS_TO_RAS @ affine

"""NIfTI, NRRD and MetaImage: voxels and places as nibabel and ITK have them; what cannot be used is refused by name."""

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from medplib_jax.data.errors import DataError
from medplib_jax.volumes.formats import read_volume_file
from medplib_jax.volumes.geometry import difference, onto
from medplib_jax.volumes.pictures import pictures
from medplib_jax.volumes.read import count_volumes
from medplib_jax.volumes.results import write_results
from tests.volumes.scans import some_values, write_nifti


def read(path, index=None):
    return read_volume_file(str(path), "x", index)


@pytest.mark.parametrize("suffix", ["nrrd", "mha", "nii.gz"])
def test_all_formats_give_the_same_volume(tmp_path, suffix):
    image = sitk.GetImageFromArray(some_values().T)
    image.SetSpacing((0.5, 0.75, 2.5))
    image.SetOrigin((-12.5, 30, 7))
    image.SetDirection((0.8, 0, 0.6, 0.6, 0, -0.8, 0, 1, 0))
    sitk.WriteImage(image, str(tmp_path / f"x.{suffix}"))
    sitk.WriteImage(image, str(tmp_path / "x.nii"))
    volume, other = read(tmp_path / f"x.{suffix}"), read(tmp_path / "x.nii")
    np.testing.assert_array_equal(volume.values, some_values())
    turned, affine = onto(other.values, other.affine, volume.affine)
    np.testing.assert_array_equal(turned, volume.values)
    assert difference(volume.shape, volume.affine, turned.shape, affine) is None and volume.slice_axis == 2


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_a_header_without_lengths_measures_nothing(tmp_path, suffix):
    image = sitk.GetImageFromArray(some_values().T)
    image.SetSpacing((0.5, 0.75, 2.5))
    path, other = tmp_path / f"x.{suffix}", tmp_path / f"y.{suffix}"
    sitk.WriteImage(image, str(path))
    lines = path.read_bytes().split(b"\n", 12)
    kept = [line for line in lines if not line.lower().startswith((b"space", b"elementspacing"))]
    other.write_bytes(b"\n".join(kept))
    assert read(path).measured and not read(other).measured
    np.testing.assert_array_equal(read(other).values, some_values())
    millilitres = []
    for scan in (read(path), read(other)):
        write_results(str(tmp_path), scan, pictures(scan), {"all": np.ones(scan.shape, bool)}, {"all": 1.0}, "model")
        millilitres.append((tmp_path / "table.tsv").read_text().splitlines()[1].split("\t")[3])
    assert millilitres == [f"{some_values().size * 0.5 * 0.75 * 2.5 / 1000:.3f}", ""]


def test_a_fourth_axis_is_chosen_by_index(tmp_path):
    values = np.stack([some_values(seed=seed) for seed in range(3)], axis=-1)
    write_nifti(tmp_path / "x.nii.gz", values)
    sitk.WriteImage(sitk.GetImageFromArray(values.T, isVector=False), str(tmp_path / "x.nrrd"))
    for name in ("x.nii.gz", "x.nrrd"):
        assert count_volumes(str(tmp_path / name)) == 3
        np.testing.assert_array_equal(read(tmp_path / name, 2).values, values[..., 2])
        for index in (None, 3):
            with pytest.raises(DataError, match="several volumes in one file.*0 to 2"):
                read(tmp_path / name, index)


def test_scaled_values_and_other_units_of_length(tmp_path):
    image = nibabel.Nifti1Image(some_values().astype(np.float32) / 4, np.diag([0.5, 0.5, 2, 1]))
    image.set_data_dtype(np.int16)
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "x.nii")
    volume = read(tmp_path / "x.nii")
    np.testing.assert_allclose(volume.values, some_values() / 4, atol=0.02)
    np.testing.assert_allclose(volume.spacing, [0.0005, 0.0005, 0.002])


def test_the_axis_of_slices_is_the_files_or_the_coarsest(tmp_path):
    image = nibabel.Nifti1Image(some_values(), np.diag([1, 1, 1, 1.0]))
    image.header.set_dim_info(slice=1)
    nibabel.save(image, tmp_path / "said.nii")
    write_nifti(tmp_path / "coarse.nii", some_values(), np.diag([4, 1, 1, 1.0]))
    write_nifti(tmp_path / "even.nii", some_values())
    assert [read(tmp_path / f"{name}.nii").slice_axis for name in ("said", "coarse", "even")] == [1, 0, 2]


def test_colour_of_nifti(tmp_path):
    values = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    values["G"] = 7
    write_nifti(tmp_path / "x.nii", values)
    assert read(tmp_path / "x.nii").values[0, 0, 0].tolist() == [0, 7, 0]


def _write(path, **header):
    write_nifti(path, some_values())
    image = nibabel.load(path)
    raw = bytearray(path.read_bytes())
    changed = image.header.copy()
    for name, value in header.items():
        changed[name] = value
    raw[:348] = changed.binaryblock
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "header, what",
    [
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "scan is too large"),
        ({"dim": [2, 5, 42, 1, 1, 1, 1, 1]}, "not a volume of three axes"),
        ({"srow_x": [0, 0, 0, 0]}, "voxel size cannot be used|one plane"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "voxel size cannot be used"),
        ({"dim": [3, 500, 500, 50, 1, 1, 1, 1]}, "scan cannot be read"),
    ],
)
def test_headers_that_cannot_be_right_are_refused(tmp_path, header, what):
    _write(tmp_path / "x.nii", **header)
    with pytest.raises(DataError, match=what):
        read(tmp_path / "x.nii")


def test_files_that_are_cut_off_are_refused(tmp_path):
    for name, content in {
        "x.nii.gz": gzip.compress(b"\0" * 5000)[:20],
        "x.nrrd": b"NRRD0004\n",
        "x.mha": b"no",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="scan cannot be read"):
            read(tmp_path / name)


def test_a_file_without_orientation_says_so(tmp_path):
    image = nibabel.Nifti1Image(some_values(), None)
    nibabel.save(image, tmp_path / "x.nii")
    assert [notice.what for notice in read(tmp_path / "x.nii").notices] == ["orientation is not given"]

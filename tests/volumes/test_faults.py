"""Corrupted and odd scans: each is named or read, none ends in another error, and what must be refused is.

FAULTS=500 python -m pytest tests/volumes/test_faults.py
"""

import os
import pathlib
import shutil

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from medplib_jax.data.errors import DataError
from medplib_jax.volumes.read import find_scans
from tests.volumes.scans import real, some_values, write_nifti, write_series

TRIALS = int(os.environ.get("FAULTS", 60))
ODD_TAGS = {  # a value that no slice of a scan can have
    "Rows": [0, 1, 65535],
    "Columns": [0, 65535],
    "BitsAllocated": [0, 7, 64],
    "BitsStored": [0, 17],
    "SamplesPerPixel": [0, 2],
    "NumberOfFrames": [0, -3, 2**31 - 1],
    "PixelSpacing": [[0, 0], [1e9, 1], [-1, 1]],
    "ImageOrientationPatient": [[1, 0, 0, 1, 0, 0], [9, 0, 0, 0, 9, 0]],
    "ImagePositionPatient": [["nan"] * 3, [1, 2]],
    "RescaleSlope": ["nan", 0],
    "PhotometricInterpretation": ["RGB", "YBR_FULL", "PALETTE COLOR", "x"],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_series(folder / "series", some_values((12, 10, 6)))
    write_nifti(folder / "a.nii", some_values((12, 10, 6)))
    write_nifti(folder / "b.nii.gz", some_values((12, 10, 6)))
    for suffix in ("nrrd", "mha"):
        sitk.WriteImage(sitk.GetImageFromArray(some_values((12, 10, 6)).T), str(folder / f"c.{suffix}"))
    for name in ("CT_small.dcm", "MR_small_RLE.dcm", "SC_rgb_small_odd.dcm", "MR_small_jp2klossless.dcm"):
        shutil.copy(real(name), folder / name)
    return folder


def read_all(path):
    """What is read of a folder, and what is named."""
    found = find_scans(str(path))
    scans, problems = [], list(found.problems)
    for scan in found.scans:
        try:
            scans.append(scan.read())
        except DataError as error:
            problems.append(error)
    for problem in problems:
        assert problem.file and problem.what and "\n" not in str(problem)
        assert "Somebody" not in str(problem) and "4711" not in str(problem)
    return scans, problems


@pytest.mark.parametrize("seed", range(TRIALS))
def test_broken_bytes_are_named_or_read(tmp_path, sources, seed, capfd):
    rng = np.random.default_rng(seed)
    shutil.copytree(sources, tmp_path / "s")
    files = sorted(p for p in (tmp_path / "s").rglob("*") if p.is_file())
    path = files[seed % len(files)]
    content = bytearray(path.read_bytes())
    kind = ("cut", "flip", "flip", "insert", "empty", "zeros")[seed // len(files) % 6]
    place = int(rng.integers(len(content)))
    if kind == "flip":
        for _ in range(8):
            content[int(rng.integers(min(len(content), 1200)))] = int(rng.integers(256))
    else:
        content = {
            "cut": content[:place],
            "insert": content[:place] + bytes(rng.integers(0, 256, 9, np.uint8)) + content[place:],
            "empty": bytearray(),
            "zeros": bytearray(len(content)),
        }[kind]
    path.write_bytes(content)
    scans, problems = read_all(tmp_path / "s")
    assert len(scans) + len(problems) >= 9
    if kind in ("empty", "zeros"):
        assert problems
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(("tag", "value"), [(tag, value) for tag, values in ODD_TAGS.items() for value in values])
def test_odd_tags_are_refused_or_do_not_count(tmp_path, tag, value):
    """A file with one wrong tag is named, or its values are those of the file without it."""
    data = pydicom.dcmread(real("CT_small.dcm"))
    expected = data.pixel_array * 1.0 + data.RescaleIntercept
    with pydicom.config.disable_value_validation():
        setattr(data, tag, value)
        data.save_as(tmp_path / "x.dcm")
    scans, problems = read_all(tmp_path)
    assert problems or tag in ("PixelSpacing", "ImagePositionPatient", "NumberOfFrames")
    assert all(np.isfinite(scan.affine).all() for scan in scans)
    if scans:
        np.testing.assert_array_equal(scans[0].values[:, :, 0].T, expected)


def test_cut_off_voxels_are_never_used(tmp_path):
    write_series(tmp_path / "s", some_values((12, 10, 6)))
    file = sorted((tmp_path / "s").iterdir())[2]
    file.write_bytes(file.read_bytes()[:-20])
    scans, problems = read_all(tmp_path / "s")
    assert not scans and [pathlib.Path(p.file).name for p in problems] == [file.name]
    image = nibabel.Nifti1Image(some_values((12, 10, 6)), np.eye(4))
    nibabel.save(image, tmp_path / "x.nii")
    sitk.WriteImage(sitk.GetImageFromArray(some_values((12, 10, 6)).T), str(tmp_path / "x.nrrd"))
    sitk.WriteImage(sitk.GetImageFromArray(some_values((12, 10, 6)).T), str(tmp_path / "x.mha"))
    for name in ("x.nii", "x.nrrd", "x.mha"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    assert not any(one.file.startswith(str(tmp_path / "x")) for one in read_all(tmp_path)[0])

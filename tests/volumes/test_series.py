"""DICOM series as volumes: sorted, taken apart where they are several, refused where slices are missing or doubled."""

import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from medplib_jax.data.errors import DataError
from medplib_jax.volumes.formats import itk_affine
from medplib_jax.volumes.geometry import cut
from medplib_jax.volumes.read import find_scans, read_scan
from tests.volumes.scans import AXIAL, SAGITTAL, lps_affine, some_values, write_dicom, write_series

OBLIQUE = (0.8, 0.6, 0, 0, 0, -1)


@pytest.mark.parametrize("direction", [AXIAL, SAGITTAL, OBLIQUE, (0, -1, 0, 1, 0, 0)])
def test_a_series_is_sorted_along_its_normal_and_lies_where_itk_says(tmp_path, direction):
    values = some_values()
    write_series(tmp_path / "s", values, spacing=(0.5, 0.75, 2.5), direction=direction, origin=(-12.5, 30, 7))
    volume = read_scan(str(tmp_path / "s"))
    np.testing.assert_array_equal(volume.values, values)
    assert volume.values.dtype == np.int16 and volume.modality == "CT" and volume.located
    np.testing.assert_allclose(volume.affine, lps_affine((0.5, 0.75, 2.5), direction, (-12.5, 30, 7)), atol=1e-6)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    image = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, volume.values)
    np.testing.assert_allclose(itk_affine(image), volume.affine, atol=1e-5)


def test_several_series_and_patients_in_one_folder_are_several_scans(tmp_path):
    made = {}
    for number, patient in enumerate(("A-1234", "B-5678", "A-1234")):
        values = some_values(seed=number)
        made[values.tobytes()] = patient
        write_series(tmp_path / f"part{number}", values, PatientID=patient)
        for file in (tmp_path / f"part{number}").iterdir():
            (tmp_path / "all").mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / "all" / f"{number}-{file.name}")
        shutil.rmtree(tmp_path / f"part{number}")
    found = find_scans(str(tmp_path))
    assert len(found.scans) == 3 and not found.problems
    hashes = {scan.read().values.astype(np.int16).tobytes(): scan.patient for scan in found.scans}
    assert len({scan.name for scan in found.scans}) == 3 and hashes.keys() == made.keys()
    assert len(set(hashes.values())) == 2 and not set(hashes.values()) & set(made.values())
    assert {hashes[key] for key, patient in made.items() if patient == "A-1234"} != {
        hashes[key] for key, patient in made.items() if patient == "B-5678"
    }
    with pytest.raises(DataError, match="several scans.*0 to 2"):
        read_scan(str(tmp_path))
    assert read_scan(str(tmp_path), index=1).shape == (5, 6, 7)


def test_names_hold_no_name_or_number_of_the_patient(tmp_path):
    write_series(tmp_path / "KNOWN Somebody" / "K-4711", some_values())
    (scan,) = find_scans(str(tmp_path)).scans
    text = (scan.name + scan.read().name + repr(scan.read().patient)).lower()
    assert "known" not in text and "somebody" not in text and "4711" not in text and scan.patient in scan.name
    assert scan.place == "KNOWN Somebody/K-4711"


def _broken(folder, change):
    files = {pydicom.dcmread(file).ImagePositionPatient[2]: file for file in folder.iterdir()}
    ordered = [files[z] for z in sorted(files)]
    change(ordered)
    return find_scans(str(folder))


def _moved(file, place, **tags):
    data = pydicom.dcmread(file)
    data.ImagePositionPatient = place
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(file)


@pytest.mark.parametrize(
    "change, what, found",
    [
        (lambda files: files[3].unlink(), "slices are missing", "4.000 mm before"),
        (lambda files: _moved(files[3], [0, 0, 6.8]), "slices are not evenly spaced", "mm"),
        (lambda files: _moved(files[3], [0, 0, 8]), "several slices lie at one place", ""),
        (lambda files: _moved(files[3], [5, 0, 6]), "slices are not evenly spaced", "mm"),
    ],
)
def test_gaps_doubles_and_mixed_spacing_are_refused(tmp_path, change, what, found):
    write_series(tmp_path, some_values())
    result = _broken(tmp_path, change)
    assert not result.scans and [problem.what for problem in result.problems] == [what]
    assert found in result.problems[0].found and str(tmp_path) in result.problems[0].file


def test_a_copy_of_a_slice_is_left_out_by_name(tmp_path):
    write_series(tmp_path, some_values())
    shutil.copy(tmp_path / "003", tmp_path / "copy of 003")
    result = find_scans(str(tmp_path))
    np.testing.assert_array_equal(result.scans[0].read().values, some_values())
    assert [(problem.what, problem.file) for problem in result.problems] == [
        ("copy of another file's slice", str(tmp_path / "copy of 003"))
    ]


def test_files_that_are_left_out_of_a_scan_are_told(tmp_path):
    write_series(tmp_path, some_values())
    (tmp_path / "report.txt").write_text("x")
    (notice,) = read_scan(str(tmp_path)).notices
    assert notice.file == str(tmp_path / "report.txt") and notice.what == "scan cannot be read"


def test_times_of_one_place_become_volumes_of_their_own(tmp_path):
    first = write_series(tmp_path / "a", some_values(seed=1), AcquisitionNumber=1)
    same = {name: first[0][name].value for name in ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")}
    write_series(tmp_path / "b", some_values(seed=2), AcquisitionNumber=2, **same)
    found = find_scans(str(tmp_path))
    assert not found.problems and len({scan.name for scan in found.scans}) == 2
    sums = {int(scan.read().values.astype(int).sum()) for scan in found.scans}
    assert sums == {int(some_values(seed=seed).astype(int).sum()) for seed in (1, 2)}


def test_gantry_tilt_is_named_and_only_cut_as_acquired(tmp_path):
    write_series(tmp_path, some_values(), shift=(0, 0.5, 0))
    volume = read_scan(str(tmp_path))
    assert [notice.what for notice in volume.notices] == ["slices are sheared (gantry tilt)"]
    assert "14.04 degrees" in volume.notices[0].found
    assert len(cut(volume)) == 7
    with pytest.raises(DataError, match="sheared"):
        cut(volume, "coronal")


def test_slices_scaled_differently_are_brought_to_one_unit(tmp_path):
    write_series(tmp_path, some_values((4, 4, 3)))
    for file, slope in zip(sorted(tmp_path.iterdir()), (0.5, 2, 4), strict=True):
        data = pydicom.dcmread(file)
        stored = data.pixel_array.copy()
        data.RescaleSlope, data.RescaleIntercept = slope, 1
        data.save_as(file)
        expected = stored * slope + 1
        place = round(data.ImagePositionPatient[2] / 2)
        np.testing.assert_allclose(_single(file).values[:, :, 0].T, expected)
        file.with_suffix(".npy").write_bytes(b"")
        np.save(file.with_suffix(".npy"), np.array([place, *expected.ravel()]))
    volume = find_scans(str(tmp_path)).scans[0].read()
    assert volume.values.dtype == np.float32
    for saved in tmp_path.glob("*.npy"):
        place, *expected = np.load(saved)
        np.testing.assert_allclose(volume.values[:, :, int(place)].T.ravel(), expected)


def _single(file):
    return read_scan(str(file))


def test_values_beyond_16_bits_widen_the_volume(tmp_path):
    write_dicom(tmp_path / "x.dcm", np.array([[30000, -30000]]), RescaleSlope=4)
    assert read_scan(str(tmp_path / "x.dcm")).values[:, 0, 0].tolist() == [118976, -121024]

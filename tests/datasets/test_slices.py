"""DICOM and NIfTI scans to a folder of images with named masks, and on to questions."""

import json

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.qa.folder import scan
from medplib_jax.datasets.slices import SliceOptions, make_slices


def write_nifti(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def write_dicom(path, values, **tags):
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.Modality, data.PatientName = "CT", "Somebody^Known"
    data.Rows, data.Columns = values.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleIntercept, data.RescaleSlope = -1024, 2
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.astype(np.int16).tobytes()
    data.save_as(path)


def picture(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def volume():
    """[x, y, z] with the patient's right anterior corner bright; 20 x 24 voxels, 3 slices."""
    values = np.zeros((20, 24, 3), np.int16)
    values[15:, 18:, 1] = 400
    return values


def test_axial_slices_lie_as_a_radiologist_expects(tmp_path, volume):
    write_nifti(tmp_path / "s/images/case1.nii.gz", volume)
    write_nifti(tmp_path / "s/masks/case1/left_kidney.nii.gz", (volume > 0).astype(np.uint8))
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("CT", (200, 400)))
    assert [manifest[name] for name in ("scans", "slices", "patients", "skipped")] == [1, 1, 1, 0]
    (stem,) = json.loads((tmp_path / "out/metadata.json").read_text())
    assert stem == "ct_00--s--case1--z_0001"
    shown = picture(tmp_path / f"out/images/{stem}.png")
    assert shown.shape == (24, 20) and (shown[:6, :5] == 255).all() and shown.sum() == 255 * 30
    np.testing.assert_array_equal(picture(tmp_path / f"out/masks/{stem}/left_kidney.png"), shown)
    (pair,), problems = scan(str(tmp_path / "out"))
    assert pair.names == ("left kidney",) and pair.modality == "ct" and not problems


def test_a_volume_stored_in_another_orientation_gives_the_same_slices(tmp_path, volume):
    write_nifti(tmp_path / "a/s/images/case.nii", volume)
    write_nifti(
        tmp_path / "b/s/images/case.nii",
        volume[::-1].transpose(1, 0, 2),
        np.array([[0, -1, 0, 19], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    )
    for folder in "ab":
        assert (
            make_slices(str(tmp_path / folder / "s"), str(tmp_path / folder / "out"), SliceOptions("MR"))["slices"] == 3
        )
    for number in range(3):
        name = f"out/images/mr_00--s--case--z_{number:04d}.png"
        np.testing.assert_array_equal(picture(tmp_path / "a" / name), picture(tmp_path / "b" / name))


def test_dicom_is_shown_in_its_window_without_a_name_of_the_patient(tmp_path):
    units = np.array([[-200, 40], [90, 300]])
    write_dicom(tmp_path / "s/images/p/one.dcm", (units + 1024) // 2, WindowCenter=40, WindowWidth=200)
    write_dicom(
        tmp_path / "s/images/inverted.dcm", (units + 1024) // 2, PhotometricInterpretation="MONOCHROME1", Modality="CR"
    )
    (tmp_path / "s/masks/p/one").mkdir(parents=True)
    Image.fromarray(np.array([[0, 255], [0, 0]], np.uint8)).save(tmp_path / "s/masks/p/one/cyst.png")
    make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions(window=(40, 200)))
    shown = picture(tmp_path / "out/images/ct_00--s--p--one--z_0000.png")
    np.testing.assert_allclose(shown, [[0, 127.5], [191, 255]], atol=1)
    np.testing.assert_array_equal(picture(tmp_path / "out/images/x_ray_00--s--inverted--z_0000.png"), 255 - shown)
    assert picture(tmp_path / "out/masks/ct_00--s--p--one--z_0000/cyst.png")[0, 1] == 255
    assert not any(b"Somebody" in file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())


def test_what_cannot_be_used_is_named(tmp_path, volume):
    source = tmp_path / "s"
    write_nifti(source / "images/good.nii", volume)
    write_nifti(source / "images/moved.nii", volume)
    write_nifti(source / "masks/moved/cyst.nii", volume, np.diag([2.0, 1, 1, 1]))
    write_nifti(source / "images/flat.nii", volume[:, :, 0])
    (source / "images/cut.nii").write_bytes((source / "images/good.nii").read_bytes()[:300])
    write_nifti(source / "images/half.nii", volume)
    (source / "images/half.nii").write_bytes((source / "images/half.nii").read_bytes()[:1000])
    (source / "images/text.dcm").write_text("not DICOM")
    manifest = make_slices(str(source), str(tmp_path / "out"), SliceOptions("CT", every=2))
    assert manifest["slices"] == 2 and manifest["skipped"] == 5
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert {line["file"].split("/")[-1]: line["what"] for line in lines} == {
        "cyst.nii": "mask on another grid than its scan",
        "flat.nii": "not a volume of three axes",
        "cut.nii": "scan cannot be read",
        "half.nii": "scan cannot be read",
        "text.dcm": "scan cannot be read",
    }
    with pytest.raises(DataError, match="no scans"):
        make_slices(str(tmp_path / "out"), str(tmp_path / "other"), SliceOptions())


@pytest.mark.parametrize("wrong, message", [({"window": (0, 0)}, "width above 0"), ({"every": 0}, "at least 1")])
def test_options_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        SliceOptions(**wrong)

"""DICOM and NIfTI scans to a folder of images with named masks, and on to questions."""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from medplib_jax.data.errors import DataError
from medplib_jax.datasets import slices, write_qa
from medplib_jax.datasets.audit.collect import audit
from medplib_jax.datasets.files import files_below
from medplib_jax.datasets.qa.folder import scan
from medplib_jax.datasets.slices import SliceOptions, make_slices
from medplib_jax.volumes.read import read_scan
from medplib_jax.volumes.write import write_dicom_seg
from tests.volumes.scans import real, some_values, write_dicom, write_nifti, write_series


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
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("CT", "200,400"))
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
    make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions(window="40,200"))
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
        "cyst.nii": "mask on another grid than its scan: spacing differs",
        "flat.nii": "not a volume of three axes",
        "cut.nii": "scan cannot be read",
        "half.nii": "scan cannot be read",
        "text.dcm": "scan cannot be read",
    }
    with pytest.raises(DataError, match="no scans"):
        make_slices(str(tmp_path / "out"), str(tmp_path / "other"), SliceOptions())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"window": "0,0"}, "width above 0"),
        ({"window": "skin"}, "expected centre,width"),
        ({"every": 0}, "at least 1"),
        ({"plane": "x"}, "expected one of acquired"),
    ],
)
def test_options_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        SliceOptions(**wrong)


def test_a_patient_of_several_dicom_files_is_in_one_split_and_the_audit_agrees(tmp_path):
    for patient in range(6):
        for number in range(4):
            values = np.random.default_rng([patient, number]).integers(0, 900, (20, 20))
            name = f"s/images/{patient * 4 + number}.dcm"
            write_dicom(tmp_path / name, values, PatientID=f"ID-{patient}" if patient else "", StudyInstanceUID="1.2")
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "slices"), SliceOptions())
    assert manifest["patients"] == 6 and manifest["slices"] == 24
    assert not any(b"ID-" in file.read_bytes() for file in (tmp_path / "slices").rglob("*") if file.is_file())
    options = write_qa.QaOptions(test_share=0.5)
    write_qa.write_qa(str(tmp_path / "slices"), str(tmp_path / "qa"), write_qa.TemplateWriter(0), options)
    report, facts = audit(str(tmp_path / "qa"))
    assert len({one.patient for one in facts}) == 6 and {one.held_out for one in facts} == {True, False}
    assert "held-out patient is in the training data" not in report["finding_counts"]


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (("p1/flair", "p1/t1", "p2/flair", "p2/t1"), ""),
        (("BRATS_001_flair", "BRATS_001_t1ce", "BRATS_002_flair", "BRATS_002_t1ce"), ""),
        (("case1_0000", "case1_0001", "case2_0000", "case2_0001"), ""),
        (("sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02/anat/a", "sub-02/anat/b"), ""),
        (("x-17-a", "x-17-b", "x-18-a", "x-18-b"), r"x-(\d+)"),
    ],
)
def test_sequences_of_a_patient_belong_together(tmp_path, volume, names, pattern):
    for name in names:
        write_nifti(tmp_path / f"s/images/{name}.nii.gz", volume)
    make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("MR", patient=pattern))
    patients = [entry["patient"] for entry in json.loads((tmp_path / "out/metadata.json").read_text()).values()]
    assert len(patients) == 12 and sorted(map(patients.count, set(patients))) == [6, 6]


def test_a_name_that_does_not_tell_the_patient_is_named(tmp_path, volume):
    for name in ("x-17", "other"):
        write_nifti(tmp_path / f"s/images/{name}.nii", volume)
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("MR", patient=r"\d+"))
    assert manifest["reasons"] == {"name does not tell the patient": 1} and manifest["scans"] == 1
    with pytest.raises(ValueError, match="--patient: expected a regular expression"):
        SliceOptions(patient="(")


ODD_SCANS = {
    "complex.nii": lambda path: write_nifti(path, np.ones((8, 8, 2), np.complex64)),
    "nan.nii": lambda path: write_nifti(path, np.full((8, 8, 2), np.nan, np.float32)),
    "empty.dcm": lambda path: path.write_bytes(b""),
    "empty.nii.gz": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", ODD_SCANS)
def test_one_odd_scan_is_named_and_the_others_are_used(tmp_path, volume, name):
    write_nifti(tmp_path / "s/images/good.nii", volume)
    ODD_SCANS[name](tmp_path / "s/images" / name)
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("MR"))
    (line,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert name in json.loads(line)["file"] and manifest["scans"] == 1 and manifest["skipped"] == 1
    assert json.loads((tmp_path / "out/metadata.json").read_text()).keys() == {
        path.stem for path in (tmp_path / "out/images").iterdir()
    }


def test_of_a_scan_that_breaks_in_the_middle_nothing_stays(tmp_path, volume, monkeypatch):
    write_nifti(tmp_path / "s/images/a.nii", volume)
    write_nifti(tmp_path / "s/images/b.nii", volume)
    shown, calls = slices.Pictures.__getitem__, []
    broken = lambda self, number: shown(self, number) if len(calls) < 4 and not calls.append(0) else 1 / 0
    monkeypatch.setattr(slices.Pictures, "__getitem__", broken)
    make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("MR"))
    assert {path.stem.split("--")[2] for path in (tmp_path / "out/images").iterdir()} == {"a"}


def test_files_of_the_system_do_not_count(tmp_path, volume):
    write_nifti(tmp_path / "s/images/a.nii", volume)
    write_nifti(tmp_path / "s/masks/a/liver.nii", (volume > 0).astype(np.uint8))
    for name in ("images/._a.nii", "masks/a/.DS_Store", "masks/.DS_Store", ".git/x", "masks/a/Thumbs.db"):
        (tmp_path / "s" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "s" / name).write_bytes(b"\0")
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("MR"))
    assert (manifest["slices"], manifest["skipped"]) == (1, 0)


def test_every_file_is_used_or_named(tmp_path, volume):
    source = tmp_path / "s"
    write_nifti(source / "images/a.nii.gz", volume)
    write_nifti(source / "masks/a/liver.nii.gz", (volume > 0).astype(np.uint8))
    lost = ("masks/A/liver.nii.gz", "masks/b/liver.nii.gz", "imagesTr/c.nii.gz", "labelsTr/a.nii.gz")
    for name in lost:
        write_nifti(source / name, volume)
    write_nifti(source / "masks/a.nii.gz", volume)  # there is no labels.json
    (source / "images/notes.txt").write_text("x")
    make_slices(str(source), str(tmp_path / "out"), SliceOptions("MR"))
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    named = {str(pathlib.Path(line["file"]).relative_to(source)) for line in lines}
    assert named == {*lost, "images/notes.txt", "masks/a.nii.gz"}
    assert set(files_below(str(source))) == named | {"images/a.nii.gz", "masks/a/liver.nii.gz"}


def test_scans_that_would_share_their_files_are_refused(tmp_path, volume):
    for name in ("P 1", "P_1"):
        write_nifti(tmp_path / f"s/images/{name}.nii.gz", volume)
    with pytest.raises(DataError, match="two scans would share their files.*P 1.nii.gz, images/P_1.nii.gz"):
        make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("MR"))


def test_each_value_of_a_label_map_is_a_mask(tmp_path, volume):
    labels = (volume > 0).astype(np.uint8) * 2
    labels[:4, :4, 1], labels[5:8, :4, 1] = 13, 9
    write_nifti(tmp_path / "s/images/a.nii.gz", volume)
    write_nifti(tmp_path / "s/masks/a/segmentation.nii.gz", labels)
    make_slices(str(tmp_path / "s"), str(tmp_path / "one"), SliceOptions("MR"))
    assert "mask has several values" in (tmp_path / "one/skipped.jsonl").read_text()
    (tmp_path / "s/labels.json").write_text(json.dumps({"background": 0, "liver": 2, "left kidney": "13"}))
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("MR"))
    assert manifest["reasons"] == {"value without a name": 1}
    masks = sorted((tmp_path / "out/masks").rglob("*.png"))
    assert [path.name for path in masks] == ["left_kidney.png", "liver.png"]
    np.testing.assert_array_equal(picture(masks[0]) > 0, (labels[::-1, ::-1, 1] == 13).T)


def test_a_window_may_begin_with_a_minus(tmp_path, volume, monkeypatch, capsys):
    write_nifti(tmp_path / "s/images/a.nii.gz", volume)
    arguments = ["--source", str(tmp_path / "s"), "--out", str(tmp_path / "out"), "--window", "-600,1500"]
    monkeypatch.setattr(sys, "argv", ["slices", *arguments])
    assert slices.main() == 0 and json.loads(capsys.readouterr().out)["window"] == "-600,1500"


def test_a_full_disk_is_one_line(tmp_path, volume, monkeypatch, capsys):
    write_nifti(tmp_path / "s/images/a.nii.gz", volume)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device", "out")))
    monkeypatch.setattr(sys, "argv", ["slices", "--source", str(tmp_path / "s"), "--out", str(tmp_path / "out")])
    assert slices.main() == 1
    assert capsys.readouterr().err.splitlines()[-1] == "[Errno 28] No space left on device: 'out'"


def series(folder, **tags):
    values = some_values((20, 24, 6))
    write_series(folder, values, **tags)
    return values


def test_a_series_is_cut_as_one_scan_and_every_counts_along_it(tmp_path):
    values = series(tmp_path / "s/images/case", WindowCenter=0, WindowWidth=1000)
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions(every=4))
    assert (manifest["scans"], manifest["slices"], manifest["skipped"]) == (1, 2, 0)
    for number in (0, 4):
        shown = picture(tmp_path / f"out/images/ct_00--s--case--z_{number:04d}.png").astype(float)
        np.testing.assert_allclose(shown, np.clip((values[:, :, number].T + 500) / 999 * 255, 0, 255), atol=1)


def test_planes_have_square_pixels(tmp_path):
    series(tmp_path / "s/images/case", spacing=(0.5, 0.5, 2))
    make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions(plane="coronal"))
    pictures = sorted((tmp_path / "out/images").iterdir())
    assert len(pictures) == 24 and picture(pictures[0]).shape == (24, 20)


def test_negatives_are_kept_on_request_and_empty_masks_are_named(tmp_path, volume):
    write_nifti(tmp_path / "s/images/a.nii.gz", volume)
    write_nifti(tmp_path / "s/masks/a/liver.nii.gz", (volume > 0).astype(np.uint8))
    write_nifti(tmp_path / "s/images/b.nii.gz", volume)
    write_nifti(tmp_path / "s/masks/b/liver.nii.gz", np.zeros_like(volume))
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("CT"))
    assert manifest["slices"] == 1 and manifest["reasons"] == {"all masks of the scan are empty": 1}
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("CT", negatives=True))
    assert manifest["slices"] == 6 and manifest["skipped"] == 0


def test_masks_of_dicom_and_nifti_and_maps_with_own_names_meet_a_series(tmp_path):
    values = series(tmp_path / "s/images/case")
    volume = read_scan(str(tmp_path / "s/images/case"))
    spot = np.zeros(values.shape, bool)
    spot[3:6, 4:9, 2] = True
    write_dicom_seg(str(tmp_path / "s/images/seg"), {"cyst": spot}, volume, "a model")
    write_nifti(tmp_path / "s/masks/case/liver.nii.gz", spot[::-1].astype(np.uint8), volume.affine @ flipped(20))
    write_nifti(tmp_path / "s/labels/case.nii.gz", spot.astype(np.uint8) * 3, volume.affine)
    (tmp_path / "s/labels/case.json").write_text(json.dumps({"3": {"name": "left kidney"}}))
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions())
    assert manifest["slices"] == 1 and manifest["skipped"] == 0
    masks = sorted((tmp_path / "out/masks").rglob("*.png"))
    assert [mask.name for mask in masks] == ["cyst.png", "left_kidney.png", "liver.png"]
    for mask in masks:
        np.testing.assert_array_equal(picture(mask) > 0, spot[:, :, 2].T)


def flipped(size):
    matrix = np.diag([-1.0, 1, 1, 1])
    matrix[0, 3] = size - 1
    return matrix


def test_what_is_beside_series_is_named(tmp_path):
    series(tmp_path / "s/images/case")
    volume = read_scan(str(tmp_path / "s/images/case"))
    series(tmp_path / "elsewhere")
    other = read_scan(str(tmp_path / "elsewhere"))
    write_dicom_seg(str(tmp_path / "s/images/seg"), {"x": np.ones(other.shape, bool)}, other, "a model")
    shutil.copy(real("rtdose.dcm"), tmp_path / "s/images/dose")
    (tmp_path / "s/masks/case").mkdir(parents=True)
    Image.fromarray(np.ones(volume.shape[1::-1], np.uint8)).save(tmp_path / "s/masks/case/liver.png")
    with pytest.raises(DataError, match="picture as mask of a scan of several slices"):
        make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions())
    (tmp_path / "s/masks/case/liver.png").unlink()
    manifest = make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions())
    assert manifest["reasons"] == {"DICOM object is not a picture": 1, "file is not used": 1}


def test_the_modality_of_the_command_line_goes_first(tmp_path):
    write_dicom(tmp_path / "s/images/a.dcm", np.zeros((20, 20)), Modality="OT")
    make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions("X-ray"))
    assert (tmp_path / "out/images/x_ray_00--s--a--z_0000.png").is_file()

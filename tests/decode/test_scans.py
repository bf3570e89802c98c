"""Scans answered slice by slice: masks in the scan's own space, resumed after an interruption, refused by name."""

import json
import sys

import nibabel
import numpy as np
import pydicom
import pytest

from medplib_jax import predict
from medplib_jax.data.errors import DataError
from medplib_jax.decode import scans
from medplib_jax.decode.predictor import Predictor
from medplib_jax.decode.scans import ScanOptions, SliceAnswer, answer_scan, answer_slices, scan_model
from medplib_jax.volumes.pictures import pictures
from medplib_jax.volumes.read import read_scan
from tests.volumes.scans import some_values, write_nifti, write_series

OBLIQUE = np.array([[0.5, 0.2, 0, 5], [-0.2, 0.5, 0, 6], [0, 0, 2.0, 7], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def predictor(workdir):
    return Predictor(workdir)


def oracle(truth, asked=None):
    """Answers with the truth: masks on the picture, as a model would draw them."""

    def answer(predictor, shown, structure, question, numbers, seed=0):
        for number in numbers:
            if asked is not None:
                asked.append((structure, number))
            plane = shown.cut.reoriented(truth[structure])[number]
            mask = shown.cut.mask_on_plane(shown.cut.mask_on_picture(plane)) if plane.any() else None
            yield SliceAnswer(structure, number, "It is <SEG>.", mask, 0.75 if plane.any() else 0.0)

    return answer


def blob(shape=(12, 14, 9), centre=(5, 6, 4), radius=3):
    grid = np.indices(shape)
    return sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) < radius**2


@pytest.mark.parametrize("plane", ["acquired", "axial", "coronal", "sagittal"])
def test_an_oracle_is_written_voxel_for_voxel(tmp_path, monkeypatch, predictor, plane):
    truth = {"liver": blob(), "tumour": blob(centre=(8, 9, 6), radius=2)}
    write_nifti(tmp_path / "scan.nii.gz", some_values((12, 14, 9)), OBLIQUE)
    monkeypatch.setattr(scans, "answer_slices", oracle(truth))
    options = ScanOptions(("liver", "tumour"), plane=plane)
    names = answer_scan(scan_model(predictor), str(tmp_path / "scan.nii.gz"), str(tmp_path / "out"), options)
    assert names == ["masks.nii.gz", "masks.json", "table.tsv", "preview.png", "preview.html"]
    written = nibabel.load(tmp_path / "out/masks.nii.gz")
    labels = np.asarray(written.dataobj)
    np.testing.assert_array_equal(labels == 2, truth["tumour"])
    np.testing.assert_array_equal(labels > 0, truth["liver"] | truth["tumour"])
    np.testing.assert_array_equal(written.affine, nibabel.load(tmp_path / "scan.nii.gz").affine)
    assert json.loads((tmp_path / "out/masks.json").read_text()) == {"1": "liver", "2": "tumour"}
    lines = (tmp_path / "out/table.tsv").read_text().splitlines()
    voxel = abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000
    assert lines[1].split("\t")[1:4] == ["liver", str(blob().sum()), f"{blob().sum() * voxel:.3f}"]
    assert lines[1].split("\t")[5] == "0.750"


def test_a_series_gets_a_dicom_seg(tmp_path, monkeypatch, predictor):
    write_series(tmp_path / "scan", some_values((12, 14, 9)))
    monkeypatch.setattr(scans, "answer_slices", oracle({"liver": blob()}))
    answer_scan(scan_model(predictor), str(tmp_path / "scan"), str(tmp_path / "out"), ScanOptions(("liver",)))
    data = pydicom.dcmread(tmp_path / "out/segmentation.dcm")
    assert int(data.pixel_array.sum()) == int(blob().sum())
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").iterdir() if p.suffix != ".dcm")
    assert b"Somebody" not in written and b"K-4711" not in written


def test_every_interpolates_and_parts_and_surface_are_cleaned(tmp_path, monkeypatch, predictor):
    truth = blob(shape=(30, 30, 21), centre=(14, 14, 10), radius=9) | blob((30, 30, 21), (27, 27, 18), 2)
    write_nifti(tmp_path / "scan.nii.gz", some_values(truth.shape))
    asked = []
    monkeypatch.setattr(scans, "answer_slices", oracle({"x": truth}, asked))
    options = ScanOptions(("x",), every=3, largest_component=True, smooth=0.7)
    answer_scan(scan_model(predictor), str(tmp_path / "scan.nii.gz"), str(tmp_path / "out"), options)
    assert [number for _, number in asked] == [0, 3, 6, 9, 12, 15, 18, 20]
    labels, ball = (
        np.asarray(nibabel.load(tmp_path / "out/masks.nii.gz").dataobj) > 0,
        blob(truth.shape, (14, 14, 10), 9),
    )
    assert not labels[24:, 24:].any() and 2 * (labels & ball).sum() / (labels.sum() + ball.sum()) > 0.93


def test_an_interruption_loses_no_finished_slice(tmp_path, monkeypatch, predictor):
    write_nifti(tmp_path / "scan.nii.gz", some_values((12, 14, 9)))
    asked, paths = [], (str(tmp_path / "scan.nii.gz"), str(tmp_path / "out"))

    def interrupted(*args, **more):
        for k, one in enumerate(oracle({"x": blob()}, asked)(*args, **more)):
            if k == 4:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(scans, "answer_slices", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer_scan(scan_model(predictor), *paths, ScanOptions(("x",)))
    with open(tmp_path / "out/slices.jsonl", "a") as file:
        file.write('{"structure": "x", "sl')  # cut off while it was written
    asked.clear()
    monkeypatch.setattr(scans, "answer_slices", oracle({"x": blob()}, asked))
    answer_scan(scan_model(predictor), *paths, ScanOptions(("x",)))
    assert [number for _, number in asked] == [4, 5, 6, 7, 8]
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "out/masks.nii.gz").dataobj) == 1, blob())
    asked.clear()
    answer_scan(scan_model(predictor), *paths, ScanOptions(("x",), window="0,100"))
    assert len(asked) == 9  # other pictures, other answers


def test_a_model_answers_every_slice(tmp_path, predictor):
    write_nifti(tmp_path / "scan.nii.gz", some_values((12, 14, 5)), np.diag([1, 2, 3, 1.0]))
    shown = pictures(read_scan(str(tmp_path / "scan.nii.gz")))
    found = list(answer_slices(predictor, shown, "lung", "Where is the {structure}?", range(5)))
    assert sorted(one.number for one in found) == list(range(5)) and {one.structure for one in found} == {"lung"}
    assert all(one.mask is None or one.mask.shape == (14, 12) for one in found)


def test_a_slice_is_answered_as_its_picture_is(tmp_path, predictor):
    from PIL import Image

    write_nifti(tmp_path / "scan.nii.gz", some_values((12, 14, 3)))
    shown = pictures(read_scan(str(tmp_path / "scan.nii.gz")))
    by_number = {one.number: one for one in answer_slices(predictor, shown, "", "Where is the lung?", range(3))}
    for number, one in by_number.items():
        Image.fromarray(shown[number]).save(tmp_path / "x.png")
        alone = predictor(tmp_path / "x.png", "Where is the lung?")
        assert one.answer == alone.answer and (one.mask is None) == (not alone.masks)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--slices", "3"], "--slices: expected A:B"),
        (["--slices", "2:99"], "no such slices"),
        (["--window", "skin"], "--window: expected"),
        (["--every", "0"], "at least 1"),
        (["--structures", "a;a"], "different names"),
    ],
)
def test_flags_that_cannot_be_used_are_one_line(tmp_path, workdir, monkeypatch, flags, message):
    write_nifti(tmp_path / "scan.nii.gz", some_values((12, 14, 5)))
    command = [
        "predict",
        "--checkpoint",
        str(workdir),
        "--image",
        str(tmp_path / "scan.nii.gz"),
        "--out",
        str(tmp_path / "o"),
    ]
    structures = [] if "--structures" in flags else ["--structures", "lung"]
    monkeypatch.setattr(sys, "argv", [*command, *structures, *flags])
    with pytest.raises(SystemExit) as stopped:
        predict.main()
    assert message in str(stopped.value)


def test_the_command_line_answers_a_scan(tmp_path, workdir, monkeypatch, capsys):
    write_series(tmp_path / "scan", some_values((12, 14, 4)))
    flags = [
        "--structures",
        "lung; heart",
        "--question",
        "Where is the {structure}?",
        "--slices",
        "1:4",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(
        sys, "argv", ["predict", "--checkpoint", str(workdir), "--image", str(tmp_path / "scan"), *flags]
    )
    predict.main()
    assert (tmp_path / "out/preview.png").is_file() and (tmp_path / "out/segmentation.dcm").is_file()
    answers = (tmp_path / "out/slices.jsonl").read_text().splitlines()[1:]
    assert sorted((a["structure"], a["slice"]) for a in map(json.loads, answers)) == [
        (name, number) for name in ("heart", "lung") for number in (1, 2, 3)
    ]
    assert "lung" in capsys.readouterr().out


def test_a_region_with_a_scan_is_refused(tmp_path, monkeypatch, capsys):
    flags = ["--image", str(tmp_path), "--structures", "x", "--box", "1,2,3,4", "--out", "o", "--checkpoint", "c"]
    monkeypatch.setattr(sys, "argv", ["predict", *flags])
    with pytest.raises(SystemExit):
        predict.main()
    assert "a region is of a picture" in capsys.readouterr().err


def test_slices_beyond_the_scan_are_refused(tmp_path, predictor):
    write_nifti(tmp_path / "scan.nii.gz", some_values((12, 14, 5)))
    with pytest.raises(DataError, match="A:B within 0:5"):
        answer_scan(
            scan_model(predictor),
            str(tmp_path / "scan.nii.gz"),
            str(tmp_path / "o"),
            ScanOptions(("x",), slices=(3, 9)),
        )

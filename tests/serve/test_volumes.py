"""Scans over HTTP, in the shape of VoxTell's server: what `predict` writes comes back, whoever else is asking."""

import gzip
import io
import json
import zipfile

import httpx
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from medplib_jax.decode.scans import ScanOptions, answer_scan, scan_model
from medplib_jax.volumes.pictures import pictures
from medplib_jax.volumes.read import read_scan
from medplib_jax.volumes.windows import parse_window
from tests.volumes.scans import some_values, write_nifti, write_series

QUESTION = "Where is the {structure}?"


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    write_nifti(path, some_values((12, 14, 5)), np.diag([1, 2, 3, 1.0]))
    return path


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=240) as client:
        yield client


@pytest.fixture(scope="module")
def image(client, scan):
    found = client.post("/images?include_image=false", content=scan.read_bytes())
    assert found.status_code == 200 and json.loads(found.headers["X-Meta"]) == found.json()
    return found.json()


def finished(client, **asked) -> str:
    job = client.post("/jobs", json=asked).json()["job_id"]
    events = [json.loads(line) for line in client.get(f"/jobs/{job}/events").text.splitlines()]
    assert events[-1] == {"status": "done"}
    assert all(event["done"] <= event["total"] for event in events[:-1])
    return job


def nifti(content: bytes) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(content))


def test_an_image_is_described(image):
    assert image["shape"] == [12, 14, 5] and image["spacing"] == [1, 2, 3] and image["series"] == 1
    assert image["planes"]["axial"] == {"slices": 5, "size": [28, 12]}


def test_a_slice_is_shown_as_the_model_sees_it(client, image, scan):
    found = client.get(f"/images/{image['image_id']}/slices/2?plane=coronal&window=lung")
    expected = pictures(read_scan(str(scan)), "coronal", parse_window("lung"))[2]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found.content))), expected)
    assert client.get(f"/images/{image['image_id']}/slices/14?plane=coronal").status_code == 404
    assert client.get(f"/images/{image['image_id']}/slices/0?window=x").status_code == 400


def test_a_job_finds_what_predict_finds(client, image, scan, predictor, tmp_path):
    asked = {"prompts": ["lung", "heart"], "question": QUESTION, "every": 2, "keep_largest": True}
    job = finished(client, image_id=image["image_id"], **asked)
    options = ScanOptions(("lung", "heart"), QUESTION, every=2, largest_component=True)
    answer_scan(scan_model(predictor), str(scan), str(tmp_path), options)
    expected, found = nibabel.load(tmp_path / "masks.nii.gz"), nifti(client.get(f"/jobs/{job}/result").content)
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_array_equal(found.affine, expected.affine)
    table = client.get(f"/jobs/{job}/result?format=table").text
    assert table == (tmp_path / "table.tsv").read_text()
    assert client.get(f"/jobs/{job}/result?format=dicom_seg").status_code == 404
    labels = np.asarray(expected.dataobj)
    slices = [client.get(f"/jobs/{job}/slices/{number}").json() for number in range(5)]
    assert sum(len(masks) for masks in slices) == sum(
        np.unique(labels[..., k]).size - (0 in labels[..., k]) for k in range(5)
    )
    assert all(mask["area_mm2"] == mask["area"] for masks in slices for mask in masks)


def test_a_series_in_an_archive_gets_a_dicom_seg(client, tmp_path):
    write_series(tmp_path / "Doe^John", some_values((12, 14, 4)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in (tmp_path / "Doe^John").iterdir():
            archive.write(path, f"Doe^John/{path.name}")
    image = client.post("/images", content=buffer.getvalue()).json()
    assert image["modality"] and "Doe" not in json.dumps(image)
    job = finished(client, image_id=image["image_id"], prompts="lung", question=QUESTION)
    found = client.get(f"/jobs/{job}/result?format=dicom_seg")
    assert pydicom.dcmread(io.BytesIO(found.content)).Modality == "SEG"


def test_the_files_of_a_form_are_one_scan(client, tmp_path):
    write_series(tmp_path / "scan", some_values((12, 14, 4)))
    files = [("files", (path.name, path.read_bytes())) for path in (tmp_path / "scan").iterdir()]
    assert client.post("/images", files=files).json()["shape"] == [12, 14, 4]


@pytest.mark.parametrize(
    "content", [b"", b"no scan", b"\x1f\x8b\x08" + b"\0" * 60, b"PK\x03\x04", b"\0" * 128 + b"DICM"]
)
def test_what_is_no_scan_is_refused(client, server, content):
    found = client.post("/images", content=content)
    assert found.status_code == 400 and str(server.log.parent) not in found.text
    assert list(server.log.with_suffix("").glob("images/.*")) == []


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"image_id": "0" * 32}, 404),
        ({"image_id": "../jobs"}, 404),
        ({"prompts": []}, 400),
        ({"prompts": [""]}, 400),
        ({"prompts": ["a", "a"]}, 400),
        ({"prompts": ["x" * 300]}, 400),
        ({"window": "x"}, 400),
        ({"plane": "upward"}, 400),
        ({"every": 0}, 400),
        ({"model": "gpt"}, 400),
        ({"slice": [0, 1]}, 400),
    ],
)
def test_jobs_that_cannot_be_run_are_refused(client, image, change, status):
    asked = {"image_id": image["image_id"], "prompts": ["lung"]} | change
    found = client.post("/jobs", json=asked)
    assert found.status_code == status and found.json()["error"]["message"]


def test_a_removed_image_and_job_are_gone(client, scan):
    image = client.post("/images", content=scan.read_bytes()).json()["image_id"]
    job = finished(client, image_id=image, prompts="lung", question=QUESTION, slices=[0, 1])
    assert client.delete(f"/jobs/{job}").status_code == client.delete(f"/images/{image}").status_code == 200
    for path in (f"/jobs/{job}", f"/jobs/{job}/events", f"/jobs/{job}/result", f"/images/{image}"):
        assert client.get(path).status_code == 404


def test_a_mask_of_a_slice_is_exported_in_the_scans_own_space(client, image, scan):
    mask = np.zeros((28, 12), bool)
    mask[4:10, 3:8] = True
    runs = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False, append=False))
    rle = {"size": [28, 12], "counts": np.diff([0, *runs, mask.size]).tolist()}
    body = {"plane": "axial", "masks": [{"label": "lung", "slice": 3, "rle": rle}]}
    found = client.post(f"/images/{image['image_id']}/export", json=body)
    labels = np.asarray(nifti(found.content).dataobj)
    shown = pictures(read_scan(str(scan)), "axial")
    np.testing.assert_array_equal(shown.cut.mask_on_picture(shown.cut.reoriented(labels)[3] == 1), mask)
    assert labels.any(axis=(0, 1)).sum() == 1
    assert client.post(f"/images/{image['image_id']}/export?format=dicom_seg", json=body).status_code == 400
    body["masks"][0]["slice"] = 5
    assert client.post(f"/images/{image['image_id']}/export", json=body).status_code == 400


def test_a_folder_of_several_series_shows_each(client, tmp_path):
    for number, shape in enumerate([(12, 14, 4), (12, 14, 6)]):
        write_series(tmp_path / str(number), some_values(shape))
    files = [("files", ("x", path.read_bytes())) for path in tmp_path.glob("*/*")]
    image = client.post("/images", files=files).json()
    assert image["series"] == 2
    found = {client.get(f"/images/{image['image_id']}?index={index}").json()["shape"][2] for index in range(2)}
    assert found == {4, 6}
    assert client.get(f"/images/{image['image_id']}?index=2").status_code == 400


def test_a_fourth_axis_is_shown_entry_by_entry(client, tmp_path):
    values = some_values((12, 14, 4, 3))
    write_nifti(tmp_path / "scan.nii.gz", values)
    image = client.post("/images", content=(tmp_path / "scan.nii.gz").read_bytes()).json()
    assert image["series"] == 3 and image["shape"] == [12, 14, 4]
    path = f"/images/{image['image_id']}/slices/1?window=0,100&index="
    assert len({client.get(f"{path}{index}").content for index in range(3)}) == 3
    assert client.get(f"{path}3").status_code == 400

"""MONAI Label's requests as its extensions for Slicer and OHIF send them."""

import email
import gzip
import io
import json
import time

import httpx
import nibabel
import numpy as np
import pydicom
import pytest

from tests.volumes.scans import some_values, write_nifti, write_series


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=240) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    info = client.get("/info/").json()
    assert info["labels"] == {"lung": 1, "heart": 2}
    (name,) = info["models"]
    assert info["models"][name]["type"] == "segmentation"
    return name


@pytest.fixture(scope="module")
def session(client, tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    write_nifti(path, some_values((12, 14, 3)))
    found = client.put("/session/?uncompress=false&expiry=3600", files=[("files", (path.name, path.read_bytes()))])
    return found.json()["session_id"]


def labels(content: bytes) -> np.ndarray:
    return np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj)


def test_an_image_comes_back_as_a_label_map(client, model, session):
    found = client.post(f"/infer/{model}?image=&session_id={session}&output=image", data={"params": "{}"})
    assert found.status_code == 200 and labels(found.content).shape == (12, 14, 3)


def test_all_is_a_form_of_facts_and_the_label_map(client, model, session):
    found = client.post(f"/infer/{model}?image={session}&output=all", data={"params": '{"prompts": ["lung"]}'})
    head = f"Content-Type: {found.headers['Content-Type']}\n\n".encode()
    params, image = email.message_from_bytes(head + found.content).get_payload()
    assert json.loads(params.get_payload(decode=True))["label_names"] == {"lung": 1}
    assert labels(image.get_payload(decode=True)).shape == (12, 14, 3) and image.get_filename()


def test_a_file_is_answered_without_a_session_and_json_is_facts_alone(client, model, tmp_path):
    write_nifti(tmp_path / "scan.nii.gz", some_values((12, 14, 2)))
    files = {"file": ("scan.nii.gz", (tmp_path / "scan.nii.gz").read_bytes())}
    found = client.post(f"/infer/{model}?output=json", data={"params": "{}"}, files=files)
    assert found.json()["label_names"] == {"lung": 1, "heart": 2}


def test_a_series_comes_back_as_dicom_seg(client, model, tmp_path):
    write_series(tmp_path / "scan", some_values((12, 14, 3)))
    files = [("files", (path.name, path.read_bytes())) for path in (tmp_path / "scan").iterdir()]
    session = client.put("/session/", files=files).json()["session_id"]
    asked = f"/infer/{model}?image={session}&output=dicom_seg"
    found = client.post(asked, data={"params": '{"label_info": [{"name": "lung"}]}'})
    assert pydicom.dcmread(io.BytesIO(found.content)).Modality == "SEG"
    assert client.delete(f"/session/{session}").status_code == 200
    assert client.post(asked).status_code == 404


@pytest.mark.parametrize(
    ("path", "data", "status"),
    [
        ("/infer/other?image={}", {}, 404),
        ("/infer/{{}}?image=x", {}, 404),
        ("/infer/{{}}?image={}", {"params": "{{"}, 400),
        ("/infer/{{}}?image={}", {"params": "[]"}, 400),
        ("/infer/{{}}?image={}", {"params": '{{"prompts": 3}}'}, 400),
        ("/infer/{{}}?image={}&output=dicom_seg", {}, 400),
        ("/infer/{{}}?output=image", {}, 400),
        ("/infer/{{}}?image=1.2.840.1", {}, 404),
    ],
)
def test_what_cannot_be_answered_is_refused(client, model, session, path, data, status):
    data = {name: value.format() for name, value in data.items()}
    found = client.post(path.format(session).format(model), data=data)
    assert found.status_code == status and found.json()["error"]["message"]


def test_nothing_is_kept_of_what_was_answered(client, server, model, session):
    found = client.post(f"/infer/{model}?image={session}&output=json").json()
    for _ in range(1200):  # it is removed behind the answer
        if client.get(f"/jobs/{found['job_id']}").status_code == 404:
            return
        time.sleep(0.05)
    raise AssertionError("the job is still there")

"""Many pictures by one command: lists, folders, answers as they end, resumed by record."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from medplib_jax.data.errors import DataError
from medplib_jax.data.rle import decode_rle
from medplib_jax.decode import jobs
from medplib_jax.decode.jobs import answer_jobs, read_jobs
from medplib_jax.decode.predictor import Prediction
from medplib_jax.decode.scans import ScanOptions
from tests.volumes.scans import some_values, write_nifti

OPTIONS = ScanOptions(("liver",))


class Echo:
    """Answers with the question; the mask is the picture's upper half."""

    identity = ["echo"]

    def __init__(self):
        self.asked = []


def echo_answers(echo, asked, seed):
    for number, question in asked.items():
        echo.asked.append(question.record.images[0])
        mask = np.zeros(question.picture.shape[:2], bool)
        mask[: len(mask) // 2] = True
        text = question.record.turns[-1][1].removeprefix("<image>\n") + " <SEG>"
        yield number, Prediction(text, (mask,), (0.5,), question.picture, cut_off="long" in text)


@pytest.fixture(autouse=True)
def without_a_model(monkeypatch):
    monkeypatch.setattr(jobs, "answer_questions", echo_answers)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a/a.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((20, 16), np.uint8)).save(tmp_path / "in" / name)
    return tmp_path / "in"


def lines(out):
    found = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return sorted(found, key=lambda line: line["job"]["id"])


def test_answers_that_were_cut_off_are_marked_and_said(tmp_path, folder, caplog):
    listed = tmp_path / "jobs.jsonl"
    asked = [{"id": name, "image": "in/b.png", "question": f"A {name} answer?"} for name in ("long", "short")]
    listed.write_text("\n".join(map(json.dumps, asked)))
    assert answer_jobs(Echo(), read_jobs(str(listed)), str(tmp_path / "out"), OPTIONS) == 0
    assert [line.get("cut_off") for line in lines(tmp_path / "out")] == [True, None]
    assert "1 of 2 answers were cut off" in caplog.text


def test_a_folder_is_answered_once(tmp_path, folder):
    echo, found = Echo(), read_jobs(str(folder), "What is it?")
    assert [job.id for job in found] == ["a/a.png", "b.png"]
    assert answer_jobs(echo, found[:1], str(tmp_path / "out"), OPTIONS) == 0
    with open(tmp_path / "out/answers.jsonl", "a") as file:
        file.write('{"job": {"id"')  # cut off while it was written
    assert answer_jobs(echo, found, str(tmp_path / "out"), OPTIONS) == 0
    assert [path.rsplit("/", 1)[1] for path in echo.asked] == ["a.png", "b.png"]
    first, second = lines(tmp_path / "out")
    assert first["answer"] == "What is it? <SEG>" and first["job"]["id"] == "a/a.png" and second["job"]["id"] == "b.png"
    assert decode_rle(first["masks"][0]).sum() == 160
    assert np.asarray(Image.open(tmp_path / "out/a_a.png/mask_0.png")).sum() == 160 * 255
    (feature,) = json.loads((tmp_path / "out/a_a.png/masks.geojson").read_text())["features"]
    assert feature["geometry"]["coordinates"] == [[[[0, 0], [16, 0], [16, 10], [0, 10], [0, 0]]]]
    coco = json.loads((tmp_path / "out/coco.json").read_text())
    assert [image["file_name"].rsplit("/", 1)[1] for image in coco["images"]] == ["a.png", "b.png"]
    assert coco["annotations"][1] == {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "segmentation": second["masks"][0],
        "area": 160,
        "bbox": [0, 0, 16, 10],
        "score": 0.5,
        "iscrowd": 0,
    }
    answer_jobs(echo, read_jobs(str(folder), "Where is it?"), str(tmp_path / "out"), OPTIONS)
    assert len(echo.asked) == 4  # another question is another job


def test_other_options_and_other_files_are_asked_again(tmp_path, folder):
    echo, out, found = Echo(), tmp_path / "out", read_jobs(str(folder), "What is it?")
    answer_jobs(echo, found, str(out), OPTIONS)
    answer_jobs(echo, found, str(out), dataclasses.replace(OPTIONS, seed=1))
    assert len(echo.asked) == 4
    Image.fromarray(np.zeros((40, 16), np.uint8)).save(folder / "b.png")
    answer_jobs(echo, found, str(out), dataclasses.replace(OPTIONS, seed=1))
    assert [path.rsplit("/", 1)[1] for path in echo.asked[4:]] == ["b.png"]
    coco = json.loads((out / "coco.json").read_text())
    assert [image["height"] for image in coco["images"]] == [20, 40] and len(coco["annotations"]) == 2


def test_nothing_stays_of_an_earlier_answer(tmp_path, folder):
    (tmp_path / "out/b.png").mkdir(parents=True)
    for name in ("mask_0.png", "mask_7.png", "boxes.json", "notes.txt"):
        (tmp_path / "out/b.png" / name).write_text("old")
    answer_jobs(Echo(), read_jobs(str(folder), "What is it?"), str(tmp_path / "out"), OPTIONS)
    names = sorted(path.name for path in (tmp_path / "out/b.png").iterdir())
    assert names == ["mask_0.png", "masks.geojson", "notes.txt"]


def test_a_list_has_its_own_questions_and_what_fails_is_told_and_tried_again(tmp_path, folder, monkeypatch):
    write_nifti(folder / "scan.nii.gz", some_values())
    entries = [
        {"image": "b.png", "question": "Q", "region": "point:1,2"},
        {"image": "lost.png"},
        {"image": "scan.nii.gz"},
    ]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    scans = []
    monkeypatch.setattr(jobs, "answer_scan", lambda *given: scans.append(given) or ["masks.nii.gz"])
    found = read_jobs(str(folder / "jobs.jsonl"), structures=("spleen",))
    assert answer_jobs(Echo(), found, str(tmp_path / "out"), OPTIONS) == 1
    first, second, third = lines(tmp_path / "out")
    assert (
        first["answer"] == "Q <region>point:1,2</region> <SEG>"
        and "lost.png" in second["error"]
        and third["files"] == ["masks.nii.gz"]
    )
    assert scans[0][3].structures == ("spleen",) and scans[0][2].endswith("out/00002")
    assert answer_jobs(Echo(), found, str(tmp_path / "out"), OPTIONS) == 1 and len(lines(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "jobs cannot be read"),
        ("{}", "expected a JSON list"),
        ("[]", "no jobs"),
        ('[{"image": 3}]', "record 0: not a job"),
        ('[{"image": "x", "quest": "y"}]', "not a job"),
        ('[{"image": "x", "structures": "liver"}]', "not a job"),
        ('[{"image": "x", "question": 3}]', "not a job"),
        ('[{"image": "x", "question": "y", "region": null}]', "not a job"),
        ('[{"image": "x"}]', "job without a question"),
        (
            '[{"image": "x", "question": "y", "id": "a b"}, {"image": "x", "question": "y", "id": "a/b"}]',
            "share their files",
        ),
    ],
)
def test_other_lists_are_refused(tmp_path, content, message):
    (tmp_path / "jobs.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_jobs(str(tmp_path / "jobs.json"))

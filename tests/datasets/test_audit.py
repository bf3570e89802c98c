"""Every check finds what is planted and nothing else; the report's fields and page."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from medplib_jax.data.errors import DataError
from medplib_jax.data.splits import is_held_out
from medplib_jax.datasets.assemble.dataset import assemble
from medplib_jax.datasets.audit import __main__ as program
from medplib_jax.datasets.audit.collect import audit
from medplib_jax.datasets.processes import HERE
from tests.datasets import collection
from tests.datasets.collection import CT, SIZE, grounding, record, rectangle, region, vqa, write
from tests.paths import GOLDEN

NAME = CT.format(0, 0)
LIVER, KIDNEY = f"masks/{NAME}--liver.png", f"masks/{NAME}--left_kidney.png"


@pytest.fixture
def root(tmp_path):
    """Six pictures of as many patients; masks by name, the liver upper left and the kidney upper right."""
    root = collection.make_images(tmp_path, range(6)) / "SAMed2Dv1"
    (root / "SAMed2D_v1_class_mapping_id.json").unlink()
    for case in range(6):
        name = CT.format(case, case)
        Image.fromarray(rectangle(2, 2, 9, 9)).save(root / "masks" / f"{name}--liver.png")
        Image.fromarray(rectangle(5, 20, 12, 30)).save(root / "masks" / f"{name}--left_kidney.png")
        Image.fromarray(rectangle(5, 2, 12, 12)).save(root / "masks" / f"{name}--right_kidney.png")
    Image.new("L", SIZE[::-1], 255).save(root / "masks" / f"{NAME}--body.png")
    Image.new("L", SIZE[::-1]).save(root / "masks" / f"{NAME}--nothing.png")
    Image.fromarray(rectangle(1, 1, 3, 3, (8, 8))).save(root / "masks" / f"{NAME}--small.png")
    return root


GOOD = [vqa(0), grounding(0, LIVER), region(0, KIDNEY), vqa(1), vqa(2)]


def findings(root, *records, **files):
    write(root, "train.json", [*GOOD, *records])
    for name, content in files.items():
        write(root, f"{name}.json", content)
    report, _ = audit(str(root))
    return [(one["kind"], one["source"], one["record"]) for one in report["findings"]]


def test_a_clean_dataset_has_no_findings(root):
    assert (
        findings(
            root,
            region(1, "box:1,1,9,9"),
            record(1, "<image>\nSegment the liver on the left of the image.", f"<SEG><mask>{LIVER}</mask>"),
        )
        == []
    )


def segment(question, mask, answer="Here: <SEG>."):
    return record(0, f"<image>\n{question}", f"{answer}<mask>{mask}</mask>")


PLANTED = [
    (record(0, "<image>\nWhat?", ""), "unusable: empty answer"),
    (vqa(9), "unusable: file is missing"),
    (segment("Segment the liver.", f"masks/{NAME}--nothing.png"), "unusable: mask is empty"),
    (segment("Segment the liver.", f"masks/{NAME}--small.png"), "unusable: mask and picture differ in size"),
    (segment("Segment the liver.", "../../../etc/passwd"), "unusable: path leaves the data folder"),
    (segment("Segment the body.", f"masks/{NAME}--body.png"), "mask covers the whole picture"),
    (segment("Segment the liver at the right side of the image.", LIVER), "mask and text are at different places"),
    (
        segment("Segment the organ.", KIDNEY, "It lies in the lower-right of this CT image: <SEG>."),
        "mask and text are at different places",
    ),
    (segment("Segment the kidney.", LIVER), "mask of another class than the text names"),
    (record(0, "<image>\nIs this a CT  image", "No", answer_type="closed"), "question asked twice"),
    (
        record(0, "<image>\nWhat does the cyst of the kidney show?", "The cyst.", answer_type="open"),
        "answer stands in the question",
    ),
]


@pytest.mark.parametrize(("raw", "kind"), PLANTED)
def test_every_check_names_the_record(root, raw, kind):
    assert findings(root, raw) == [(kind, "train.json", len(GOOD))]


def test_other_rounds_may_name_other_classes(root):
    more = [{"from": "human", "value": f"Is <region>{LIVER}</region> normal?"}, {"from": "gpt", "value": "Yes."}]
    several = region(0, KIDNEY)
    several["conversations"] += more
    assert findings(root, several) == []


def test_a_region_may_be_denied_to_be_something_else(root):
    asked = region(0, LIVER)
    asked["conversations"] = record(0, f"<image>\nDoes <region>{LIVER}</region> show the kidney?", "No.")[
        "conversations"
    ]
    assert findings(root, asked) == []


def test_an_answer_may_be_one_of_the_choices(root):
    assert findings(root, record(0, "<image>\nIs it a cyst or a stone?", "A cyst", answer_type="open")) == []


def test_a_kidney_on_the_unusual_side_is_found(root):
    usual = [grounding(case, f"masks/{CT.format(case, case)}--left_kidney.png") for case in range(1, 6)]
    for one in usual:
        one["conversations"] = record(0, "<image>\nSegment the left kidney.", one["conversations"][1]["value"])[
            "conversations"
        ]
    assert findings(root, *usual) == []
    Image.fromarray(rectangle(5, 2, 12, 12)).save(root / "masks" / f"{CT.format(5, 5)}--left_kidney.png")
    assert findings(root, *usual) == [("left and right swapped", "train.json", len(GOOD) + 4)]


def test_left_and_right_on_each_other_are_found(root):
    Image.fromarray(rectangle(5, 21, 12, 30)).save(root / "masks" / f"{NAME}--right_kidney.png")
    raw = segment("Segment the right kidney.", f"masks/{NAME}--right_kidney.png")
    assert findings(root, raw) == [("left and right at one place", "train.json", len(GOOD))]


def test_a_mask_with_two_names_is_found(root):
    Image.fromarray(rectangle(5, 20, 12, 30)).save(root / "masks" / f"{NAME}--cyst.png")
    found = findings(root, segment("Segment the cyst.", f"masks/{NAME}--cyst.png"))
    assert found == [("one mask has two names", "train.json", 2), ("one mask has two names", "train.json", len(GOOD))]


def test_held_out_pictures_and_patients_are_found(root):
    other_slice = np.random.default_rng(9).integers(0, 255, SIZE, np.uint8)
    name = CT.format(1, 7)
    Image.fromarray(other_slice).save(root / "images" / f"{name}.png")
    same_patient = vqa(0) | {"image": f"images/{name}.png"}
    found = findings(root, test=[vqa(0), same_patient, vqa(4)])
    assert found == [
        ("held-out picture is in the training data", "test.json", 0),
        ("held-out patient is in the training data", "test.json", 0),
        ("held-out patient is in the training data", "test.json", 1),
    ]


@pytest.mark.parametrize(
    ("name", "held_out"),
    [
        ("train/MeCoVQA-Complex.json", False),
        ("test/a.json", True),
        ("retrieval_latest.json", False),
        ("MeCoVQA_Grounding_test.json", True),
        ("zeroshot4grounding/mr.json", True),
        ("mecovqa/region/1.0.0#train", False),
        ("mecovqa/region/1.0.0#test", True),
        ("mecovqa/zeroshot/1.0.0#mr", True),
    ],
)
def test_splits_are_told_by_name(name, held_out):
    assert is_held_out(name) == held_out


def test_the_report_counts(root):
    write(root, "train.json", GOOD)
    report, _ = audit(str(root), tokenizer=str(GOLDEN / "tokenizer"))
    assert (report["records"], report["usable"], report["pictures"], report["suspicious"]) == (5, 5, 3, 0)
    assert report["by_modality"] == {"ct": 5} and report["by_split"] == {"training": 5}
    assert report["by_task"] == {"closed": 3, "grounding": 1, "region": 1}
    assert report["by_answer_type"] == {"closed": 3, "open": 1, "not stated": 1}
    assert report["lengths"]["unit"] == "tokens" and report["lengths"]["max"] >= report["lengths"]["median"] > 5
    assert report["mask_areas"]["min"] == pytest.approx(49 / 768) and report["mask_areas"]["max"] == pytest.approx(
        70 / 768
    )
    assert sum(report["mask_areas"]["counts"]) == 2


def test_an_assembled_dataset_is_audited_alike(tmp_path):
    annotations, pictures = collection.make_annotations(tmp_path / "MeCoVQA"), collection.make_images(tmp_path)
    assemble(str(annotations), str(pictures), str(tmp_path / "out"), HERE)
    report, _ = audit(str(tmp_path / "out"))
    assert (report["records"], report["usable"]) == (9, 9)
    assert report["by_split"] == {"training": 7, "held out": 2}
    assert report["finding_counts"] == {"question asked twice": 1}  # case 3 is in the test and in the zero-shot file


def test_command_writes_both_reports_with_worker_processes(root, monkeypatch, capsys):
    write(root, "train.json", [*GOOD, *(raw for raw, _ in PLANTED), segment("<script>alert(1)</script>", LIVER)])
    files = [root / "out" / name for name in ("report.json", "report.html")]
    monkeypatch.setattr(
        sys, "argv", ["audit", str(root), "--json", str(files[0]), "--html", str(files[1]), "--workers", "1"]
    )
    assert program.main() == 0
    report = json.loads(files[0].read_text())
    assert report["suspicious"] == len(PLANTED)
    page = files[1].read_text()
    assert "<script>" not in page and page.count("data:image/jpeg") > 8
    assert all(f"{kind[0].upper()}{kind[1:]}".replace("<", "&lt;") in page for _, kind in PLANTED)
    assert f"{report['records']} records" in capsys.readouterr().out


def test_a_folder_without_a_dataset_is_refused(tmp_path):
    with pytest.raises(DataError, match="no dataset"):
        audit(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "more", "pattern"),
    [
        (("images/p1/a.png", "images/p1/b.png"), ({}, {}), ""),
        (("images/a.png", "images/b.png"), ({"patient": "x"}, {"patient": "x"}), ""),
        (("images/17_a.png", "images/17_b.png"), ({}, {}), r"^\d+"),
        (("images/ct_00--A--case_1_t1--x_1.png", "images/ct_00--A--case_1_flair--x_9.png"), ({}, {}), ""),
        (("images/ct_00--s--p1--one--z_0.png", "images/ct_00--s--p1--two--z_0.png"), ({}, {}), ""),
    ],
)
def test_a_patient_in_two_splits_is_found_in_records_that_are_split_already(tmp_path, names, more, pattern):
    for number, (split, name, extra) in enumerate(zip(("train", "test"), names, more, strict=True)):
        raw = {"image": name, "conversations": vqa(0)["conversations"], **extra}
        write(tmp_path, f"{split}.json", [raw])
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), number).save(tmp_path / name)
    report, _ = audit(str(tmp_path), patient=pattern)
    assert report["finding_counts"] == {"held-out patient is in the training data": 1}


def test_every_json_file_is_read_or_named(root):
    write(root, "train.json", GOOD)
    (root / "more.JSONL").write_text(json.dumps(GOOD[0]))
    (root / "notes.json").write_text("{}")
    (root / "grit").mkdir()
    write(root, "grit/VG.json", [])
    report, _ = audit(str(root))
    assert report["not_read"] == ["grit/VG.json", "notes.json"]
    assert report["by_source"].keys() == {"train.json", "more.JSONL"}

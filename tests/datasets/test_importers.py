"""Every importer on a small copy of its dataset's published layout, and training data mixed from two of them."""

import csv
import io
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from medplib_jax.data.errors import DataError
from medplib_jax.data.plan import BatchPlan
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.datasets.audit.collect import audit
from medplib_jax.datasets.files import files_below
from medplib_jax.datasets.import_dataset import import_dataset
from medplib_jax.datasets.importers import READERS
from medplib_jax.datasets.write_qa import QaOptions, TemplateWriter, write_qa
from tests.datasets.qa.folders import make_pairs


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 32), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def put(root: pathlib.Path, files: dict) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )


def vqa_rad(root, image="synpic1.jpg"):
    row = {
        "image_name": image,
        "question": "Is there a mass?",
        "answer": "No",
        "answer_type": "CLOSED ",
        "phrase_type": "freeform",
    }
    rows = [row, {**row, "answer": 3, "question": "How many?", "answer_type": "OPEN", "phrase_type": "test_freeform"}]
    put(root, {"VQA_RAD Dataset Public.json": rows, "VQA_RAD Image Folder/synpic1.jpg": picture(0)})


def slake(root, image="xmlab1/source.jpg"):
    row = {
        "img_name": image,
        "question": "What is it?",
        "answer": "Liver",
        "q_lang": "en",
        "answer_type": "OPEN",
        "modality": "CT",
    }
    chinese = {**row, "question": "\u8fd9\u662f\u4ec0\u4e48", "answer": "\u809d", "q_lang": "zh"}
    put(
        root,
        {
            "train.json": [row, chinese],
            "validate.json": [row],
            "test.json": [row],
            "imgs/xmlab1/source.jpg": picture(0),
        },
    )


def path_vqa(root, image=None):
    (root / "data").mkdir(parents=True)
    rows = [{"image": {"bytes": picture(0), "path": None}, "question": "Is it bone?", "answer": "yes"}]
    for split in ("train", "test"):
        bad = (
            []
            if image is None
            else [{"image": {"bytes": b"no picture", "path": None}, "question": "What?", "answer": "bone"}]
        )
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows + bad), root / "data" / f"{split}-00000-of-00001-ab.parquet"
        )


def vqa_rad_hub(root):
    (root / "data").mkdir(parents=True)
    rows = [{"image": {"bytes": picture(0), "path": None}, "question": "Is there a mass?", "answer": "no"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "data/train-00000-of-00001-ab.parquet")


def pmc_vqa_2(root, image="PMC1_F1.jpg"):
    table = io.StringIO()
    heading = [
        "index",
        "Figure_path",
        "Caption",
        "Question",
        "Choice A",
        "Choice B",
        "Choice C",
        "Choice D",
        "Answer",
        "split",
    ]
    csv.writer(table).writerows(
        [heading, ["0", image, "A chest.", "Which organ?", " A:lung ", " B:heart", " C:liver", " D:bone", "B", "train"]]
    )
    put(root, {"train_2.csv": table.getvalue(), "test_2.csv": table.getvalue(), "figures/PMC1_F1.jpg": picture(0)})


def pmc_vqa(root, image="PMC1_F1.jpg"):
    table = io.StringIO()
    heading = ["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label"]
    rows = [heading, [image, "Which organ?", "heart, left", " A:lung ", " B:heart, left", "C:liver", "D:bone", "B"]]
    csv.writer(table).writerows(rows)
    put(root, {"train.csv": table.getvalue(), "test_clean.csv": table.getvalue(), "images/PMC1_F1.jpg": picture(0)})


def vqa_med(root, image="synpic2"):
    training = f"{image}|what plane is this?|axial\n{image}|is it normal?|yes\n"
    test = "VQAMed2019_Test_Questions_w_Ref_Answers.txt"
    put(root, {"Training/All_QA_Pairs_train.txt": training, "Training/Train_images/synpic2.jpg": picture(0)})
    put(
        root,
        {
            f"Test/{test}": f"{image}|plane|which plane?|(slightly) axial#transverse\n",
            "Test/VQAMed2019_Test_Images/synpic2.jpg": picture(1),
        },
    )
    name = "VQAMed2020-Task1-VQAnswering-Test"
    put(
        root,
        {
            f"2020/{name}-Questions.txt": f"{image}|what is it?\n",
            f"2020/{name}-ReferenceAnswers.txt": f"{image}|hernia (internal)|a hernia\n",
        },
    )
    put(root, {"2020/Task1-2020-VQAnswering-Test-Images/synpic2.jpg": picture(2)})
    put(
        root,
        {
            "2021/VQA-Med-2021-VQAnswering-Task1-New-ValidationSet.txt": f"{image}|what is it?|cyst\n",
            "2021/New-Images/synpic2.jpg": picture(3),
        },
    )


def omnimedvqa(root, image="Images/A/1.jpg"):
    row = {
        "question": "What is it?",
        "gt_answer": "MR",
        "image_path": image,
        "option_A": "CT",
        "option_B": "MR",
        "modality_type": "MR",
    }
    renamed = {**{key: value for key, value in row.items() if key != "modality_type"}, "modality": "MR"}
    put(root, {"QA_information/Open-access/A.json": [row, renamed], "Images/A/1.jpg": picture(0)})


def llava_med(root, image="1_F1.jpg"):
    turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": "A chest."}]
    row = {"id": "1", "image": image, "domain": {"chest_xray": True, "mri": False}, "conversatons": turns}
    put(root, {"llava_med_alignment_500k.json": [row], "images/1_F1.jpg": picture(0)})


def med_grit(root, image="images/ct_00--A--v--x_1.jpg"):
    question = f"Picture 1: <img>{image}</img>\nWhere is <ref>the liver</ref>?"
    row = {"id": "1", "conversations": [[question, "<ref>the liver</ref><box>(1,2),(300,400)</box>"]]}
    put(root, {"train/VG.json": [row], "test/VG.json": [row], "images/ct_00--A--v--x_1.jpg": picture(0)})


CASES = {  # (layout, records of each split)
    "vqa_rad": (vqa_rad, {"train": 1, "test": 1}),
    "slake": (slake, {"train": 2, "validation": 1, "test": 1}),
    "slake_en": (slake, {"train": 1, "validation": 1, "test": 1}),
    "path_vqa": (path_vqa, {"train": 1, "test": 1}),
    "pmc_vqa": (pmc_vqa, {"train": 1, "test": 1}),
    "pmc_vqa_2": (pmc_vqa_2, {"train": 1, "test": 1}),
    "vqa_med": (vqa_med, {"train": 2, "validation": 1, "test": 2}),
    "omnimedvqa": (omnimedvqa, {"test": 2}),
    "llava_med_alignment": (llava_med, {"train": 1}),
    "med_grit": (med_grit, {"train": 1, "test": 1}),
}


def imported(tmp_path, name):
    CASES[name][0](tmp_path / "source")
    return import_dataset(name, str(tmp_path / "source"), str(tmp_path / "out"))


def test_every_reader_is_tested():
    assert set(CASES) == set(READERS)


@pytest.mark.parametrize("name", sorted(CASES))
def test_layouts_give_usable_records(tmp_path, name):
    manifest = imported(tmp_path, name)
    assert manifest["records"] == CASES[name][1] and manifest["skipped"] == 0
    for split in manifest["records"]:
        for record in MecovqaSource(str(tmp_path / "out" / f"{name}_{split}.json")):
            assert pathlib.Path(record.path(record.images[0])).is_file() and record.turns[0][1].startswith("<image>\n")


@pytest.mark.parametrize("name", sorted(set(CASES) - {"path_vqa"}))
@pytest.mark.parametrize("image", ["../../../../../../etc/passwd", "absent.jpg"])
def test_missing_and_escaping_images_are_refused(tmp_path, name, image):
    CASES[name][0](tmp_path / "source", image)
    with pytest.raises(DataError, match="missing|leaves"):
        import_dataset(name, str(tmp_path / "source"), str(tmp_path / "out"))


def test_bad_records_are_named_and_the_rest_is_used(tmp_path):
    path_vqa(tmp_path / "source", "bad")
    manifest = import_dataset("path_vqa", str(tmp_path / "source"), str(tmp_path / "out"))
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert manifest["records"] == {"train": 1, "test": 1} and [line["record"] for line in skipped] == [1, 1]


@pytest.mark.parametrize("name", sorted(CASES))
def test_another_folder_is_not_a_dataset(tmp_path, name):
    with pytest.raises(DataError):
        import_dataset(name, str(tmp_path), str(tmp_path / "out"))


def test_answers_and_modalities(tmp_path):
    imported(tmp_path, "pmc_vqa")
    (record,) = json.loads((tmp_path / "out/pmc_vqa_train.json").read_text())
    assert record["conversations"][1]["value"] == "heart, left" and record["candidates"] == [
        "lung",
        "heart, left",
        "liver",
        "bone",
    ]
    assert record["answer_type"] == "closed"


def test_the_answers_of_vqa_med_are_the_first_without_optional_parts(tmp_path):
    imported(tmp_path, "vqa_med")
    answers = [
        record["conversations"][1]["value"] for record in json.loads((tmp_path / "out/vqa_med_test.json").read_text())
    ]
    assert sorted(answers) == ["axial", "hernia (internal)"]


def test_version_2_of_pmc_vqa_has_its_letter_in_another_column(tmp_path):
    imported(tmp_path, "pmc_vqa_2")
    (record,) = json.loads((tmp_path / "out/pmc_vqa_2_train.json").read_text())
    assert record["conversations"][1]["value"] == "heart" and record["candidates"] == ["lung", "heart", "liver", "bone"]


def test_llava_med_may_lie_as_it_is_downloaded(tmp_path):
    llava_med(tmp_path / "source")
    (tmp_path / "source/alignment").mkdir()
    (tmp_path / "source/llava_med_alignment_500k.json").rename(
        tmp_path / "source/alignment/llava_med_alignment_500k.json"
    )
    assert import_dataset("llava_med_alignment", str(tmp_path / "source"), str(tmp_path / "out"))["records"] == {
        "train": 1
    }


def test_vqa_rad_comes_from_the_hub_too(tmp_path):
    vqa_rad_hub(tmp_path / "source")
    assert import_dataset("vqa_rad", str(tmp_path / "source"), str(tmp_path / "out"))["records"] == {"train": 1}
    (record,) = json.loads((tmp_path / "out/vqa_rad_train.json").read_text())
    assert record["answer_type"] == "closed"


@pytest.mark.parametrize("named", ["/home/authors/SAMed2D/ct_00--A--v--x_1.png", "elsewhere.png"])
def test_pictures_of_med_grit_are_found_by_name_or_id(tmp_path, named):
    row = {"id": "ct_00--A--v--x_1", "conversations": [[f"Picture 1: <img>{named}</img>\nDescribe it.", "A liver."]]}
    put(tmp_path / "source", {"train.json": [row], "images/ct_00--A--v--x_1.png": picture(0)})
    assert import_dataset("med_grit", str(tmp_path / "source"), str(tmp_path / "out"))["skipped"] == 0


def test_what_write_qa_writes_can_be_imported(tmp_path):
    pairs = make_pairs(tmp_path / "pairs", 2)
    write_qa(pairs, str(tmp_path / "qa"), TemplateWriter(0), QaOptions(test_share=0.0))
    manifest = import_dataset("med_grit", str(tmp_path / "qa"), str(tmp_path / "out"))
    assert manifest["skipped"] == 0 and manifest["records"] == {"train": 2 * (3 * 3 + 1)}


def test_the_audit_reads_an_imported_dataset(tmp_path):
    imported(tmp_path, "slake_en")
    report, _ = audit(str(tmp_path / "out"))
    assert report["records"] == report["usable"] == 3 and report["by_modality"] == {"ct": 3}


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_table_is_read_or_named(tmp_path, name):
    CASES[name][0](tmp_path / "source")
    lost = ("other.json", "more/other.jsonl", "notes.csv", "data/other.parquet", "readme.txt")
    put(tmp_path / "source", dict.fromkeys(lost, b""))
    tables = {path for path in files_below(str(tmp_path / "source")) if pathlib.Path(path).suffix not in (".jpg", "")}
    manifest = import_dataset(name, str(tmp_path / "source"), str(tmp_path / "out"))
    assert set(manifest["files_not_read"]) == set(lost) and tables > set(lost)


def test_training_mixes_imported_datasets_by_weights(tmp_path):
    sources = []
    for name in ("vqa_med", "slake_en"):
        imported(tmp_path / name, name)
        sources.append(MecovqaSource(str(tmp_path / name / "out" / f"{name}_train.json")))
    plan = BatchPlan([np.full(len(source), 5) for source in sources], (10,), 8, 0, (1.0, 2.0))  # 2 records and 1
    rows = np.concatenate([plan.batch(step)[1] for step in range(20)])
    first = np.isin(rows[rows >= 0], np.arange(len(sources[0])))
    assert abs(first.mean() - 1 / 3) < 0.05

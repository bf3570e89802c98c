"""In-context records made of a folder of pairs: other patients' examples, one split each, held-out structures."""

import json
import re

import pytest

from medplib_jax.config.model import IclConfig
from medplib_jax.data import icl
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.datasets.audit.collect import audit
from medplib_jax.datasets.icl import IclOptions, make_icl
from tests.datasets.icl_pairs import STRUCTURES, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


OPTIONS = IclOptions(seed=3, repeats=2, test_share=0.4, held_out=("spleen",))


@pytest.fixture(scope="module")
def made(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("icl") / "out"
    return out, make_icl(str(pairs), str(out), OPTIONS)


def patient(image):
    return re.search(r"--(p\d+)--", image)[1]


def records(out, split):
    return json.loads((out / split / "icl.json").read_text())


def test_examples_show_the_same_structure_in_other_patients_of_the_same_split(made):
    out, manifest = made
    seen = {split: set() for split in ("train", "test")}
    for split, patients in seen.items():
        for record in records(out, split):
            examples = record["icl_examples"]
            label = record["structure"].replace(" ", "_")
            assert 1 <= len(examples) <= 3 and all(one["mask"].endswith(f"--{label}.png") for one in examples)
            assert patient(record["image"]) not in {patient(one["image"]) for one in examples}
            assert len({one["image"] for one in examples}) == len(examples)
            patients |= {patient(record["image"]), *(patient(one["image"]) for one in examples)}
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]
    assert manifest["records"] == {f"{split}/icl.json": len(records(out, split)) for split in seen}


def test_a_held_out_structure_is_never_asked_for_in_training(made):
    out, _ = made
    assert {record["structure"] for record in records(out, "train")} == {"liver", "left kidney"}
    assert {record["structure"] for record in records(out, "test")} == set(STRUCTURES)
    shots = {len(record["icl_examples"]) for record in records(out, "train")}
    assert shots == {1, 2, 3} and {len(record["icl_examples"]) for record in records(out, "test")} == {3}


def test_a_structure_of_one_patient_is_named(made):
    out, manifest = made
    assert manifest["reasons"] == {"no example": 2}
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert all("pancreas of another patient" in one["expected"] for one in skipped)


def test_the_same_arguments_make_the_same_files(made, pairs, tmp_path):
    out, _ = made
    make_icl(str(pairs), str(tmp_path / "again"), OPTIONS)
    for split in ("train", "test"):
        assert (tmp_path / "again" / split / "icl.json").read_bytes() == (out / split / "icl.json").read_bytes()


def test_the_records_are_read_and_pass_the_audit(made):
    out, _ = made
    record = MecovqaSource(str(out / "test" / "icl.json"), str(out))[0]
    assert record.structure in STRUCTURES and len(icl.views(record, IclConfig())) == 4
    report, facts = audit(str(out))
    assert report["finding_counts"] == {} and report["usable"] == report["records"] == len(facts) > 0


def test_the_audit_names_examples_of_the_own_picture_or_patient(made, tmp_path):
    out, _ = made
    train = records(out, "train")
    by_patient = {patient(record["image"]): record for record in reversed(train)}
    one, other = by_patient[min(by_patient)], by_patient[max(by_patient)]
    sibling = next(r for r in train if patient(r["image"]) == min(by_patient) and r["image"] != one["image"])
    spleen = re.sub(r"--\w+\.png$", "--spleen.png", one["target_mask"])
    spoilt = [
        one | {"icl_examples": [{"image": one["image"], "mask": spleen}]},
        one | {"icl_examples": [{"image": sibling["image"], "mask": sibling["target_mask"]}]},
        sibling,
        other,
    ]
    for folder in ("images", "masks"):
        (tmp_path / folder).symlink_to(out / folder)
    (tmp_path / "icl.json").write_text(json.dumps(spoilt))
    found = {(f["record"], f["kind"]) for f in audit(str(tmp_path))[0]["findings"]}
    assert found == {(0, "example of the own picture or patient"), (1, "example of the own picture or patient")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats: expected at least 1, found 0"),
        ({"test_share": 2.0}, "test share: expected a number in .0, 1., found 2.0"),
        ({"held_out": ("lung",)}, "held-out structure has no mask; expected left kidney, liver, .*found lung"),
    ],
)
def test_options_that_cannot_be_met_are_named(pairs, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_icl(str(pairs), str(tmp_path / "out"), IclOptions(**options))

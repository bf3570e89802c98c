"""The commands of datasets/README.md as written, in a fresh folder, over 20 records in each published layout."""

import importlib
import itertools
import json
import os
import pathlib
import re
import shlex
import sys

import numpy as np
import pytest

from medplib_jax.data.records import parse_record
from medplib_jax.data.sources import open_source
from tests.datasets import collection, test_importers
from tests.datasets.test_slices import write_nifti
from tests.paths import ROOT

README = ROOT / "medplib_jax/datasets/README.md"
RECORDS = 20
ZERO_SHOT = ("endoscopy", "fundus", "mr", "pet", "ultrasound", "xray")
SPLITS = ("train", "test")
GRIT_PARTS = ("VG", "ROC", "RC", "MIA")
# of commands that need a server, a run's config, a checkpoint (`test_index.py` has a small one), or Beam, which wants
# other versions of packages than the pinned ones (`test_beam.py`)
NOT_HERE = ("MODEL", "CONFIG", "runs/7b/stage5", "--beam_runner")
LAYOUTS = {
    "LLaVA-Med": test_importers.llava_med,
    "VQA-RAD": test_importers.vqa_rad,
    "Slake1.0": test_importers.slake,
    "path-vqa": test_importers.path_vqa,
    "PMC-VQA": test_importers.pmc_vqa,
    "VQA-Med": test_importers.vqa_med,
    "OmniMedVQA": test_importers.omnimedvqa,
    **{f"Med-GRIT/{part}": test_importers.med_grit for part in GRIT_PARTS},
}
# what the configs of the stages and of the sweep read
MADE = (
    *(
        f"data/assembled/mecovqa/{part}/1.0.0#{split}"
        for part in ("complex", "region", "grounding")
        for split in SPLITS
    ),
    *(f"data/assembled/mecovqa/zeroshot/1.0.0#{name}" for name in ZERO_SHOT),
    "data/llava_med_alignment/llava_med_alignment_train.json",
    *(
        f"data/{name}/{name}_test.json"
        for name in ("vqa_rad", "slake_en", "path_vqa", "pmc_vqa", "vqa_med", "omnimedvqa")
    ),
    *(f"data/med_grit_{part}/med_grit_test.json" for part in GRIT_PARTS),
)


def commands() -> list[list[str]]:
    """Program and arguments of each command in a block of the README, comments left out."""
    blocks = re.findall(r"^ *```\n(.*?)^ *```", README.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    split = (shlex.split(line, comments=True) for line in lines if "python -m medplib_jax.datasets." in line)
    return [
        words[words.index("-m") + 1 :]
        for words in split
        if not set(NOT_HERE) & set(" ".join(words).replace("=", " ").split())
    ]


def run(monkeypatch, program, *arguments):
    name = program if importlib.util.find_spec(program).submodule_search_locations is None else f"{program}.__main__"
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(os, "cpu_count", lambda: 0)  # no worker processes, which take seconds to start
    assert importlib.import_module(name).main() == 0, (program, arguments)


def make_mecovqa(root: pathlib.Path, kinds=("Complex", "Region", "Grounding")) -> None:
    """The published files of these kinds, with 20 records each."""
    cases = range(RECORDS)
    collection.make_images(root / "SA-Med2D-20M", cases)
    files = {
        "Complex": (collection.vqa, "train/MeCoVQA-Complex", "test/MeCoVQA_Complex_VQA_test"),
        "Region": (collection.region, "train/MeCoVQA-Complex_local+Region", "test/MeCoVQA_Region_VQA_test"),
        "Grounding": (
            *(collection.grounding, "train/MeCoVQA-Grounding", "test/MeCoVQA_Grounding_test"),
            *(f"zeroshot4grounding/{name}" for name in ZERO_SHOT),
        ),
    }
    for make, *names in map(files.get, kinds):
        for name in names:
            collection.write(root / "MeCoVQA", f"{name}.json", [make(case) for case in cases])


def make_scans(root: pathlib.Path) -> None:
    for number in range(RECORDS):
        values = np.random.default_rng(number).integers(-200, 300, (20, 24, 2)).astype(np.int16)
        write_nifti(root / f"images/case{number}.nii.gz", values)
        write_nifti(
            root / f"masks/case{number}/liver.nii.gz", (np.arange(20)[:, None, None] < 9) * np.ones_like(values)
        )


def repeated(path: pathlib.Path) -> None:
    """The annotation file with its records again and again, up to 20."""
    rows = json.loads(path.read_text())
    if isinstance(rows, list):
        path.write_text(json.dumps(list(itertools.islice(itertools.cycle(rows), RECORDS))))


def test_the_commands_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_mecovqa(tmp_path)
    for folder, make in LAYOUTS.items():
        make(tmp_path / folder)
        for path in (tmp_path / folder).rglob("*.json"):
            repeated(path)
    make_scans(tmp_path / "scans")
    (tmp_path / "SAMed2Dv1").symlink_to("SA-Med2D-20M/SAMed2Dv1")
    done = commands()
    assert len(done) >= 13
    for words in done:
        run(monkeypatch, *words)
    for part in GRIT_PARTS[1:]:
        arguments = ("--dataset", "med_grit", "--source", f"Med-GRIT/{part}", "--out", f"data/med_grit_{part}")
        run(monkeypatch, "medplib_jax.datasets.import_dataset", *arguments)
    assert "no test split" not in capsys.readouterr().err
    assert all(open_source(name)[0].turns for name in MADE)


@pytest.mark.parametrize("link", ["images", "SAMed2Dv1"])
def test_folders_of_pictures_may_be_links(tmp_path, monkeypatch, capsys, link):
    monkeypatch.chdir(tmp_path)
    make_mecovqa(tmp_path, ("Grounding",))
    place = tmp_path / "SA-Med2D-20M" / (f"SAMed2Dv1/{link}" if link == "images" else link)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    run(monkeypatch, *commands()[0])
    manifest = json.loads((tmp_path / "data/assembled/manifest.json").read_text())
    assert manifest["written"] == manifest["records"] == RECORDS * 8
    printed = capsys.readouterr().out
    assert "train on: data/assembled/mecovqa/grounding/1.0.0#train" in printed
    assert "train on: data/assembled/mecovqa/grounding/1.0.0#test" not in printed and "#test" in printed


def test_a_record_of_each_form_is_read():
    (block,) = re.findall(r"^```\n(A question about a picture.*?)^```", README.read_text(), re.M | re.S)
    records = [json.loads("{" + piece.split("\n{", 1)[1]) for piece in block.strip().split("\n\n")]
    read = [parse_record(record, "README.md", index, "") for index, record in enumerate(records)]
    assert len(read) == 6 and all(record.images == ("images/ct_1.png",) for record in read)
    vqa, region, mask, boxes, examples, volume = read
    assert vqa.answer_type == "closed" and len(vqa.turns) == 4 and "<region>" in region.turns[0][1]
    assert mask.spacing == (0.7, 0.7) and mask.references == ("images/ct_1.png", "masks/ct_1_liver.png")
    assert boxes.turns[0][1].startswith("<image>") and "<box>" in boxes.turns[1][1]
    assert examples.target_mask and examples.examples and volume.volume.slices == 40 and volume.spacing == (0.7, 0.7)

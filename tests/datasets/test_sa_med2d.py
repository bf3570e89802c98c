"""SA-Med2D-20M to a folder of images with named masks."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.files import files_below
from medplib_jax.datasets.qa.folder import scan
from medplib_jax.datasets.sa_med2d import make_pairs

CT, MR = "ct_00--AbdomenCT1K--Case_1--x_0001", "mr_t1--BraTS--Case_2--z_0002"


@pytest.fixture
def collection(tmp_path):
    root = tmp_path / "collection"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    picture = Image.fromarray(np.full((20, 30), 200, np.uint8))
    for name in (CT, MR):
        picture.save(root / f"images/{name}.png")
    own = [f"{CT}--{part}" for part in ("0003_000", "0003_001", "0004_000", "0009_000")] + [
        f"{MR}--{part}" for part in ("0001_000", "0002_000")
    ]
    for name in (*own, "ct_00--AbdomenCT1K--Case_9--x_0001--0003_000"):
        picture.save(root / f"masks/{name}.png")
    (root / "SAMed2D_v1_class_mapping_id.json").write_text(
        json.dumps({"AbdomenCT1K": {"left_kidney": 3, "union_kidneys": 4}, "BraTS": {"tumor": 1, "class2": 2}})
    )
    return root


def test_masks_come_under_their_class_names(collection, tmp_path):
    manifest = make_pairs(str(collection), str(tmp_path / "out"))
    reasons = {"class name says nothing": 2, "class without a name": 1, "mask without its image": 1}
    assert manifest == {"match": "*", "images": 2, "masks": 3, "skipped": 4, "reasons": reasons}
    pairs, problems = scan(str(tmp_path / "out"))
    assert not problems and {pair.modality: pair.names for pair in pairs} == {"ct": ("left kidney",), "mr": ("tumor",)}
    assert len(pairs[0].masks) == 2
    lines = [
        json.loads(line)["file"].split("--")[-1] for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    ]
    assert sorted(lines) == ["0002_000.png", "0003_000.png", "0004_000.png", "0009_000.png"]


def test_a_part_can_be_chosen(collection, tmp_path):
    assert make_pairs(str(collection), str(tmp_path / "out"), "mr_*")["images"] == 1
    with pytest.raises(DataError, match="no masks"):
        make_pairs(str(collection), str(tmp_path / "none"), "pet_*")
    with pytest.raises(DataError, match="not SA-Med2D-20M"):
        make_pairs(str(collection / "images"), str(tmp_path / "none"))


def test_every_matching_file_is_used_or_named(collection, tmp_path):
    for name in ("images/ct_00--A--B--x_1.png", "images/ct_00--A--B--x_1.jpg", f"masks/{CT}--0003_009.jpg"):
        (collection / name).touch()
    (collection / "masks/.DS_Store").touch()
    make_pairs(str(collection), str(tmp_path / "out"), "ct_*")
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    named = {str(pathlib.Path(line["file"]).relative_to(collection)) for line in lines}
    used = {f"images/{CT}.png", f"masks/{CT}--0003_000.png", f"masks/{CT}--0003_001.png"}
    there = {name for name in files_below(str(collection)) if name.split("/")[-1].startswith("ct_")}
    assert named | used == there and not named & used

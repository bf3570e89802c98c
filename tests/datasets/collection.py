"""A small SA-Med2D-20M and MeCoVQA as they are published, faults included."""

import json
import pathlib

import numpy as np
from PIL import Image

SIZE = (24, 32)
CT = "ct_00--ORGANS--case_{}--x_000{}"
CLASS_NAMES = {"ORGANS": {"liver": 1, "left_kidney": 2}}


def rectangle(top, left, bottom, right, size=SIZE):
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def make_images(root: pathlib.Path, cases=range(4)) -> pathlib.Path:
    """SAMed2Dv1/ with two instances of class 1 and one of class 2 for each case."""
    root = root / "SAMed2Dv1"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for case in cases:
        name = CT.format(case, case)
        pixels = np.random.default_rng(case).integers(0, 255, SIZE, np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        for part, mask in (
            ("0001_000", rectangle(2, 2, 9, 9)),
            ("0001_001", rectangle(12, 2, 20, 8)),
            ("0002_000", rectangle(5, 20, 12, 30)),
        ):
            Image.fromarray(mask).save(root / "masks" / f"{name}--{part}.png")
    (root / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps(CLASS_NAMES))
    return root.parent


def record(case, question, answer, **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": f"images/{CT.format(case, case)}.png", "conversations": turns, **more}


def grounding(case, mask=None, **more):
    mask = mask or f"masks_merged/{CT.format(case, case)}--0001_merged.png"
    return record(case, "<image>\nPlease segment the liver.", f"The liver is <SEG>.<mask>{mask}</mask>", **more)


def region(case, mask=None):
    mask = mask or f"masks/{CT.format(case, case)}--0002_000.png"
    return record(case, f"<image>\nWhat is in <region>{mask}</region>?", "The left kidney.", answer_type="open")


def vqa(case):
    return record(case, "<image>\nIs this a CT image?", "Yes", answer_type="closed")


def write(folder: pathlib.Path, name: str, records) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))


def make_annotations(folder: pathlib.Path) -> pathlib.Path:
    write(folder, "train/MeCoVQA-Complex.json", [vqa(0), vqa(1)])
    write(folder, "train/MeCoVQA-Complex_local+Region.json", [region(0), region(1)])
    write(folder, "train/MeCoVQA-Grounding.json", [grounding(0), grounding(1), grounding(2)])
    write(folder, "test/MeCoVQA_Grounding_test.json", [grounding(3)])
    write(folder, "zeroshot4grounding/mr.json", [grounding(3)])
    return folder

"""Small folders of images with named masks."""

import json
import pathlib

import numpy as np
from PIL import Image

SIZE = (24, 32)
SHAPES = {  # top, left, bottom, right
    "liver": (2, 1, 12, 9),
    "left_kidney": (14, 22, 20, 28),
    "cyst": (4, 24, 8, 28),
    "cyst_001": (18, 2, 22, 6),
}


def make_pairs(root: pathlib.Path, images: int = 3, shapes=SHAPES) -> str:
    """images/ct_00--A--case_N--x_1.png, a mask of each shape for all of them, and a note on each in metadata.json."""
    for number in range(images):
        name = f"ct_00--A--case_{number}--x_1"
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "masks" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, SIZE, np.uint8)).save(
            root / "images" / f"{name}.png"
        )
        for shape, (top, left, bottom, right) in shapes.items():
            mask = np.zeros(SIZE, np.uint8)
            mask[top:bottom, left:right] = 255
            Image.fromarray(mask).save(root / "masks" / name / f"{shape}.png")
    notes = {f"ct_00--A--case_{number}--x_1": {"note": f"number {number}"} for number in range(images)}
    (root / "metadata.json").write_text(json.dumps(notes))
    return str(root)

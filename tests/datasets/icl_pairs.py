"""A folder of pairs of which in-context records can be made."""

from pathlib import Path

import numpy as np
from PIL import Image

PATIENTS, STRUCTURES = 12, ("liver", "left kidney", "spleen")


def write_pairs(root: Path) -> Path:
    """Two slices of each of twelve patients; the last patient alone has a pancreas."""
    for patient in range(PATIENTS):
        for number in range(2):
            name = f"ct_00--made--p{patient:02d}--z_{number}"
            rng = np.random.default_rng([patient, number])
            _write(root / "images" / f"{name}.png", rng.integers(0, 255, (40, 48)))
            for place, structure in enumerate((*STRUCTURES, *["pancreas"] * (patient == PATIENTS - 1))):
                mask = np.zeros((40, 48))
                mask[10 : 14 + patient, 4 + 10 * place : 10 + 10 * place] = 255
                _write(root / "masks" / name / f"{structure.replace(' ', '_')}.png", mask)
    return root


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(pixels)).save(path)

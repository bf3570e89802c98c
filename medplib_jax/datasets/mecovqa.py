"""MeCoVQA's form on disk: annotation files, masks of one class united, and what SA-Med2D-20M's file names say.

A record is {"image": path, "conversations": [{"from": "human" | "gpt", "value": text}, ...], "answer_type": "open" |
"closed"}; see `medplib_jax.data.sources` for its check (`parse_record`) and for looking up a file below a root
(`find_file`).
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable

import numpy as np

from medplib_jax.data.errors import DataError
from medplib_jax.data.records import modality

_LAST_PART = re.compile(r"(?P<label>.+?)(?:_(?P<instance>\d{3}|merged))?")
_SEQUENCE = re.compile(
    r"[_.-](flair|t1|t1c|t1ce|t1gd|t1n|t1w|t2|t2f|t2w|pd|dwi|adc|swi|bold|ct|pet|mr)$|(?<=\d)_000\d$", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class FileName:
    """What the name of an image or mask of SA-Med2D-20M says; a part that the name lacks is empty.

    Images: MODALITY[_SUB]--DATASET--VOLUME--SLICE.png; masks: the image's name, then --CLASS_INSTANCE.png, with three
    digits for the instance or "merged" for all masks of the class (in other collections: --NAME.png).
    """

    modality: str
    dataset: str = ""
    volume: str = ""  # patient, scan or video
    slice: str = ""  # x_0359: plane and index; 2d_none: not a slice
    label: str = ""  # of masks: the class id, or the name of what is marked
    instance: str = ""

    @property
    def patient(self) -> str:
        """Which patient, scan or video this is of; empty when the name does not say.

        A volume's folder ("p1--t2") comes first.
        """
        return f"{self.dataset}--{without_sequence(self.volume.split('--')[0])}" if self.volume else ""


def without_sequence(name: str) -> str:
    """A scan's name without what tells the sequences of one patient apart.

    "BRATS_001_flair", or nnU-Net's "BRATS_001_0000", are both of "BRATS_001".
    """
    return _SEQUENCE.sub("", name)


def parse_image_name(path: str) -> FileName:
    return _parse_stem(stem(path))


def parse_mask_name(path: str) -> FileName:
    image, _, last = stem(path).rpartition("--")
    match = _LAST_PART.fullmatch(last)
    label, instance = (match["label"], match["instance"] or "") if match else ("", "")
    return dataclasses.replace(_parse_stem(image), label=label, instance=instance)


def stem(path: str) -> str:
    """The file's name without folder and picture suffix; other dots belong to it."""
    return re.sub(r"\.(png|jpe?g|bmp|tiff?)$", "", os.path.basename(path), flags=re.IGNORECASE)


def _parse_stem(name: str) -> FileName:
    parts = name.split("--")
    if len(parts) < 4:
        return FileName(modality(name), *parts[1:])
    return FileName(modality(name), parts[1], "--".join(parts[2:-1]), parts[-1])


def merged_name(mask: str) -> str:
    """Name of the united mask of an instance's class: masks/a--0005_000.png -> masks_merged/a--0005_merged.png."""
    return f"masks_merged/{re.sub(r'_([0-9]{3}|merged)$', '', stem(mask))}_merged.png"


def unite(masks: Iterable[np.ndarray]) -> np.ndarray:
    """Union of 0/1 masks uint8 [h, w] of one size. ValueError when there is none or their sizes differ."""
    masks = list(masks)
    if len({mask.shape for mask in masks}) != 1:
        raise ValueError(f"expected masks of one size, found {sorted({mask.shape for mask in masks})}")
    return np.maximum.reduce(masks)


def read_class_names(root: str) -> dict[tuple[str, int], str]:
    """(dataset, class id) -> name, from SA-Med2D-20M's SAMed2D_v1_class_mapping_id.json.

    Empty when `root` does not have it.
    """
    path = os.path.join(root, "SAMed2D_v1_class_mapping_id.json")
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            mapping = json.load(file)
        return {
            (dataset, int(number)): name for dataset, classes in mapping.items() for name, number in classes.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(path, None, "class names cannot be read", "{dataset: {name: id}}", str(error)) from error


def class_name(mask: str, names: dict[tuple[str, int], str]) -> str:
    """What a mask marks, in words: looked up for a class id, else as its file name says; empty when unknown."""
    name = parse_mask_name(mask)
    if name.label.isdecimal():
        return names.get((name.dataset, int(name.label)), "").replace("_", " ")
    return name.label.replace("_", " ")

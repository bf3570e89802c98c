"""One published record to a complete example: text repaired, files found, masks of one class united.

What cannot be repaired is a DataError.
"""

import dataclasses
import io
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from medplib_jax.data import images
from medplib_jax.data.errors import DataError, Notice
from medplib_jax.data.records import MASK, REGION, Record, check_complete, find_file, parse_record
from medplib_jax.data.regions import draw, is_shape
from medplib_jax.datasets.files import Folder, age_of
from medplib_jax.datasets.mecovqa import class_name, merged_name, parse_mask_name, stem, unite

_REFERENCE = re.compile(r"<(region|mask)>(.*?)</\1>")
_FOLDER = re.compile(r"(?:.*/)?((?:images|masks|masks_merged)/[^/]+)$")
_SUFFIX = re.compile(r"\.(png|jpe?g)$", re.IGNORECASE)


@dataclasses.dataclass
class Files:
    """Where files are looked up: the image collection, and the instances of each class.

    It keeps account of what was asked for.
    """

    root: str
    folder: Folder  # gets united masks
    instances: Mapping[str, tuple[str, ...]]  # merged_name -> names in masks/
    names: Mapping[tuple[str, int], str]  # see read_class_names
    ages: dict[str, list[int] | None] = dataclasses.field(default_factory=dict)  # `age_of` each reference asked for
    missing: set[str] = dataclasses.field(default_factory=set)  # references without a file
    made: set[str] = dataclasses.field(default_factory=set)  # united masks that were written
    notices: list[Notice] = dataclasses.field(default_factory=list)  # odd files that were converted

    def find(self, reference: str) -> str:
        """The reference's real path; what is missing is noted. DataError when it is missing or outside the root."""
        self.ages[reference] = age_of(self.root, reference)
        try:
            return find_file(self.root, reference)
        except DataError as error:
            if error.what == "file is missing":
                self.missing.add(reference)
            raise

    def mask(self, reference: str, size: tuple[int, int]) -> bytes:
        """A mask of this size (0 or 255) as `encode` makes it.

        One of masks_merged/ that is not there is united from its instances and written. Some collections have united
        masks, with or without their suffix.
        """
        spellings = dict.fromkeys((reference, reference.replace("_merged.png", ".png")))
        self.ages |= {name: age_of(self.root, name) for name in spellings}
        there = next((name for name in spellings if self.ages[name]), None)
        if there or not reference.startswith("masks_merged/"):
            mask = images.load_mask(self.find(there or reference), size, self.notices)
            return encode(visible(reference, mask))
        instances = self.instances.get(reference, ())
        if not instances:
            self.missing.add(reference)
            expected = f"masks/{stem(reference).removesuffix('_merged')}_NNN.png"
            raise DataError(reference, None, "no instance mask to unite", expected, "none")
        masks = (images.load_mask(self.find(f"masks/{name}"), size, self.notices) for name in instances)
        united = visible(reference, unite(masks))
        self.folder.write(reference, encode(united, "PNG"))
        self.made.add(reference)
        return encode(united)


def prepare(raw: Any, file: str, index: int, files: Files) -> tuple[dict[str, Any], list[str]]:
    """The example of a published record (keys of `assemble_shards.FEATURES`) and what was repaired.

    DataError when it cannot be used.
    """
    repairs: list[str] = []
    if isinstance(raw, dict):
        raw = repair_text(raw, repairs)
    record = parse_record(raw, file, index, files.root)
    if record.examples is not None:
        expected = "a record without examples; those with some are read from their annotation file"
        raise record.error("record with examples", expected, f"{len(record.examples)} of them")
    if len(record.images) != 1:
        raise record.error("not one image", "1 image", str(len(record.images)))
    check_complete(record)
    files.notices.clear()
    try:
        picture, size = read_picture(files.find(record.images[0]), files.notices)
        masks = read_masks(record, files, size)
    except DataError as error:
        raise error.in_record(file, index) from error
    repairs += [f"converted: {notice.found} ({os.path.basename(notice.file)})" for notice in files.notices]
    return {
        "id": f"{file}#{index}",
        "image": picture,
        "image_name": record.images[0],
        "conversations": [{"from": role, "value": text} for role, text in record.turns],
        "answer_type": record.answer_type,
        "modality": record.modality,
        "patient": record.patient,
        "structure": record.structure,
        "spacing": json.dumps(record.spacing) if record.spacing else "",
        "volume": json.dumps(dataclasses.asdict(record.volume)) if record.volume else "",
        "masks": list(masks.values()),
        "mask_names": list(masks),
        "mask_labels": [class_name(name, files.names) for name in masks],
    }, repairs


def repair_text(raw: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    """The record with references in the usual form and `<image>` in its first question.

    Appends what changed to `repairs`.
    """
    image, turns = raw.get("image"), raw.get("conversations")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, str):
        image = repair_reference(image, repairs)
    if not isinstance(turns, list):
        return {**raw, "image": image}
    turns = [repair_turn(turn, repairs) for turn in turns]
    if image and not any("<image>" in turn["value"] for turn in turns if _is_text(turn)):
        first = next((turn for turn in turns if _is_text(turn) and turn.get("from") == "human"), None)
        if first and first["value"].strip():
            first["value"] = "<image>\n" + first["value"]
            repairs.append("<image> added to the question")
    return {**raw, "image": image, "conversations": turns}


def repair_turn(turn: Any, repairs: list[str]) -> Any:
    if not _is_text(turn):
        return dict(turn) if isinstance(turn, dict) else turn
    value = _REFERENCE.sub(
        lambda match: f"<{match[1]}>{repair_reference(match[2], repairs)}</{match[1]}>", turn["value"]
    )
    return {**turn, "value": value}


def _is_text(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("value"), str)


def repair_reference(reference: str, repairs: list[str]) -> str:
    """The reference relative to the collection's root, with suffix.

    Other people's absolute paths are cut, a missing ".png" is added.
    """
    if not reference.strip() or is_shape(reference) or "\0" in reference:
        return reference
    path = reference.strip().replace("\\", "/")
    if path != reference:
        repairs.append("path cleaned of spaces and backslashes")
    match = _FOLDER.match(path)
    if match and os.path.isabs(path):
        repairs.append("absolute path made relative")
        path = match[1]
    if not _SUFFIX.search(path):
        repairs.append("missing suffix added")
        path += ".png"
    if path.startswith("masks_merged/") and parse_mask_name(path).instance != "merged":
        repairs.append("missing _merged added")
        path = merged_name(path)
    return path


def read_picture(path: str, notices: list[Notice]) -> tuple[bytes, tuple[int, int]]:
    """The picture's content and size (h, w).

    Its pixels as `encode` makes them, but a plain JPEG as it is, which is much smaller.
    """
    pixels = images.load_pixels(path, notices)
    with Image.open(path) as image:
        is_jpeg = image.format == "JPEG"
    if is_jpeg and not notices:
        with open(path, "rb") as file:
            return file.read(), pixels.shape[:2]
    return encode(pixels), pixels.shape[:2]


def read_masks(record: Record, files: Files, size: tuple[int, int]) -> dict[str, bytes]:
    """Every mask and region that the text refers to by a file, by name.

    DataError for an empty one, or a drawn region that is none.
    """
    references = dict.fromkeys(
        name for _, text in record.turns for pattern in (REGION, MASK) for name in pattern.findall(text)
    )
    for shape in filter(is_shape, references):
        draw(shape, size)
    return {name: files.mask(name, size) for name in references if not is_shape(name)}


def visible(name: str, mask: np.ndarray) -> np.ndarray:
    """A 0/1 mask as 0 and 255. DataError when it is empty."""
    if not mask.any():
        raise DataError(name, None, "mask is empty", "at least one pixel", "none")
    return mask * np.uint8(255)


def encode(pixels: np.ndarray, form: str = "PPM") -> bytes:
    """uint8 [h, w] or [h, w, 3] as a picture file.

    Shards hold bare pixels (PGM and PPM), which ArrayRecord compresses: half as much again as PNG on the disk, but read
    more than five times as fast.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()

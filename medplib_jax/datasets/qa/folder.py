"""A plain folder of image-mask pairs: images/, masks/<image>/<name>.png, and what is known of each image in metadata.json.

`<image>` is the image's name without suffix; further masks of one name are `<name>_001.png`, `<name>_002.png`, ... metadata.json holds
{"<image>": {"modality": "CT", "patient": "17", "anything else": "..."}}; without it an image's modality is what its file name begins with,
and its patient or volume what the name says, as in SA-Med2D-20M ("ct_00--DATASET--VOLUME--SLICE").
"""

import dataclasses
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import find_file
from medplib_jax.datasets import modalities
from medplib_jax.datasets.mecovqa import merged_name, stem
from medplib_jax.datasets.place import place, safe_name, write_bytes
from medplib_jax.datasets.qa.facts import Facts, measure

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_INSTANCE = re.compile(r"_\d{3}$")
_NAME = re.compile(r"\w[\w .+()'%=,-]{0,79}")  # what `safe_name` keeps, so that two names never share a file


@dataclasses.dataclass(frozen=True)
class Pair:
    """One image of a folder with its masks; paths are relative to `root`."""

    root: str
    image: str
    masks: tuple[tuple[str, str], ...]  # (name, path)
    metadata: dict[str, str]
    reference: str  # the image's place in the new dataset

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in self.masks))

    @property
    def modality(self) -> str:
        return modalities.of_file(self.reference)


def scan(root: str) -> tuple[list[Pair], list[DataError]]:
    """The folder's images in order of their names, and what cannot be used. DataError when there is no image at all."""
    metadata, problems = _metadata(root), []
    files = sorted(_files_below(root, "images"))
    if not files:
        raise DataError(root, None, "no images", "a folder images/ with " + ", ".join(SUFFIXES), "none")
    pairs, taken = [], {}
    for file in files:
        name = os.path.splitext(os.path.relpath(file, "images"))[0]
        known = metadata.get(name) or metadata.get(os.path.basename(file)) or {}
        reference = image_reference(os.path.relpath(file, "images"), modalities.prefix_of(known.get("modality", "")))
        if stem(reference) in taken:
            problems.append(
                DataError(
                    os.path.join(root, file),
                    None,
                    "image name is not unique",
                    "one image of each name",
                    taken[stem(reference)],
                )
            )
            continue
        taken[stem(reference)] = file
        masks = []
        for mask in sorted(_files_below(root, os.path.join("masks", name))):
            label = mask_label(mask)
            if _NAME.fullmatch(label):
                masks.append((label, mask))
            else:
                problems.append(
                    DataError(
                        os.path.join(root, mask),
                        None,
                        "mask name cannot be used",
                        "up to 80 letters, digits, or . + ( ) ' % = , -",
                        repr(label),
                    )
                )
        pairs.append(Pair(root, file, tuple(masks), known, reference))
    return pairs, problems


def image_reference(name: str, modality: str) -> str:
    """Where an image lies in a new dataset: its file name tells its modality."""
    return f"images/{modalities.with_prefix(safe_name(name), modality)}"


def mask_label(path: str) -> str:
    """The name that a mask's file name gives: "left_kidney_001.png" is a "left kidney"."""
    return " ".join(_INSTANCE.sub("", stem(path)).replace("_", " ").split())


def _files_below(root: str, folder: str) -> list[str]:
    found = []
    for path, _, files in os.walk(os.path.join(root, folder)):
        found += [os.path.relpath(os.path.join(path, file), root) for file in files if file.lower().endswith(SUFFIXES)]
    return found


def _metadata(root: str) -> dict[str, dict[str, str]]:
    path = os.path.join(root, "metadata.json")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            metadata = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, None, "metadata cannot be read", "a JSON object", str(error)) from error
    if not isinstance(metadata, dict) or not all(isinstance(entry, dict) for entry in metadata.values()):
        raise DataError(
            path, None, "metadata of another form", '{"<image>": {"modality": ...}}', type(metadata).__name__
        )
    return {name: {str(key): str(value) for key, value in entry.items()} for name, entry in metadata.items()}


def vocabulary(pairs: Sequence[Pair]) -> dict[str, tuple[str, ...]]:
    """Names seen in each modality, sorted."""
    names = defaultdict(set)
    for pair in pairs:
        names[pair.modality].update(pair.names)
    return {modality: tuple(sorted(seen)) for modality, seen in names.items()}


def read_facts(pair: Pair, out: str, absent: Sequence[str] = ()) -> tuple[Facts, list[DataError]]:
    """Puts the image and its masks into the dataset `out` and measures them; the errors are of masks that were left out.

    absent: names that are not in this image. DataError when the image itself cannot be used.
    """
    path = find_file(pair.root, pair.image)
    size = images.load_image(path).shape[:2]
    place(path, out, pair.reference)
    masks, problems = defaultdict(list), []
    for name, file in pair.masks:
        try:
            source = find_file(pair.root, file)
            mask = images.load_mask(source, size)
            if not mask.any():
                raise DataError(source, None, "mask is empty", "at least one pixel", "none")
        except DataError as error:
            problems.append(error)
            continue
        masks[name].append((source, mask))
    references = {name: _place_masks(found, name, stem(pair.reference), out) for name, found in masks.items()}
    targets, touching = measure({name: [mask for _, mask in found] for name, found in masks.items()}, references)
    return Facts(pair.reference, size, pair.modality, targets, touching, tuple(absent), pair.metadata), problems


def _place_masks(found: list[tuple[str, np.ndarray]], name: str, image: str, out: str) -> tuple[tuple[str, ...], str]:
    """References of the instances and of their union, which is written when there are several."""
    label = safe_name(name)
    if len(found) == 1:
        reference = f"masks/{image}--{label}.png"
        _place_mask(*found[0], out, reference)
        return (reference,), reference
    references = tuple(f"masks/{image}--{label}_{number:03d}.png" for number in range(len(found)))
    for (source, mask), reference in zip(found, references, strict=True):
        _place_mask(source, mask, out, reference)
    merged = merged_name(references[0])
    _write_mask(np.maximum.reduce([mask for _, mask in found]), out, merged)
    return references, merged


def _place_mask(source: str, mask: np.ndarray, out: str, reference: str) -> None:
    if source.lower().endswith(".png"):
        place(source, out, reference)
    else:
        _write_mask(mask, out, reference)


def _write_mask(mask: np.ndarray, out: str, reference: str) -> None:
    content = io.BytesIO()
    Image.fromarray(mask * 255).save(content, "png")
    write_bytes(content.getvalue(), out, reference)

"""A plain folder of image-mask pairs, and what is known of each image.

images/, masks/<image>/<name>.png, metadata.json. `<image>` is the image's name without suffix; further masks of one
name are `<name>_001.png`, `<name>_002.png`, ... With a labels.json ({"1": "liver", ...}) masks/<image>.png, or a mask
of a name that is not in it, is a label map: each of its values is a mask. metadata.json holds {"<image>": {"modality":
"CT", "patient": "17", "spacing": [0.7, 0.7], "anything else": "..."}}, the spacing in mm between rows and between
columns; without it an image's modality is what its file name begins with, and its patient what the path says (see
`patients`).
"""

import dataclasses
import functools
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
from PIL import Image
from tqdm import tqdm

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import find_file, read_spacing
from medplib_jax.datasets import labels, modalities
from medplib_jax.datasets.files import Folder, age_of, code_version, files_below, safe_name, unused
from medplib_jax.datasets.mecovqa import merged_name, stem
from medplib_jax.datasets.patients import patient_of
from medplib_jax.datasets.processes import CORES, HERE, Keeping, Workers, map_shards
from medplib_jax.datasets.qa.facts import ImageFacts, measure
from medplib_jax.volumes.masks import Labels

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
METADATA = "metadata.json"
_IN_PROCESS = 64  # fewer images are not worth starting processes for
_SHARD = 16  # images that a process reads at a time
_INSTANCE = re.compile(r"_\d{3}$")
_NAME = re.compile(r"\w[\w .+()'%=,-]{0,79}")  # what `safe_name` keeps, so that two names never share a file
_LETTERS = "up to 80 letters, digits, or . + ( ) ' % = , -"
_EXPECTED = "images/<image>.png, masks/<image>/<name>.png, metadata.json or labels.json"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One image of a folder with its masks; paths are relative to `root`."""

    root: str
    image: str
    masks: tuple[tuple[str, str], ...]  # (name, path); the name of masks/<image>.png is empty
    metadata: dict[str, str]
    reference: str  # the image's place in the new dataset
    patient: str
    label_names: Labels  # of label maps; empty when there are none
    spacing: tuple[float, float] | None = None  # mm between rows and between columns

    @property
    def names(self) -> tuple[str, ...]:
        """What its masks are called, those of label maps aside."""
        return tuple(dict.fromkeys(name for name, _ in self.masks if not labels.is_label_map(name, self.label_names)))

    @property
    def modality(self) -> str:
        return modalities.of_file(self.reference)


def scan(root: str, pattern: str = "") -> tuple[list[Pair], list[DataError]]:
    """The folder's images in order of their names, and what cannot be used.

    Every file and entry of metadata that belongs to no image is named, too. pattern: see `patient_of`. DataError when
    there is no image at all.
    """
    files, metadata, names = files_below(root), _metadata(root), labels.read_names(root)
    if unfit := [name for name in names if not _NAME.fullmatch(name)]:
        raise DataError(root, None, "name of a label cannot be used", _LETTERS, repr(unfit[0]))
    found = [name for name in files if name.startswith("images/") and name.lower().endswith(SUFFIXES)]
    if not found:
        raise DataError(root, None, "no images", "a folder images/ with " + ", ".join(SUFFIXES), "none")
    masks = _masks_by_image(files)
    pairs, problems, taken = [], [], {}
    for file in found:
        name = os.path.splitext(file.removeprefix("images/"))[0]
        known = metadata.get(name) or metadata.get(os.path.basename(file)) or {}
        reference = image_reference(file.removeprefix("images/"), modalities.prefix_of(known.get("modality", "")))
        try:
            if (other := taken.setdefault(stem(reference), file)) != file:
                path = os.path.join(root, file)
                raise DataError(path, None, "image name is not unique", "one image of each name", other)
            patient = (not pattern and known.get("patient")) or patient_of(name, pattern, os.path.join(root, file))
            spacing = _spacing(known, root, name)
        except DataError as error:
            problems.append(error)
            continue
        usable = []
        for label, mask in masks.get(name, ()):
            problem = _name_problem(root, label, mask, names)
            problems += [problem] if problem else []
            usable += [] if problem else [(label, mask)]
        pairs.append(Pair(root, file, tuple(usable), known, reference, patient, names, spacing))
    images_of = {os.path.splitext(file.removeprefix("images/"))[0] for file in found}
    used = {*found, METADATA, *labels.NAMES_FILES, *(mask for name in images_of for _, mask in masks.get(name, ()))}
    problems += unused(root, [name for name in files if name not in used], _EXPECTED)
    lost = metadata.keys() - images_of - {os.path.basename(file) for file in found}
    path = os.path.join(root, METADATA)
    problems += [
        DataError(path, None, "metadata of no image", "an image's name without suffix", key) for key in sorted(lost)
    ]
    return pairs, problems


def _masks_by_image(files: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """(name, path) of the masks of each image: files in masks/<image>/, and masks/<image>.png itself without a name."""
    masks = defaultdict(list)
    for file in files:
        if file.startswith("masks/") and file.lower().endswith(SUFFIXES):
            folder, _ = os.path.split(file.removeprefix("masks/"))
            masks[folder].append((mask_label(file), file))
            masks[os.path.splitext(file.removeprefix("masks/"))[0]].append(("", file))
    return masks


def _name_problem(root: str, label: str, mask: str, names: Labels) -> DataError | None:
    """Why a mask of this name cannot be used; None when it can."""
    path = os.path.join(root, mask)
    if not label and not names:
        return DataError(
            path, None, "mask without a name", "masks/<image>/<name>.png, or a label map and labels.json", mask
        )
    if label and not _NAME.fullmatch(label):
        return DataError(path, None, "mask name cannot be used", _LETTERS, repr(label))
    return None


def image_reference(name: str, modality: str) -> str:
    """Where an image lies in a new dataset: its file name tells its modality."""
    return f"images/{modalities.with_prefix(safe_name(name), modality)}"


def mask_label(path: str) -> str:
    """The name that a mask's file name gives: "left_kidney_001.png" is a "left kidney"."""
    return " ".join(_INSTANCE.sub("", stem(path)).replace("_", " ").split())


def _metadata(root: str) -> dict[str, dict[str, str]]:
    path = os.path.join(root, METADATA)
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            metadata = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, None, "metadata cannot be read", "a JSON object", str(error)) from error
    if not isinstance(metadata, dict) or not all(isinstance(entry, dict) for entry in metadata.values()):
        raise DataError(
            path, None, "metadata of another form", '{"<image>": {"modality": ...}}', type(metadata).__name__
        )
    return {name: {str(key): str(value) for key, value in entry.items()} for name, entry in metadata.items()}


def _spacing(known: dict[str, str], root: str, image: str) -> tuple[float, float] | None:
    """The spacing that an image's metadata tells. DataError when it is none."""
    if "spacing" not in known:
        return None

    def fail(what: str, expected: str, found: str) -> NoReturn:
        raise DataError(os.path.join(root, METADATA), None, f"{what} ({image})", expected, found)

    try:
        told = json.loads(known["spacing"])
    except ValueError:
        told = known["spacing"]
    return read_spacing(told, fail)


def vocabulary(pairs: Sequence[Pair]) -> dict[str, tuple[str, ...]]:
    """Names of each modality's masks and labels, sorted."""
    names = defaultdict(set)
    for pair in pairs:
        names[pair.modality].update(pair.names, pair.label_names)
    return {modality: tuple(sorted(seen)) for modality, seen in names.items()}


def read_all(
    pairs: Sequence[Pair],
    folder: Folder,
    complete: bool = False,
    window: images.Window | None = None,
    workers: Workers = CORES,
) -> Iterator[tuple[ImageFacts | None, list[DataError]]]:
    """`read_facts` of every image, in order; None for one that cannot be used.

    complete: a name of the modality without a mask is not in the image.
    """
    names = vocabulary(pairs) if complete else {}
    jobs = [(pair, names.get(pair.modality, ())) for pair in pairs]
    shards = [tuple(jobs[start : start + _SHARD]) for start in range(0, len(jobs), _SHARD)]
    read, key = functools.partial(_read_shard, folder, window), functools.partial(_shard_key, window)
    keeping = Keeping(os.path.join(folder.path, ".beam"), key, functools.partial(_is_whole, folder.path))
    if len(jobs) < _IN_PROCESS and not workers.runner:
        workers = HERE
    with tqdm(total=len(jobs), desc="masks", unit="image") as bar:
        for found, made in map_shards(read, shards, workers, keeping):
            folder.keep(made)
            bar.update(len(found))
            yield from found


Job = tuple[Pair, Sequence[str]]  # an image, and the names that are not in it unless it has a mask of them
Found = tuple[ImageFacts | None, list[DataError]]


def _read_shard(folder: Folder, window: images.Window | None, jobs: Sequence[Job]) -> tuple[list[Found], list[str]]:
    """What each image tells, and the files that were made of them."""
    before = len(folder.claimed)
    found = [_read_or_error(job, folder, window) for job in jobs]
    return found, folder.claimed[before:]


def _read_or_error(job: Job, folder: Folder, window: images.Window | None) -> Found:
    try:
        return read_facts(job[0], folder, job[1], window)
    except DataError as error:
        return None, [error]


def _shard_key(window: images.Window | None, jobs: Sequence[Job]) -> str:
    """Changes with the images, their masks and how they are read."""
    files = [(pair.root, name) for pair, _ in jobs for name in (pair.image, *(mask for _, mask in pair.masks))]
    return repr((window, jobs, [age_of(*file) for file in files], code_version()))


def _is_whole(path: str, result: tuple[list[Found], list[str]]) -> bool:
    return all(os.path.isfile(os.path.join(path, name)) for name in result[1])


def read_facts(
    pair: Pair, folder: Folder, complete: Sequence[str] = (), window: images.Window | None = None
) -> tuple[ImageFacts, list[DataError]]:
    """Puts the image and its masks into the dataset `folder` and measures them.

    The problems are of masks that were left out, and notices. complete: names that are not in this image, unless it has
    a mask of them. window: of pictures of 16 bits, see `images.load_pixels`. DataError when the image itself cannot be
    used.
    """
    path, problems = find_file(pair.root, pair.image), []
    pixels = images.load_pixels(path, problems, window)
    size, reference = pixels.shape[:2], pair.reference
    if window and images.is_sixteen_bit(path):
        reference = f"images/{stem(reference)}.png"
        folder.write(reference, _png(pixels))
    else:
        folder.link(path, reference)
    masks = defaultdict(list)
    for name, file in pair.masks:
        try:
            for label, one in _read_masks(pair, name, find_file(pair.root, file), size, problems).items():
                masks[label].append(one)
        except DataError as error:
            problems.append(error)
    references = {name: _place_masks(found, name, stem(reference), folder) for name, found in masks.items()}
    targets, touching = measure({name: [mask for _, mask in found] for name, found in masks.items()}, references)
    absent = tuple(name for name in complete if name not in masks and name not in pair.names)
    told = {"metadata": pair.metadata, "patient": pair.patient, "spacing": pair.spacing}
    return ImageFacts(reference, size, pair.modality, targets, touching, absent, **told), problems


def _read_masks(
    pair: Pair, name: str, path: str, size: tuple[int, int], problems: list[DataError]
) -> dict[str, tuple[str, np.ndarray]]:
    """(file, mask uint8) by name.

    A mask has its own name; a label map those of its values, which have no file of their own.
    """
    if labels.is_label_map(name, pair.label_names):
        found, unnamed = labels.split(images.load_labels(path, size, problems), pair.label_names, path)
        problems += unnamed
        return {label: ("", mask.astype(np.uint8)) for label, mask in found.items()}
    mask = images.load_mask(path, size, problems)
    if not mask.any():
        raise DataError(path, None, "mask is empty", "at least one pixel", "none")
    return {name: (path, mask)}


def _place_masks(
    found: list[tuple[str, np.ndarray]], name: str, image: str, folder: Folder
) -> tuple[tuple[str, ...], str]:
    """References of the instances and of their union, which is written when there are several."""
    label = safe_name(name)
    if len(found) == 1:
        reference = f"masks/{image}--{label}.png"
        _place_mask(*found[0], folder, reference)
        return (reference,), reference
    references = tuple(f"masks/{image}--{label}_{number:03d}.png" for number in range(len(found)))
    for (source, mask), reference in zip(found, references, strict=True):
        _place_mask(source, mask, folder, reference)
    merged = merged_name(references[0])
    folder.write(merged, _png(np.maximum.reduce([mask for _, mask in found]) * 255))
    return references, merged


def _place_mask(source: str, mask: np.ndarray, folder: Folder, reference: str) -> None:
    if source.lower().endswith(".png"):
        folder.link(source, reference)
    else:
        folder.write(reference, _png(mask * 255))


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()

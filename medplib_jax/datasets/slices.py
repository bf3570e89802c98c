"""Slices of scans as a folder of images with named masks, for `write_qa`.

COMMAND
    python -m medplib_jax.datasets.slices --source scans --out data/slices --modality CT --window soft_tissue --every 4
    python -m medplib_jax.datasets.write_qa --pairs data/slices --out data/slices_qa

The source holds scans below images/, in subfolders if you like: DICOM series and single files, NIfTI, NRRD, MetaImage
(see `medplib_jax/volumes`). <scan> is a file's path below images/ without its suffix, or a series' folder.

Masks are masks/<scan>/<name> on the scan's grid: NIfTI, NRRD, MetaImage, or pictures for a DICOM file of one frame;
voxels above 0 are inside. With a labels.json ({"1": "liver", ...}, or labels.tsv, labels.txt, nnU-Net's dataset.json) a
mask of another name, or masks/<scan>.nii.gz and labels/<scan>.nii.gz themselves, is a label map: each value becomes a
mask. labels/<scan>.json holds names for that map alone. DICOM SEG and RTSTRUCT in images/ or masks/ belong to the
series that they name.

Slices are those of the scan as it was acquired, or of --plane. Of a scan with masks only slices that show one are kept,
unless --negatives. With --negatives --questions test/volumes.json asks for each structure on every slice, so that
`python -m medplib_jax.evaluate` scores whole volumes. Metadata names each slice's patient, so that `write_qa` keeps a
patient in one split: a hash of DICOM's PatientID (or of the study's UID), for other files the first folder or the
file's name (see `patients`), or what --patient finds in the path. It also holds the slices' pixel spacing, where the
scan tells it. Nothing else of a DICOM header but the modality is written. A second run with the same --out equals a run
into an empty folder. What is not used is named in skipped.jsonl.
"""

import argparse
import collections
import dataclasses
import io
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import find_file
from medplib_jax.datasets import command, labels, modalities
from medplib_jax.datasets.files import UNUSED, Folder, files_below, safe_name, unused
from medplib_jax.datasets.patients import check_pattern, patient_of
from medplib_jax.volumes.dicom import MASKS, Header, read_header
from medplib_jax.volumes.formats import SUFFIXES, without_suffix
from medplib_jax.volumes.geometry import PLANES
from medplib_jax.volumes.masks import Labels, masks_of, read_dicom_masks, read_label_map, read_labels
from medplib_jax.volumes.pictures import Pictures, pictures
from medplib_jax.volumes.read import ScanFile, find_scans
from medplib_jax.volumes.volume import Volume
from medplib_jax.volumes.windows import WINDOW_HELP, parse_window

QUESTIONS = "test/volumes.json"
_NAMES = (".json", ".tsv", ".csv", ".txt")  # of a file with names of one label map


@dataclasses.dataclass(frozen=True)
class SliceOptions:
    """How scans become pictures.

    modality: instead of what a scan tells. window: as `windows.parse_window`; "": the file's own, else percentiles.
    every: takes every N-th slice. patient: see `patients.patient_of`. plane: see `geometry.cut`. negatives: keep
    slices that show no mask, too. questions: write a test file about whole volumes, which needs all of their slices.
    """

    modality: str = ""
    window: str = ""
    every: int = 1
    patient: str = ""
    plane: str = "acquired"
    negatives: bool = False
    questions: bool = False

    def __post_init__(self):
        if self.window:
            parse_window(self.window)
        if self.every < 1:
            raise ValueError(f"--every: expected at least 1, found {self.every}")
        if self.plane not in PLANES:
            raise ValueError(f"--plane: expected one of {', '.join(PLANES)}, found {self.plane!r}")
        check_pattern(self.patient)
        if self.questions and not (self.negatives and self.every == 1):
            raise ValueError("--questions is about whole volumes: expected --negatives, and no --every")


@dataclasses.dataclass
class MaskFiles:
    """A scan's masks, relative to the source. named: by name; maps: label maps without one; names: of their values."""

    named: dict[str, str] = dataclasses.field(default_factory=dict)
    maps: list[str] = dataclasses.field(default_factory=list)
    names: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """What lies in a source. masks: files by scan. dicom: SEG and RTSTRUCT. names: of the values of all label maps."""

    root: str
    scans: tuple[ScanFile, ...]
    masks: dict[str, MaskFiles]
    dicom: tuple[Header, ...]
    names: Labels
    problems: list[DataError]


def make_slices(source: str, out: str, options: SliceOptions) -> dict[str, Any]:
    """Makes the folder `out`; returns its manifest.

    DataError when `source` has no scan, or none of them can be used.
    """
    found, metadata, asked, failed = look_into(source), {}, [], []
    with Folder(out, "slices", source) as folder:
        for scan in tqdm(found.scans, desc="scans", unit="scan"):
            try:
                described, questions = _write_scan(scan, found, options, folder)
                metadata |= described
                asked += questions
            except DataError as error:
                failed.append(error)
        if len(failed) == len(found.scans):
            raise failed[0]
        problems, used = found.problems + failed, len(found.scans) - len(failed)
        folder.write_json("metadata.json", metadata)
        if options.questions:
            folder.write_json(QUESTIONS, asked)
        patients = len({entry["patient"] for entry in metadata.values()})
        manifest = {"scans": used, "slices": len(metadata), "patients": patients, **dataclasses.asdict(options)}
        manifest |= folder.write_problems(problems)
        folder.write_json("manifest.json", manifest)
    return manifest


def look_into(source: str) -> Source:
    """The source's scans and masks, and a problem for each file that belongs to neither.

    DataError when there is no scan, or when the slices of two would have the same names.
    """
    found = find_scans(os.path.join(source, "images"))
    if not found.scans:
        seen = f"{len(found.problems)} other files" if found.problems else "none"
        raise DataError(source, None, "no scans", "a folder images/ with DICOM or " + ", ".join(SUFFIXES), seen)
    taken: dict[str, ScanFile] = {}
    for scan in found.scans:
        if (other := taken.setdefault(safe_name(scan.name), scan)) is not scan:
            both = ", ".join(os.path.relpath(one.path, source) for one in (other, scan))
            raise DataError(source, None, "two scans would share their files", "names that differ in letters", both)
    masks, dicom, rest = _sorted_masks(source, {scan.place for scan in found.scans})
    dicom += found.masks
    problems = [*found.problems, *unused(source, rest, "images/<scan>, or masks/<scan>/<name> of one of them")]
    matched = [one.file for scan in found.scans for one in masks_of(dicom, scan.series, scan.reference)]
    expected = "the series that it was made on"
    problems += [DataError(one.file, None, UNUSED, expected, one.word) for one in dicom if one.file not in matched]
    return Source(source, found.scans, masks, tuple(dicom), labels.read_names(source), problems)


def _sorted_masks(source: str, scans: set[str]) -> tuple[dict[str, MaskFiles], list[Header], list[str]]:
    """Mask files of the scans, DICOM's own masks, and files that are neither and lie outside of images/."""
    masks, dicom, rest = collections.defaultdict(MaskFiles), [], []
    for name in files_below(source):
        folder, _, below = name.partition("/")
        base = without_suffix(below)
        over, label = os.path.split(base)
        if folder == "images" or name in labels.NAMES_FILES:
            continue
        if folder == "masks" and (header := _dicom_masks(os.path.join(source, name))):
            dicom.append(header)
        elif folder == "labels" and base in scans and name.lower().endswith(_NAMES):
            masks[base].names = name
        elif folder in ("masks", "labels") and base in scans and name.lower().endswith(SUFFIXES):
            masks[base].maps.append(name)
        elif folder == "masks" and over in scans:
            if (other := masks[over].named.setdefault(label, name)) != name:
                rest.append(name if other.lower().endswith(SUFFIXES) else other)
        else:
            rest.append(name)
    return masks, dicom, rest


def _dicom_masks(path: str) -> Header | None:
    """The header of a DICOM SEG or RTSTRUCT, None for every other file."""
    try:
        header = read_header(path)
    except DataError:
        return None
    return header if header.word in MASKS else None


def _write_scan(
    scan: ScanFile, source: Source, options: SliceOptions, folder: Folder
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Writes a scan's slices; returns their metadata and, if these are wanted, questions about the volume.

    Of a scan that turns out to be unusable nothing stays.
    """
    find_file(source.root, os.path.relpath(scan.path, source.root))  # a link may leave the folder
    patient = (
        patient_of(scan.place, options.patient, scan.path) if options.patient or not scan.patient else scan.patient
    )
    volume = scan.read()
    source.problems.extend(volume.notices)
    masks = _masks(scan, volume, source)
    if masks and not any(mask.any() for mask in masks.values()) and not options.negatives:
        raise DataError(
            scan.path, None, "all masks of the scan are empty", "at least one voxel", ", ".join(masks)[:200]
        )
    modality = options.modality or volume.modality
    start = f"{modalities.prefix_of(modality)}_00--{safe_name(os.path.basename(os.path.abspath(source.root)))}"
    shown = pictures(volume, options.plane, parse_window(options.window) if options.window else None)
    if options.questions and not volume.measured:
        raise DataError(scan.path, None, "volume without lengths", "a PixelSpacing in mm", "none")
    written, questions, files = {}, [], []
    about = {"modality": modality, "patient": patient} | ({"spacing": pixel_spacing(shown)} if volume.measured else {})
    try:
        for number, pixels, marked in _slices(shown, masks, options.every, options.negatives or not masks):
            stem = f"{start}--{safe_name(scan.name)}--z_{number:04d}"
            for name, mask in marked.items():
                files.append(f"masks/{stem}/{safe_name(name)}.png")
                folder.write(files[-1], _png(mask.astype(np.uint8) * 255))
            files.append(f"images/{stem}.png")
            folder.write(files[-1], _png(pixels))
            written[stem] = about
            if options.questions:
                questions += volume_questions(stem, number, shown, {name: name in marked for name in masks}, patient)
    except DataError:
        folder.discard(files)
        raise
    return written, questions


def pixel_spacing(shown: Pictures) -> list[float]:
    """mm between the rows and between the columns of a volume's pictures."""
    steps = zip(shown.cut.axes[1:], shown.cut.size, strict=True)
    return [round(float(shown.volume.spacing[axis] * shown.volume.shape[axis] / side), 6) for axis, side in steps]


def volume_questions(
    stem: str, number: int, shown: Pictures, present: Mapping[str, bool], patient: str
) -> Iterator[dict[str, Any]]:
    """A question about each structure of the volume on one of its slices, as the sweep's kind `volume` asks them."""
    spacing = [round(float(shown.volume.spacing[shown.cut.axes[0]]), 6), *pixel_spacing(shown)]
    where = {"name": shown.volume.name, "slice": number, "slices": len(shown)}
    for name, is_there in present.items():
        words = name.replace("_", " ")
        mask = f"<mask>masks/{stem}/{safe_name(name)}.png</mask>"
        answer = f"It is <SEG>.{mask}" if is_there else f"No, there is no {words}."
        turns = [("human", f"<image>\nPlease segment the {words}."), ("gpt", answer)]
        yield {
            "image": f"images/{stem}.png",
            "conversations": [{"from": role, "value": text} for role, text in turns],
            "answer_type": "open",
            "patient": patient,
            "structure": words,
            "volume": where | {"spacing": spacing, "size": list(shown.cut.size)},
        }


def _slices(
    shown: Pictures, masks: dict[str, np.ndarray], every: int, complete: bool
) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
    """(number, picture, non-empty masks) of each `every`th slice; without `complete` only of those that have a mask.

    Whatever goes wrong in making one is a DataError that names the scan.
    """
    turned = {name: shown.cut.reoriented(mask) for name, mask in masks.items()}
    for number in range(0, len(shown), every):
        marked = {name: shown.cut.mask_on_picture(mask[number]) for name, mask in turned.items() if mask[number].any()}
        if marked or complete:
            try:
                pixels = shown[number]
            except (ValueError, ArithmeticError, MemoryError) as error:
                found = f"{type(error).__name__}: {error}"
                raise DataError(
                    shown.volume.file, None, "slice cannot be shown", "numbers or colours", found
                ) from error
            yield number, pixels, marked


def _masks(scan: ScanFile, volume: Volume, source: Source) -> dict[str, np.ndarray]:
    """All masks of a scan by name, bool on its grid.

    DataError for one that cannot be used, or two whose files would be one.
    """
    files, found = source.masks.get(scan.place, MaskFiles()), {}
    names = read_labels(find_file(source.root, files.names)) if files.names else source.names
    taken: dict[str, str] = {}
    for name, file in files.named.items():
        if (other := taken.setdefault(safe_name(name), file)) != file:
            path = os.path.join(source.root, file)
            raise DataError(path, None, "two masks would share their files", "names that differ in letters", other)
        found |= _masks_of_file(name, file, source.names, volume, source)
    for file in files.maps:
        if names:
            found |= _masks_of_file("", file, names, volume, source)
        else:
            path, expected = os.path.join(source.root, file), "masks/<scan>/<name>, or a label map and labels.json"
            source.problems.append(DataError(path, None, "mask without a name", expected, file))
    for header in masks_of(source.dicom, scan.series, scan.reference):
        found |= read_dicom_masks(header, volume)
    return found


def _masks_of_file(name: str, file: str, names: Labels, volume: Volume, source: Source) -> dict[str, np.ndarray]:
    """The masks of one file: one of its own name, or one for each structure of a label map."""
    path, is_map = find_file(source.root, file), labels.is_label_map(name, names)
    if file.lower().endswith(SUFFIXES):
        values = read_label_map(path, volume)
    elif _is_one_picture(volume):
        load = images.load_labels if is_map else images.load_mask
        values = load(path, volume.shape[1::-1], source.problems).T[..., None]
    else:
        expected = "a volume on the scan's grid" if volume.shape[2] > 1 else "a volume, or a picture for DICOM"
        raise DataError(path, None, "picture as mask of a scan of several slices", expected, file)
    if not is_map:
        source.problems.extend(labels.several_values(values, path))
        return {name: values > 0}
    found, problems = labels.split(values, names, path)
    source.problems.extend(problems)
    return found


def _is_one_picture(volume: Volume) -> bool:
    """Whether the scan is one DICOM frame, whose rows and columns a picture can match."""
    return volume.shape[2] == 1 and not volume.file.lower().endswith(SUFFIXES)


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder with images/ and, if you have them, masks/")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--modality", default="", help="instead of what a scan tells, e.g. CT")
    parser.add_argument("--window", default="", help=WINDOW_HELP)
    parser.add_argument("--every", type=int, default=1, help="take every N-th slice")
    parser.add_argument("--plane", default="acquired", choices=PLANES)
    parser.add_argument(
        "--questions", action="store_true", help=f"write {QUESTIONS}: each structure on every slice, for evaluation"
    )
    parser.add_argument("--negatives", action="store_true", help="keep slices without a mask, too")
    parser.add_argument(
        "--patient", default="", metavar="REGEX", help="finds the patient in a scan's path below images/"
    )
    arguments = vars(command.parse(parser))
    source, out = arguments.pop("source"), arguments.pop("out")
    return command.finish(lambda: make_slices(source, out, SliceOptions(**arguments)))


if __name__ == "__main__":
    sys.exit(main())

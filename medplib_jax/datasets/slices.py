"""Slices of DICOM and NIfTI scans as a folder of images with named masks, for `write_qa`.

COMMAND
    python -m medplib_jax.datasets.slices --source scans --out data/slices --modality CT --window 40,400 --every 4
    python -m medplib_jax.datasets.write_qa --pairs data/slices --out data/slices_qa

The source holds images/<scan>.nii, .nii.gz or .dcm, in subfolders if you like, and masks/<scan>/<name> of the same
grid: .nii or .nii.gz for NIfTI, pictures for a DICOM file of one frame. Voxels above 0 are inside. With a labels.json
({"1": "liver", ...}) a mask of another name, or masks/<scan>.nii.gz itself, is a label map: each value becomes a mask.
NIfTI is cut into axial slices, anterior up and the patient's right on the left. Of a scan with masks only slices that
show one are kept.

Metadata names each slice's patient, so that `write_qa` keeps a patient in one split: a hash of DICOM's PatientID (or of
the study's UID), for NIfTI the first folder or the file's name (see `patients`), or what --patient finds in the path.
Nothing else of a DICOM header but the modality is written. A second run with the same --out equals a run into an empty
folder. What is not used is named in skipped.jsonl.
"""

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import find_file
from medplib_jax.datasets import command, labels, modalities
from medplib_jax.datasets.files import UNUSED, Folder, files_below, safe_name, unused
from medplib_jax.datasets.patients import anonymous, check_pattern, patient_of

NIFTI, DICOM = (".nii.gz", ".nii"), (".dcm",)
MAX_VOXELS = 2**30  # a larger scan is refused before it is read
PERCENTILES = (0.5, 99.5)  # of a scan's values: black and white where no window is known
_DICOM_WORDS = {
    "CR": "X-ray",
    "DX": "X-ray",
    "PT": "PET",
    "MG": "mammogram",
    "XA": "angiogram",
}  # DICOM PS3.3 C.7.3.1.1.1


@dataclasses.dataclass(frozen=True)
class SliceOptions:
    """How scans become pictures.

    window: (centre, width) in the scan's units; None: the file's own, else `PERCENTILES`. every: takes each so manieth
    slice. modality: of scans that do not tell it, as NIfTI never does. patient: see `patients.patient_of`.
    """

    modality: str = ""
    window: tuple[float, float] | None = None
    every: int = 1
    patient: str = ""

    def __post_init__(self):
        if self.window and self.window[1] <= 0:
            raise ValueError(f"--window: expected a width above 0, found {self.window[1]}")
        if self.every < 1:
            raise ValueError(f"--every: expected at least 1, found {self.every}")
        check_pattern(self.patient)


@dataclasses.dataclass(frozen=True)
class ScanFiles:
    """A scan and its masks by name ("" for masks/<scan> itself), relative to the source."""

    scan: str
    masks: dict[str, str]

    @property
    def base(self) -> str:
        return _base(self.scan)


@dataclasses.dataclass(frozen=True)
class Slice:
    """A picture uint8 [h, w] or [h, w, 3] with its masks {name: bool [h, w]}."""

    pixels: np.ndarray
    masks: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Scan:
    """All slices of one file. `complete`: slices without a mask are wanted, too."""

    modality: str
    slices: Iterator[Slice]
    complete: bool


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What scans are read with. `problems` takes what is left out, or noted, of a scan that is used."""

    source: str
    options: SliceOptions
    names: Mapping[int, str]  # of labels
    problems: list[DataError]

    def masks_of(self, name: str, path: str, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        """The bool masks of one mask file: one of its own name, or one for each value of a label map."""
        values = read(path)
        if labels.is_label_map(name, self.names):
            found, problems = labels.split(values, self.names, path)
        else:
            found, problems = {name: values > 0}, labels.several_values(values, path)
        self.problems.extend(problems)
        return found


def make_slices(source: str, out: str, options: SliceOptions) -> dict[str, Any]:
    """Makes the folder `out`; returns its manifest.

    DataError when `source` has no scan, or none of them can be used.
    """
    scans, problems = find_scans(source)
    reading, metadata, used = _Reading(source, options, labels.read_names(source), problems), {}, 0
    with Folder(out, "slices", source) as folder:
        for one in tqdm(scans, desc="scans", unit="scan"):
            try:
                metadata |= _write_scan(one, reading, folder)
                used += 1
            except DataError as error:
                problems.append(error)
        if not used:
            raise next(problem for problem in problems if problem.what != UNUSED)
        folder.write_json("metadata.json", metadata)
        patients = len({entry["patient"] for entry in metadata.values()})
        manifest = {"scans": used, "slices": len(metadata), "patients": patients, **dataclasses.asdict(options)}
        manifest |= folder.write_problems(problems)
        folder.write_json("manifest.json", manifest)
    return manifest


def find_scans(source: str) -> tuple[list[ScanFiles], list[DataError]]:
    """The source's scans with their masks, and a problem for each file that belongs to none.

    DataError when there is no scan, or when the slices of two would have the same names.
    """
    names = files_below(source)
    scans = [name for name in names if name.startswith("images/") and name.lower().endswith(NIFTI + DICOM)]
    if not scans:
        raise DataError(source, None, "no scans", "a folder images/ with " + ", ".join(NIFTI + DICOM), "none")
    taken: dict[str, str] = {}
    for scan in scans:
        if (other := taken.setdefault(safe_name(_base(scan)), scan)) != scan:
            raise DataError(
                source, None, "two scans would share their files", "names that differ in letters", f"{other}, {scan}"
            )
    masks: dict[str, dict[str, str]] = {}
    for name in names:
        if name.startswith("masks/"):
            folder, label = os.path.split(_without_suffix(name))
            masks.setdefault(folder.removeprefix("masks/"), {})[label] = name
            masks.setdefault(_base(name), {})[""] = name
    found = [ScanFiles(scan, masks.get(_base(scan), {})) for scan in scans]
    used = {*scans, *labels.NAMES_FILES, *(name for one in found for name in one.masks.values())}
    expected = "images/<scan>.nii.gz, .nii or .dcm, or masks/<scan>/<name> of one of them"
    return found, unused(source, [name for name in names if name not in used], expected)


def _write_scan(one: ScanFiles, reading: _Reading, folder: Folder) -> dict[str, dict[str, str]]:
    """Writes a scan's slices; returns their metadata. Of a scan that turns out to be unusable nothing stays."""
    path, options = find_file(reading.source, one.scan), reading.options
    is_nifti = one.scan.lower().endswith(NIFTI)
    patient = _patient(path, one, options)
    masks = _mask_files(one, reading)
    scan = (_read_nifti if is_nifti else _read_dicom)(path, masks, reading)
    prefix = modalities.prefix_of(scan.modality)
    start = f"{prefix}_00--{safe_name(os.path.basename(os.path.abspath(reading.source)))}--{safe_name(one.base)}--z_"
    written, files = {}, []
    try:
        for number, shown in enumerate(_named(scan.slices, path)):
            if number % options.every or not (scan.complete or any(mask.any() for mask in shown.masks.values())):
                continue
            stem = f"{start}{number:04d}"
            pictures = {
                f"masks/{stem}/{safe_name(name)}.png": mask.astype(np.uint8) * 255
                for name, mask in shown.masks.items()
                if mask.any()
            }
            for name, pixels in {**pictures, f"images/{stem}.png": shown.pixels}.items():
                files.append(name)
                folder.write(name, _png(pixels))
            written[stem] = {"modality": scan.modality, "patient": patient}
    except DataError:
        folder.discard(files)
        raise
    return written


def _mask_files(one: ScanFiles, reading: _Reading) -> dict[str, str]:
    """Real paths of a scan's masks by name; a mask without a name is a problem, unless there are names of labels.

    DataError for two of one name.
    """
    found, taken = {}, {}
    for name, file in one.masks.items():
        if not name and not reading.names:
            expected = "masks/<scan>/<name>, or a label map and labels.json"
            reading.problems.append(
                DataError(os.path.join(reading.source, file), None, "mask without a name", expected, file)
            )
            continue
        if (other := taken.setdefault(safe_name(name), file)) != file:
            raise DataError(
                os.path.join(reading.source, file),
                None,
                "two masks would share their files",
                "names that differ in letters",
                other,
            )
        found[name] = find_file(reading.source, file)
    return found


def _patient(path: str, one: ScanFiles, options: SliceOptions) -> str:
    """The scan's patient: what the option finds in its path, a hash from a DICOM header, or what the path says."""
    if not options.patient and one.scan.lower().endswith(DICOM):
        import pydicom  # only scans need it

        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except Exception as error:  # pydicom raises errors of many types on broken or unusual files
            raise DataError(path, None, "scan cannot be read", "DICOM", str(error)) from error
        for key in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID"):
            if value := str(header.get(key) or "").strip():
                return anonymous(value)
    return patient_of(one.base, options.patient, path)


def _named(slices: Iterator[Slice], path: str) -> Iterator[Slice]:
    """The slices; whatever goes wrong in making one is a DataError that names the scan."""
    try:
        yield from slices
    except DataError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise DataError(
            path, None, "scan cannot be read", "one number, or three of 8 bits, for each voxel", found
        ) from error


def _read_nifti(path: str, files: dict[str, str], reading: _Reading) -> Scan:
    values, affine = _load_nifti(path)

    def read(file: str) -> np.ndarray:
        voxels, place = _load_nifti(file)
        if voxels.shape != values.shape or not np.allclose(place, affine, atol=1e-3):
            raise DataError(file, None, "mask on another grid than its scan", f"{values.shape}", f"{voxels.shape}")
        return voxels

    masks: dict[str, np.ndarray] = {}
    for name, file in files.items():
        masks |= reading.masks_of(name, file, read)
    low, high = _limits(values, reading.options.window, path)

    def slices() -> Iterator[Slice]:
        for number in range(values.shape[2]):
            shown = {label: _axial(mask[:, :, number]) for label, mask in masks.items()}
            yield Slice(_grey(_axial(values[:, :, number]), low, high), shown)

    return Scan(reading.options.modality, slices(), not masks)


def _load_nifti(path: str) -> tuple[np.ndarray, np.ndarray]:
    """(values [x, y, z] in RAS+ orientation, affine) of a volume."""
    import nibabel  # only scans need it

    try:
        volume = nibabel.load(path)
        shape = volume.shape
        if len(shape) != 3:
            raise DataError(path, None, "not a volume of three axes", "[x, y, z]", f"{shape}")
        if np.prod(shape, dtype=np.int64) > MAX_VOXELS:
            raise DataError(path, None, "scan is too large", f"at most {MAX_VOXELS} voxels", f"{shape}")
        volume = nibabel.as_closest_canonical(volume)
        values = np.asarray(volume.dataobj)
        if values.dtype.kind not in "biuf":
            raise DataError(path, None, "voxels are no numbers", "one whole or real number each", str(values.dtype))
        return values, volume.affine
    except DataError:
        raise
    except Exception as error:  # nibabel and gzip raise errors of many types on broken files
        raise DataError(path, None, "scan cannot be read", "NIfTI", str(error)) from error


def _axial(plane: np.ndarray) -> np.ndarray:
    """[x, y] of RAS+ -> a picture: anterior up, the patient's right on the left."""
    return plane[::-1, ::-1].T


def _read_dicom(path: str, files: dict[str, str], reading: _Reading) -> Scan:
    frames, modality = _load_dicom(path, reading.options)
    if files and len(frames) > 1:
        raise DataError(path, None, "masks of a DICOM file with several frames", "one frame", str(len(frames)))
    size, masks = frames[0].shape[:2], {}
    for name, file in files.items():
        load = images.load_labels if labels.is_label_map(name, reading.names) else images.load_mask
        masks |= reading.masks_of(name, file, lambda file, load=load: load(file, size, reading.problems))
    return Scan(modality, (Slice(frame, masks) for frame in frames), not masks)


def _load_dicom(path: str, options: SliceOptions) -> tuple[np.ndarray, str]:
    """(frames uint8 [n, h, w] or [n, h, w, 3], modality) of a DICOM file."""
    import pydicom  # only scans need it
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    try:
        data = pydicom.dcmread(path)
        shape = (int(data.get("NumberOfFrames") or 1), data.Rows, data.Columns)
        if np.prod(shape, dtype=np.int64) > MAX_VOXELS:
            raise DataError(path, None, "scan is too large", f"at most {MAX_VOXELS} voxels", f"{shape}")
        word = str(data.get("Modality", ""))
        modality = _DICOM_WORDS.get(word, word) or options.modality
        if data.SamplesPerPixel == 3:
            if data.BitsAllocated != 8:
                raise DataError(path, None, "colour of another depth", "8 bits", f"{data.BitsAllocated} bits")
            return data.pixel_array.reshape(*shape, 3), modality
        values = apply_modality_lut(data.pixel_array, data)
        if options.window is None and ("WindowCenter" in data or "VOILUTSequence" in data):
            values = apply_voi_lut(values, data)
            low, high = float(values.min()), float(values.max())
        else:
            low, high = _limits(values, options.window, path)
        grey = _grey(values, low, high).reshape(shape)
        return 255 - grey if data.PhotometricInterpretation == "MONOCHROME1" else grey, modality
    except DataError:
        raise
    except Exception as error:  # pydicom raises errors of many types on broken or unusual files
        raise DataError(path, None, "scan cannot be read", "DICOM", str(error)) from error


def _limits(values: np.ndarray, window: tuple[float, float] | None, path: str) -> tuple[float, float]:
    """The values that are shown black and white. DataError when there is no window, and no value to find them by."""
    if window:
        return window[0] - window[1] / 2, window[0] + window[1] / 2
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise DataError(path, None, "scan has no value", "a finite number", "none")
    low, high = np.percentile(finite, PERCENTILES)
    return float(low), float(high)


def _grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = (np.nan_to_num(values.astype(np.float32), nan=low) - low) / max(high - low, 1e-6)
    return np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def _base(name: str) -> str:
    """A scan's or mask's path without its first folder and its suffix."""
    return _without_suffix(name.split("/", 1)[1])


def _without_suffix(name: str) -> str:
    suffix = next((end for end in NIFTI if name.lower().endswith(end)), os.path.splitext(name)[1])
    return name[: len(name) - len(suffix)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder with images/ and, if you have them, masks/")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--modality", default="", help="of scans that do not tell it, e.g. CT")
    parser.add_argument(
        "--window", type=command.window, help="centre,width in the scan's units, e.g. 40,400 for soft tissue in CT"
    )
    parser.add_argument("--every", type=int, default=1, help="take each so manieth slice")
    parser.add_argument(
        "--patient", default="", metavar="REGEX", help="finds the patient in a scan's path below images/"
    )
    arguments = vars(command.parse(parser))
    source, out = arguments.pop("source"), arguments.pop("out")
    return command.finish(lambda: make_slices(source, out, SliceOptions(**arguments)))


if __name__ == "__main__":
    sys.exit(main())

"""Slices of DICOM and NIfTI scans as a folder of images with named masks, for `write_qa`.

COMMAND
    python -m medplib_jax.datasets.slices --source scans --out data/slices --modality CT --window 40,400 --every 4
    python -m medplib_jax.datasets.write_qa --pairs data/slices --out data/slices_qa

The source holds images/<scan>.nii, .nii.gz or .dcm, in subfolders if you like, and masks/<scan>/<name> of the same grid: .nii or
.nii.gz (voxels above 0) for NIfTI, pictures for a DICOM file of one frame. NIfTI is cut into axial slices, anterior up and the
patient's right on the left. Of a scan with masks only slices that show one are kept. Nothing of a DICOM header but the modality is
written. What cannot be used is named in skipped.jsonl.
"""

import argparse
import collections
import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import find_file
from medplib_jax.datasets import modalities
from medplib_jax.datasets.command import finish
from medplib_jax.datasets.mecovqa import write_json
from medplib_jax.datasets.place import safe_name, write_bytes

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
class Options:
    """window: (centre, width) in the scan's units; None: the file's own, else `PERCENTILES`. every: takes each so manieth slice.

    modality: of scans that do not tell it, as NIfTI never does.
    """

    modality: str = ""
    window: tuple[float, float] | None = None
    every: int = 1

    def __post_init__(self):
        if self.window and self.window[1] <= 0:
            raise ValueError(f"--window: expected a width above 0, found {self.window[1]}")
        if self.every < 1:
            raise ValueError(f"--every: expected at least 1, found {self.every}")


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


def make_slices(source: str, out: str, options: Options) -> dict[str, Any]:
    """Makes the folder `out`; returns its manifest. DataError when `source` has no scan, or none of them can be used."""
    problems, metadata, scans = [], {}, 0
    names = sorted(_files_below(source, "images", NIFTI + DICOM))
    if not names:
        raise DataError(source, None, "no scans", "a folder images/ with " + ", ".join(NIFTI + DICOM), "none")
    for name in tqdm(names, desc="scans", unit="scan"):
        try:
            metadata |= _write_scan(source, name, out, options)
            scans += 1
        except DataError as error:
            problems.append(error)
    if not scans:
        raise problems[0]
    os.makedirs(out, exist_ok=True)
    write_json(os.path.join(out, "metadata.json"), metadata)
    with open(os.path.join(out, "skipped.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(problem.as_dict()) + "\n" for problem in problems)
    reasons = dict(collections.Counter(problem.what for problem in problems).most_common())
    manifest = {"scans": scans, "slices": len(metadata), "skipped": len(problems), "reasons": reasons}
    write_json(os.path.join(out, "manifest.json"), manifest)
    return manifest


def _write_scan(source: str, name: str, out: str, options: Options) -> dict[str, dict[str, str]]:
    """Writes a scan's slices; returns their metadata. The file names follow SA-Med2D-20M's, so that a scan stays in one split."""
    path = find_file(source, name)
    base = _without_suffix(os.path.relpath(name, "images"))
    files = {
        _without_suffix(os.path.basename(file)): find_file(source, file)
        for file in _files_below(source, os.path.join("masks", base), None)
    }
    scan = _read_nifti(path, files, options) if name.lower().endswith(NIFTI) else _read_dicom(path, files, options)
    prefix, written = modalities.prefix_of(scan.modality), {}
    for number, one in enumerate(scan.slices):
        if number % options.every or not (scan.complete or any(mask.any() for mask in one.masks.values())):
            continue
        stem = f"{prefix}_00--{safe_name(os.path.basename(os.path.abspath(source)))}--{safe_name(base)}--z_{number:04d}"
        for label, mask in one.masks.items():
            if mask.any():
                write_bytes(_png(mask.astype(np.uint8) * 255), out, f"masks/{stem}/{safe_name(label)}.png")
        write_bytes(_png(one.pixels), out, f"images/{stem}.png")
        written[stem] = {"modality": scan.modality}
    return written


def _read_nifti(path: str, files: dict[str, str], options: Options) -> Scan:
    values, affine = _load_nifti(path)
    masks = {}
    for label, file in files.items():
        voxels, place = _load_nifti(file)
        if voxels.shape != values.shape or not np.allclose(place, affine, atol=1e-3):
            raise DataError(file, None, "mask on another grid than its scan", f"{values.shape}", f"{voxels.shape}")
        masks[label] = voxels > 0
    low, high = _limits(values, options.window)

    def slices() -> Iterator[Slice]:
        for number in range(values.shape[2]):
            shown = {label: _axial(mask[:, :, number]) for label, mask in masks.items()}
            yield Slice(_grey(_axial(values[:, :, number]), low, high), shown)

    return Scan(options.modality, slices(), not masks)


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
        return np.asarray(volume.dataobj), volume.affine
    except DataError:
        raise
    except Exception as error:  # nibabel and gzip raise errors of many types on broken files
        raise DataError(path, None, "scan cannot be read", "NIfTI", str(error)) from error


def _axial(plane: np.ndarray) -> np.ndarray:
    """[x, y] of RAS+ -> a picture: anterior up, the patient's right on the left."""
    return plane[::-1, ::-1].T


def _read_dicom(path: str, files: dict[str, str], options: Options) -> Scan:
    frames, modality = _load_dicom(path, options)
    if files and len(frames) > 1:
        raise DataError(path, None, "masks of a DICOM file with several frames", "one frame", str(len(frames)))
    size = frames[0].shape[:2]
    masks = {label: images.load_mask(file, size).astype(bool) for label, file in files.items()}
    return Scan(modality, (Slice(frame, masks) for frame in frames), not masks)


def _load_dicom(path: str, options: Options) -> tuple[np.ndarray, str]:
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
            return data.pixel_array.reshape(*shape, 3), modality
        values = apply_modality_lut(data.pixel_array, data)
        if options.window is None and ("WindowCenter" in data or "VOILUTSequence" in data):
            values = apply_voi_lut(values, data)
            low, high = float(values.min()), float(values.max())
        else:
            low, high = _limits(values, options.window)
        grey = _grey(values, low, high).reshape(shape)
        return 255 - grey if data.PhotometricInterpretation == "MONOCHROME1" else grey, modality
    except DataError:
        raise
    except Exception as error:  # pydicom raises errors of many types on broken or unusual files
        raise DataError(path, None, "scan cannot be read", "DICOM", str(error)) from error


def _limits(values: np.ndarray, window: tuple[float, float] | None) -> tuple[float, float]:
    """The values that are shown black and white."""
    if window:
        return window[0] - window[1] / 2, window[0] + window[1] / 2
    low, high = np.percentile(values[np.isfinite(values)], PERCENTILES)
    return float(low), float(high)


def _grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = (np.nan_to_num(values.astype(np.float32), nan=low) - low) / max(high - low, 1e-6)
    return np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def _without_suffix(name: str) -> str:
    suffix = next((end for end in NIFTI if name.lower().endswith(end)), os.path.splitext(name)[1])
    return name.removesuffix(suffix) if name.endswith(suffix) else name[: -len(suffix)]


def _files_below(root: str, folder: str, suffixes: tuple[str, ...] | None) -> list[str]:
    """Files below root/folder, relative to root; all of them without `suffixes`."""
    found = []
    for path, _, files in os.walk(os.path.join(root, folder)):
        found += [
            os.path.relpath(os.path.join(path, file), root)
            for file in files
            if not suffixes or file.lower().endswith(suffixes)
        ]
    return found


def _window(text: str) -> tuple[float, float]:
    centre, width = text.split(",")
    return float(centre), float(width)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="folder with images/ and, if you have them, masks/")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--modality", default="", help="of scans that do not tell it, e.g. CT")
    parser.add_argument(
        "--window", type=_window, help="centre,width in the scan's units, e.g. 40,400 for soft tissue in CT"
    )
    parser.add_argument("--every", type=int, default=1, help="take each so manieth slice")
    arguments = vars(parser.parse_args())
    source, out = arguments.pop("source"), arguments.pop("out")
    return finish(lambda: make_slices(source, out, Options(**arguments)))


if __name__ == "__main__":
    sys.exit(main())

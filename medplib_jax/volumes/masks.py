"""Named masks of a scan from whatever holds them: mask files, label maps with names, DICOM SEG, RTSTRUCT.

All on the scan's own grid.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from medplib_jax.data.errors import DataError
from medplib_jax.volumes.dicom import Header, guarded, open_dicom
from medplib_jax.volumes.formats import read_volume_file, without_suffix
from medplib_jax.volumes.geometry import mask_on_grid
from medplib_jax.volumes.volume import LPS_TO_RAS, Volume

Labels = Mapping[str, tuple[int, ...]]  # name -> the values that belong to it
BETWEEN = 0.1  # of a step: how far from a slice a contour or segment may lie


def read_labels(path: str) -> Labels:
    """Names of a label map's values, from nnU-Net's dataset.json, {"value": name}, a table (.tsv, .csv), name=value."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        if path.lower().endswith(".json"):
            pairs = list(_json_pairs(json.loads(text)))
        elif path.lower().endswith((".tsv", ".csv")):
            pairs = list(_table_pairs(text, "\t" if path.lower().endswith(".tsv") else ","))
        else:
            lines = [line.split("#")[0].strip() for line in text.splitlines()]
            pairs = [
                (name.strip(), (int(value),)) for name, _, value in (line.partition("=") for line in lines if line)
            ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        expected = "nnU-Net's dataset.json, a table of value and name, or lines name=value"
        raise DataError(
            path, None, "names of labels cannot be read", expected, f"{type(error).__name__}: {error}"
        ) from error
    named = [(name, values) for name, values in pairs if values != (0,) and name != "background"]
    labels = dict(named)
    if len(labels) < len(named) or not labels:
        found = ", ".join(name for name, _ in named)[:200] or "none"
        raise DataError(path, None, "names of labels cannot be used", "each name once", found)
    return labels


def _json_pairs(data: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """nnU-Net's {"labels": {name: value or values}}, its older {value: name}, or {value: name or {"name": ...}}."""
    for key, value in data.get("labels", data).items():
        if isinstance(value, dict):
            yield str(value["name"]), (int(key),)
        elif str(key).isdecimal():
            yield str(value), (int(key),)
        else:
            yield str(key), tuple(int(x) for x in (value if isinstance(value, list) else [value]))


def _table_pairs(text: str, separator: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Columns value and name, by a heading that says so (as BIDS' index, name) or the first two."""
    rows = [row for row in csv.reader(text.splitlines(), delimiter=separator) if row and row[0].strip()]
    value, name = 0, 1
    if not rows[0][0].strip().isdecimal():
        heading = [cell.strip().lower() for cell in rows.pop(0)]
        value = next(heading.index(word) for word in ("value", "index", "label", "id", *heading) if word in heading)
        name = next((heading.index(word) for word in ("name", "structure") if word in heading), 1)
    for row in rows:
        yield row[name].strip(), (int(row[value]),)


def read_label_map(path: str, scan: Volume) -> np.ndarray:
    """The values of a mask file or label map (NIfTI, NRRD, MetaImage), [i, j, k] on the scan's grid."""
    volume = read_volume_file(path, without_suffix(os.path.basename(path)))
    if volume.is_colour:
        raise DataError(path, None, "mask is in colour", "one number per voxel", str(volume.values.shape))
    return mask_on_grid(path, volume.values, volume.affine, scan)


def read_dicom_masks(header: Header, scan: Volume) -> dict[str, np.ndarray]:
    """The segments of a DICOM SEG or the structures of an RTSTRUCT by name, bool on the scan's grid.

    DataError when the file cannot be read or lies beside the scan's slices.
    """
    with guarded(header.file, f"DICOM {header.word}"):
        data = open_dicom(header.file, pixels=True)
        found = _segments(data, header.file, scan) if header.word == "SEG" else _structures(data, header.file, scan)
        masks = {}
        for name, mask in found:  # two segments may have one name, as two lesions
            masks[name] = masks[name] | mask if name in masks else mask
        return masks


def _segments(data: Any, file: str, scan: Volume) -> Iterator[tuple[str, np.ndarray]]:
    kind = str(data.get("SegmentationType", "BINARY"))
    frames = data.pixel_array.reshape(int(data.get("NumberOfFrames") or 1), data.Rows, data.Columns)
    floor = float(data.get("MaximumFractionalValue", 1)) / 2 if kind == "FRACTIONAL" else 0
    places = [_frame_place(group, data, file, scan, frames[0].shape) for group in data.PerFrameFunctionalGroupsSequence]
    for segment in data.SegmentSequence:
        number, mask = int(segment.SegmentNumber), np.zeros(scan.shape, bool)
        for frame, place, group in zip(frames, places, data.PerFrameFunctionalGroupsSequence, strict=True):
            if kind == "LABELMAP":
                mask[place] |= (frame == number).T
            elif int(_group(data, group, "SegmentIdentificationSequence").ReferencedSegmentNumber) == number:
                mask[place] |= (frame > floor).T
        yield str(segment.get("SegmentLabel") or f"segment {number}"), mask


def _group(data: Any, group: Any, sequence: str) -> Any:
    """The item of a sequence that a frame, or all frames together, have."""
    return next(g for g in (group, data.SharedFunctionalGroupsSequence[0]) if sequence in g)[sequence][0]


def _frame_place(group: Any, data: Any, file: str, scan: Volume, size: tuple[int, int]) -> tuple[slice, slice, int]:
    """Where a frame [columns, rows] lies in the scan's array. DataError when its pixels are not the scan's."""
    direction = _group(data, group, "PlaneOrientationSequence").ImageOrientationPatient
    along, down = np.array(direction, np.float64).reshape(2, 3)
    rows, columns = (float(x) for x in _group(data, group, "PixelMeasuresSequence").PixelSpacing)
    position = np.array(_group(data, group, "PlanePositionSequence").ImagePositionPatient, np.float64)
    axes = LPS_TO_RAS[:3, :3] @ np.stack([along * columns, down * rows, position], axis=1)
    into = np.linalg.inv(scan.affine)
    steps, start = into[:3, :3] @ axes[:, :2], into[:3, :3] @ axes[:, 2] + into[:3, 3]
    first = np.round(start).astype(int)
    off = max(np.abs(steps - np.eye(3)[:, :2]).max() * max(size), np.abs(start - first).max())
    last = first + (size[1] - 1, size[0] - 1, 0)
    if off > BETWEEN or (first < 0).any() or (last >= scan.shape).any():
        place = f"a frame from voxel {np.round(start, 3).tolist()}, {size[1]} x {size[0]} pixels"
        raise DataError(file, None, "mask on another grid than its scan", f"frames on its {scan.shape} voxels", place)
    return slice(first[0], last[0] + 1), slice(first[1], last[1] + 1), int(first[2])


def _structures(data: Any, file: str, scan: Volume) -> Iterator[tuple[str, np.ndarray]]:
    names = {
        int(roi.ROINumber): str(roi.get("ROIName") or f"structure {roi.ROINumber}")
        for roi in data.StructureSetROISequence
    }
    into = np.linalg.inv(scan.affine)
    for roi in data.get("ROIContourSequence") or []:
        mask = np.zeros(scan.shape, bool)
        for contour in roi.get("ContourSequence") or []:
            if "CLOSED" not in str(contour.get("ContourGeometricType", "")):
                continue  # points and open lines enclose nothing
            points = np.array(contour.ContourData, np.float64).reshape(-1, 3) @ LPS_TO_RAS[:3, :3]
            voxels = points @ into[:3, :3].T + into[:3, 3]
            number = int(round(float(voxels[:, 2].mean())))
            if np.abs(voxels[:, 2] - number).max() > BETWEEN or not 0 <= number < scan.shape[2]:
                found = f"a contour at slice {voxels[:, 2].min():.3f} to {voxels[:, 2].max():.3f}"
                raise DataError(
                    file, None, "contour lies beside the scan's slices", f"slices 0 to {scan.shape[2] - 1}", found
                )
            mask[:, :, number] ^= inside(voxels[:, :2], scan.shape[:2])  # a contour within another is a hole
        yield names.get(int(roi.ReferencedROINumber), f"structure {roi.ReferencedROINumber}"), mask


def inside(outline: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """bool [columns, rows]: pixels whose centres lie in an outline float [n, 2] of (column, row), even-odd."""
    width, height = shape
    x, y = outline[:, 0], outline[:, 1]
    to_x, to_y = np.roll(x, -1), np.roll(y, -1)
    row = np.arange(height)[:, None]
    crosses = (y <= row) != (to_y <= row)
    with np.errstate(divide="ignore", invalid="ignore"):
        where = x + (row - y) * (to_x - x) / (to_y - y)
    rows, edges = np.nonzero(crosses)
    toggles = np.zeros((height, width + 1), int)
    np.add.at(toggles, (rows, np.clip(np.ceil(where[rows, edges]), 0, width).astype(int)), 1)
    return (np.cumsum(toggles, axis=1)[:, :width] % 2 == 1).T


def belongs(header: Header, data: Any, series: str, reference: str) -> bool:
    """Whether masks were made on the scan of this series; where they do not name one, on its frame of reference."""
    named = set(_named_series(data))
    return series in named if named else bool(reference) and reference == (header.reference or _rt_reference(data))


def _named_series(data: Any) -> Iterator[str]:
    for item in data.get("ReferencedSeriesSequence") or []:
        yield str(item.get("SeriesInstanceUID", ""))
    for frame in data.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            for item in study.get("RTReferencedSeriesSequence") or []:
                yield str(item.get("SeriesInstanceUID", ""))


def _rt_reference(data: Any) -> str:
    return next(
        (str(x.get("FrameOfReferenceUID", "")) for x in data.get("ReferencedFrameOfReferenceSequence") or []), ""
    )


def masks_of(masks: Iterable[Header], series: str, reference: str) -> list[Header]:
    """Those DICOM masks that were made on a series."""
    return [header for header in masks if belongs(header, open_dicom(header.file, pixels=False), series, reference)]

"""Scans in the store: received, checked, and read again to show their slices."""

import collections
import csv
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from medplib_jax.data.errors import DataError
from medplib_jax.data.rle import decode_rle
from medplib_jax.decode.scans import MODEL
from medplib_jax.serve.pictures import check_rle, describe_mask
from medplib_jax.serve.refusals import Refused, told
from medplib_jax.serve.store import Store, read_json
from medplib_jax.serve.uploads import receive, unpack
from medplib_jax.serve.volume_jobs import MAX_VOXELS, OUT, SCAN
from medplib_jax.volumes.geometry import PLANES, cut, is_sheared
from medplib_jax.volumes.pictures import Pictures, pictures
from medplib_jax.volumes.read import count_volumes, read_scan
from medplib_jax.volumes.volume import Volume
from medplib_jax.volumes.windows import Tone, parse_window
from medplib_jax.volumes.write import label_map, write_dicom_seg, write_nifti

T = TypeVar("T")
KEPT_BYTES = 2**30  # of scans in memory, but always one
KEPT_WINDOWS = 32  # of a scan


class Scans:
    """The uploaded scans of a store; the last ones that were looked at stay in memory."""

    def __init__(self, store: Store):
        self._store = store
        self._volumes: collections.OrderedDict[tuple[str, int | None], Volume] = collections.OrderedDict()
        self._tones: dict[tuple[str, int | None], dict[str, tuple[Tone, ...]]] = {}  # by window
        self._lock = threading.Lock()

    async def add(self, request: Request) -> tuple[dict[str, Any], dict[str, str]]:
        """Keeps the scan of a request: what it is, and the other fields of its form. Refused: what is no scan."""
        with self._store.add("images", request.state.client) as (name, folder, content):
            (folder / SCAN).mkdir()
            fields = await receive(request, folder / SCAN)
            found = await run_in_threadpool(self._told, lambda: _receive(folder / SCAN))
            content["info"] = {"image_id": name} | found
        return content["info"], fields

    def add_files(self, client: str, fill: Callable[[Path], None]) -> str:
        """Keeps the scan of the files that `fill` writes into a folder; its identifier."""
        with self._store.add("images", client) as (name, folder, content):
            (folder / SCAN).mkdir()
            fill(folder / SCAN)
            content["info"] = {"image_id": name} | self._told(lambda: _receive(folder / SCAN))
        return name

    def info(self, name: str, client: str, index: int | None = None) -> dict[str, Any]:
        """What an image holds, its first series or the one of this index."""
        info = self._store.entry("images", name, client)["info"]
        if index is None:
            return info
        return info | self._told(lambda: _describe(self._volume(self._store.path("images", name, client), index)))

    def remove(self, name: str, client: str) -> None:
        self._store.path("images", name, client)
        self._store.remove("images", name)

    def pictures(self, name: str, client: str, index: int | None, plane: str, window: str) -> Pictures:
        """The slices of a scan. Refused: a scan, plane or window that cannot be shown."""
        path = self._store.path("images", name, client)
        return self._told(lambda: self._shown(path, index, plane, window))

    def _shown(self, path: Path, index: int | None, plane: str, window: str) -> Pictures:
        volume = self._volume(path, index)
        tones = self._tones.setdefault((path.name, index), {})
        found = tones.get(window)  # once: other threads clear them
        if found is None:  # percentiles of a large scan take seconds
            if len(tones) >= KEPT_WINDOWS:
                tones.clear()
            found = tones[window] = pictures(volume, plane, parse_window(window) if window else None).tones
        return Pictures(volume, cut(volume, plane), found)

    @staticmethod
    def _told(make: Callable[[], T]) -> T:
        """What `make` gives. Refused with what is wrong."""
        try:
            return make()
        except DataError as error:
            raise Refused(400, told(error)) from error
        except ValueError as error:
            raise Refused(400, str(error)) from error

    def export(self, shown: Pictures, drawn: Sequence[tuple[str, int, dict]], format: str, folder: str) -> Path:
        """Writes masks of single slices (label, slice, run lengths on the picture) in the scan's own space."""
        masks = {label: np.zeros(shown.volume.shape, bool) for label, _, _ in drawn}
        for label, number, rle in drawn:
            plane = decode_rle(check_rle(rle, "masks"))
            if not 0 <= number < len(shown) or plane.shape != shown.cut.size:
                raise Refused(
                    400, f"expected a mask of {shown.cut.size} on a slice from 0 to {len(shown) - 1}", "masks"
                )
            shown.cut.reoriented(masks[label])[number] |= shown.cut.mask_on_plane(plane)
        if format == "nifti":
            path = Path(folder, "masks.nii.gz")
            write_nifti(str(path), label_map(masks, shown.volume.shape), shown.volume)
            return path
        path = Path(folder, "segmentation.dcm")
        self._told(lambda: write_dicom_seg(str(path), masks, shown.volume, MODEL))
        return path

    def masks(self, job: str, shown: Pictures, number: int) -> list[dict[str, Any]]:
        """What a finished job has found on a slice, on the pixels of its picture, with areas in mm2."""
        if not 0 <= number < len(shown):
            raise Refused(404, f"expected a slice from 0 to {len(shown) - 1}")
        out = self._store.folder("jobs", job) / OUT
        plane = shown.cut.reoriented(np.asarray(nibabel.load(out / "masks.nii.gz").dataobj))[number]
        ious = {row["structure"]: float(row["mean_predicted_iou"] or 0) for row in _table(out / "table.tsv")}
        pixel = float(np.min(shown.volume.spacing[list(shown.cut.axes[1:])])) ** 2
        told = shown.volume.located and shown.volume.measured
        found = []
        for value, structure in read_json(out / "masks.json").items():
            mask = shown.cut.mask_on_picture(plane == int(value))
            if mask.any():
                area = round(int(mask.sum()) * pixel, 2) if told else None
                found.append(describe_mask(mask, structure, ious[structure]) | {"area_mm2": area})
        return found

    def _volume(self, path: Path, index: int | None) -> Volume:
        """Read once at a time, so that many requests cost the memory of one."""
        key = (path.name, index)
        with self._lock:
            if key not in self._volumes:
                self._volumes[key] = read_scan(str(path / SCAN), index, MAX_VOXELS)
                while sum(v.values.nbytes for v in self._volumes.values()) > KEPT_BYTES and len(self._volumes) > 1:
                    self._tones.pop(self._volumes.popitem(last=False)[0], None)
            self._volumes.move_to_end(key)
            return self._volumes[key]


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _receive(folder: Path) -> dict[str, Any]:
    """What an upload holds. Refused: what cannot be read as a scan."""
    unpack(folder)
    count = count_volumes(str(folder))
    return _describe(read_scan(str(folder), 0 if count > 1 else None, MAX_VOXELS)) | {"series": count}


def _describe(scan: Volume) -> dict[str, Any]:
    turned = scan.located and not is_sheared(scan.affine)
    cuts = {plane: cut(scan, plane) for plane in (PLANES if turned else PLANES[:1])}
    return {
        "shape": list(scan.shape),
        "spacing": [round(float(step), 6) for step in scan.spacing],
        "modality": scan.modality,
        "planes": {plane: {"slices": len(found), "size": list(found.size)} for plane, found in cuts.items()},
        "notices": [told(notice) for notice in scan.notices],
    }

"""What an answered scan becomes on disk: slices as they end, then masks, a table and previews."""

import base64
import csv
import html
import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from medplib_jax.data.overlay import PALETTE, overlay
from medplib_jax.data.rle import decode_rle, encode_rle
from medplib_jax.volumes.geometry import PLANES, cut, is_sheared
from medplib_jax.volumes.pictures import Pictures
from medplib_jax.volumes.volume import Volume
from medplib_jax.volumes.write import is_dicom, label_map, write_dicom_seg, write_nifti

STORE = "slices.jsonl"
PREVIEW_SIDE = 512  # of a picture in a preview
PREVIEW_SLICES = 150  # most slices of the page, spread evenly


class SliceStore:
    """Answers about slices, one JSON line each, written as they end, so that an interruption loses none of them.

    The first line says what they are answers to. A file that begins with anything else is begun anew.
    """

    def __init__(self, folder: str, made_of: Mapping[str, Any]):
        os.makedirs(folder, exist_ok=True)
        self._path, head = os.path.join(folder, STORE), json.dumps(made_of, sort_keys=True)
        self.answers: dict[tuple[str, int], dict[str, Any]] = {}
        lines = _whole_lines(self._path)
        if lines[:1] != [head]:
            lines = [head]
        for line in lines[1:]:
            self._keep(json.loads(line))
        partial = f"{self._path}.{os.getpid()}.tmp"
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.replace(partial, self._path)
        self._file = open(self._path, "a", encoding="utf-8")

    def add(self, structure: str, number: int, answer: str, mask: np.ndarray | None, predicted_iou: float) -> None:
        line = {"structure": structure, "slice": number, "answer": answer, "predicted_iou": predicted_iou}
        line["mask"] = None if mask is None else encode_rle(mask)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._keep(line)

    def close(self) -> None:
        self._file.close()

    def _keep(self, line: dict[str, Any]) -> None:
        self.answers[line["structure"], line["slice"]] = line

    def plane(self, structure: str, number: int) -> np.ndarray | None:
        """The mask on a slice, bool [rows, columns]; None where the structure is not there."""
        mask = self.answers[structure, number]["mask"]
        return None if mask is None else decode_rle(mask)


def _whole_lines(path: str) -> list[str]:
    """The lines of a file without what an interruption left of the last one; none when it is missing."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [line[:-1] for line in file if line.endswith("\n")]


def write_results(
    out: str, scan: Volume, shown: Pictures, masks: Mapping[str, np.ndarray], ious: Mapping[str, float], model: str
) -> list[str]:
    """Writes masks.nii.gz, masks.json, table.tsv, preview.png, preview.html and, of a DICOM series, segmentation.dcm.

    masks: by structure, bool on the scan's grid. ious: mean predicted IoU over the slices with a mask. Returns the
    names of the files.
    """
    write_nifti(os.path.join(out, "masks.nii.gz"), label_map(masks, scan.shape), scan)
    _write(out, "masks.json", json.dumps({str(k): name for k, name in enumerate(masks, start=1)}, indent=1).encode())
    _write(out, "table.tsv", _table(scan, shown, masks, ious).encode())
    _write(out, "preview.png", _png(three_planes(scan, shown, masks)))
    _write(out, "preview.html", _page(scan, shown, masks).encode())
    names = ["masks.nii.gz", "masks.json", "table.tsv", "preview.png", "preview.html"]
    if is_dicom(scan) and scan.located:
        write_dicom_seg(os.path.join(out, "segmentation.dcm"), masks, scan, model)
        names.append("segmentation.dcm")
    return names


def _table(scan: Volume, shown: Pictures, masks: Mapping[str, np.ndarray], ious: Mapping[str, float]) -> str:
    """One line per structure; ml only where the file gives lengths in the patient."""
    content = io.StringIO()
    writer = csv.writer(content, delimiter="\t", lineterminator="\n")
    writer.writerow(["value", "structure", "voxels", "ml", "slices", "mean_predicted_iou"])
    voxel = abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    for value, (name, mask) in enumerate(masks.items(), start=1):
        count, slices = int(mask.sum()), int(shown.cut.reoriented(mask).any(axis=(1, 2)).sum())
        volume = f"{count * voxel:.3f}" if scan.located and scan.measured else ""
        writer.writerow([value, name, count, volume, slices, f"{ious[name]:.3f}" if count else ""])
    return content.getvalue()


def three_planes(scan: Volume, shown: Pictures, masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Axial, coronal and sagittal slices through the middle of all masks; one slice where others cannot be cut."""
    marked = np.logical_or.reduce(list(masks.values())) if masks else np.zeros(scan.shape, bool)
    place = np.argwhere(marked).mean(axis=0) if marked.any() else (np.array(scan.shape) - 1) / 2
    tiles = []
    for plane in PLANES[1:] if scan.located and not is_sheared(scan.affine) and min(scan.shape) > 1 else PLANES[:1]:
        view = Pictures(scan, cut(scan, plane), shown.tones) if plane != "acquired" else shown
        axis = view.cut.axes[0]
        number = int(round(float(place[axis])))
        number = scan.shape[axis] - 1 - number if view.cut.flips[0] else number
        tiles.append(marked_picture(view, masks, number))
    height = max(tile.shape[0] for tile in tiles)
    return np.concatenate([np.pad(t, ((0, height - t.shape[0]), (0, 4), (0, 0))) for t in tiles], axis=1)


def marked_picture(view: Pictures, masks: Mapping[str, np.ndarray], number: int) -> np.ndarray:
    """A slice under its masks, uint8 [h, w, 3], its longer side `PREVIEW_SIDE`."""
    picture = view[number]
    picture = np.repeat(picture[..., None], 3, axis=-1) if picture.ndim == 2 else picture
    scale = PREVIEW_SIDE / max(picture.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in picture.shape[1::-1])
    large = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
    drawn = [view.cut.mask_on_picture(view.cut.reoriented(mask)[number]) for mask in masks.values()]
    return overlay(large, drawn, PALETTE)


def _page(scan: Volume, shown: Pictures, masks: Mapping[str, np.ndarray]) -> str:
    """One HTML file with the slices under a slider."""
    numbers = np.unique(np.linspace(0, len(shown) - 1, min(len(shown), PREVIEW_SLICES)).round().astype(int)).tolist()
    sources = [f"data:image/jpeg;base64,{_jpeg(marked_picture(shown, masks, number))}" for number in numbers]
    legend = "".join(
        f'<li><span style="background:{PALETTE[k % len(PALETTE)]}"></span>{html.escape(name)}</li>'
        for k, name in enumerate(masks)
    )
    middle = max(
        range(len(numbers)), key=lambda k: sum(int(shown.cut.reoriented(m)[numbers[k]].sum()) for m in masks.values())
    )
    fields = {"TITLE": html.escape(scan.name), "LEGEND": legend, "LAST": str(len(numbers) - 1), "START": str(middle)}
    page = _PAGE
    for field, value in (fields | {"NUMBERS": json.dumps(numbers), "SOURCES": json.dumps(sources)}).items():
        page = page.replace(f"%{field}%", value)
    return page


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>%TITLE%</title>
<style>
body { font: 16px sans-serif; margin: 1em; background: #fff; color: #111 }
img { width: min(90vw, 80vh); image-rendering: auto; display: block }
input { width: min(90vw, 80vh) }
ul { list-style: none; padding: 0 } li { display: inline-block; margin-right: 1em }
span { display: inline-block; width: 1em; height: 1em; margin-right: .3em; vertical-align: -.1em }
</style>
<h1>%TITLE%</h1><ul>%LEGEND%</ul>
<img id="slice" alt="slice with masks">
<label>slice <output id="number"></output>
<input id="place" type="range" min="0" max="%LAST%" value="%START%"></label>
<p>Masks are drawn by a model for research; they are no diagnosis.</p>
<script>
const numbers = %NUMBERS%, sources = %SOURCES%, place = document.getElementById("place");
function show() {
  document.getElementById("slice").src = sources[place.value];
  document.getElementById("number").value = numbers[place.value];
}
place.addEventListener("input", show);
show();
</script></html>
"""


def _jpeg(pixels: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "jpeg", quality=85)
    return base64.b64encode(content.getvalue()).decode()


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def _write(folder: str, name: str, content: bytes) -> None:
    """The whole file or none of it."""
    partial = os.path.join(folder, f"{name}.{os.getpid()}.tmp")
    with open(partial, "wb") as file:
        file.write(content)
    os.replace(partial, os.path.join(folder, name))

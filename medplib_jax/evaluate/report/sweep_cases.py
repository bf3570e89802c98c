"""The cases of a sweep as its page looks at them: an index of every record of a task, and files of single cases with
picture, outlines and answers, which the page loads when they are looked at.
"""

import base64
import dataclasses
import functools
import io
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medplib_jax.data import boxes
from medplib_jax.data.errors import DataError
from medplib_jax.data.images import Blob, load_image, load_mask
from medplib_jax.data.records import find_file
from medplib_jax.data.rle import decode_rle
from medplib_jax.data.sources import Source, is_dataset, open_source
from medplib_jax.evaluate.evaluators.predictions import PredictionRow, read_rows
from medplib_jax.evaluate.kinds import TaskKind, find_kind
from medplib_jax.evaluate.kinds.refer_box import BOX_GRID
from medplib_jax.evaluate.metrics.catalogue import describe
from medplib_jax.evaluate.metrics.summary import CAPTION_COUNTS
from medplib_jax.evaluate.report.comparisons import ALL, Figure
from medplib_jax.evaluate.report.contours import box_path, outlines
from medplib_jax.evaluate.report.pictures import mark_drawing, marked_regions, plain_text
from medplib_jax.evaluate.report.sweep_load import ScoredCell, Sweep
from medplib_jax.evaluate.result import TaskEntry

FOLDER = "report_cases"
CASES = 400  # with pictures, shared out among the tasks
LEAST = 12  # of each task
SHOWN = 6  # checkpoints whose answers a case holds
LONGEST = 512  # pixels of a picture's longer side


@dataclasses.dataclass(frozen=True)
class CaseIndex:
    """What the page knows of a task's cases before one is looked at. `shown`: checkpoints, the best one first."""

    number: str
    protocol: str
    shown: tuple[str, ...]
    cases: int
    pictured: int


def write_cases(sweep: Sweep, figures: Sequence[Figure], cases: int = CASES) -> dict[str, CaseIndex]:
    """{task: index}, under the first protocol; writes FOLDER in the sweep's folder anew.

    cases: how many of all tasks together get a file of their own.
    """
    folder = sweep.workdir / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    values = {
        (figure.task, figure.protocol, figure.checkpoint): figure.value
        for figure in figures
        if figure.main and figure.modality == ALL
    }
    each = max(LEAST, cases // max(len(sweep.tasks), 1))
    found: dict[str, CaseIndex] = {}
    for task, protocol, cells in tqdm(sweep.columns, desc="cases", unit="task"):
        cells = [cell for cell in cells if cell.checkpoint not in sweep.naive]
        if task.name in found or not cells:
            continue
        best = max(cells, key=lambda cell: values.get((task.name, protocol, cell.checkpoint), -1))
        order = sorted(cells, key=lambda cell: (cell is not best, cell.checkpoint != sweep.baseline))
        number = f"{len(found):02d}"
        found[task.name] = _TaskCases(folder, number, task, protocol, order[:SHOWN]).write(each)
    return found


class _TaskCases:
    """The cases of one task under one protocol."""

    def __init__(self, folder: Path, number: str, task: TaskEntry, protocol: str, cells: Sequence[ScoredCell]):
        self.folder, self.number, self.task, self.protocol, self.cells = folder, number, task, protocol, cells
        self.kind = find_kind(task.kind, task.part)

    def write(self, count: int) -> CaseIndex:
        rows = [{row["record"]: row for row in read_rows(*cell.predictions)} for cell in self.cells]
        scores = [{record: _score(self.kind, row) for record, row in each.items()} for each in rows]
        records = sorted(set().union(*rows))
        pictured = choose(scores, {record: self._flags(rows, record) for record in records}, count)
        shown = tuple(cell.checkpoint for cell in self.cells)
        index = {
            "shown": shown,
            "score": next(
                (found[0] for row in rows[0].values() if (found := self.kind.shown_score(row["scores"]))), ""
            ),
            "records": [self._line(record, rows, scores, record in pictured) for record in records],
        }
        _write_script(self.folder / f"{self.number}.js", "index", self.number, None, index)
        for record in pictured:
            case = self._case({cell.checkpoint: each.get(record) for cell, each in zip(self.cells, rows, strict=True)})
            _write_script(self.folder / f"{self.number}-{record}.js", "case", self.number, record, case)
        return CaseIndex(self.number, self.protocol, shown, len(records), len(pictured))

    def _flags(self, rows: Sequence[Mapping[int, PredictionRow]], record: int) -> tuple[str, ...]:
        return self.kind.flags(rows[0][record]["scores"]) if record in rows[0] else ()

    def _line(self, record: int, rows, scores, pictured: bool) -> list[Any]:
        """record, modality, structure, flags, whether it has a file, and a score in percent for each checkpoint."""
        row = next(each[record] for each in rows if record in each)
        shown = [each.get(record) for each in scores]
        percents = [None if score is None else round(100 * score) for score in shown]
        flags = list(self._flags(rows, record))
        return [record, row["modality"] or "none", row.get("structure") or "", flags, int(pictured), *percents]

    def _case(self, rows: Mapping[str, PredictionRow | None]) -> dict[str, Any]:
        """What the page shows of one record; `rows` are the checkpoints' answers."""
        answers = {name: row for name, row in rows.items() if row is not None}
        first = next(iter(answers.values()))
        picture, regions, problem = _picture(self.task, first)
        size = _shrunk(picture.shape[:2])
        encoded = _encoded(picture, size, self.task.generated)
        draws = any(_shapes(row, "", size) is not None for row in answers.values())
        return {
            "picture": encoded if first["image"] else "",
            "size": [size[1], size[0]],
            "problem": problem,
            "name": first["image"][-1] if first["image"] else "",
            "question": plain_text(first["question"]),
            "expected": plain_text(first["expected"]),
            "examples": _examples(self.task, first),
            "regions": [outlines(mask, size) for mask in regions]
            + [box_path(box.corners, BOX_GRID, size) for box in boxes.read(first["question"])],
            "truth": _shapes(first, "true_", size) if draws else None,
            "extent": _extent(first),
            "area": _area(first, "true_"),
            "answers": {name: self._answer(row, size) for name, row in answers.items()},
        }

    def _answer(self, row: PredictionRow, size: tuple[int, int]) -> dict[str, Any]:
        scores = {
            describe(name).title.replace("_", " "): round(value, 4)
            for name, value in row["scores"].items()
            if name not in CAPTION_COUNTS
        }
        return {
            "text": plain_text(row["answer"]),
            "scores": scores,
            "shapes": _shapes(row, "", size),
            "area": _area(row, ""),
        }


def choose(scores: Sequence[Mapping[int, float | None]], flags: Mapping[int, Sequence[str]], count: int) -> set[int]:
    """Which records get a picture: by turns the worst of the first checkpoint, flagged ones, those that lost and gained
    most against the others, the median and the best. Equal scores go by record number.
    """
    first = {record: score for record, score in scores[0].items() if score is not None}
    ordered = sorted(first, key=lambda record: (first[record], record))
    change = {}
    for record in ordered:
        others = [other for each in scores[1:] if (other := each.get(record)) is not None]
        change[record] = first[record] - max(others, default=first[record])
    changed = sorted(ordered, key=lambda record: (change[record], record))
    from_the_middle = sorted(range(len(ordered)), key=lambda place: abs(place - len(ordered) // 2))
    queues = [
        ordered,
        [record for record, found in flags.items() if found],
        [record for record in changed if change[record] < 0],
        [record for record in changed[::-1] if change[record] > 0],
        [ordered[place] for place in from_the_middle],
        ordered[::-1],
        sorted(scores[0]),
    ]
    chosen: dict[int, None] = {}
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue) and len(chosen) < count:
                chosen[queue[turn]] = None
    return set(chosen)


def _score(kind: TaskKind, row: PredictionRow) -> float | None:
    found = kind.shown_score(row["scores"])
    return found and found[1]


def _write_script(path: Path, what: str, number: str, record: int | None, content: Mapping[str, Any]) -> None:
    """A file that a page from a disk can load, too: it hands its content to the page's function."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    path.write_text(f"loaded({json.dumps(what)},{json.dumps(number)},{json.dumps(record)},{text});\n", encoding="utf-8")


def _picture(task: TaskEntry, row: PredictionRow) -> tuple[np.ndarray, list[np.ndarray], str]:
    """The row's picture uint8 [h, w, 3], the regions that its question marks, and what is wrong.

    A report can be made where the pictures are not: then grey of the masks' shape, and why.
    """
    height, width = next((rle["size"] for rle in (*row.get("true_masks", ()), *row.get("masks", ()))), (64, 64))
    grey = np.full((height, width, 3), 90, np.uint8)
    if not row["image"]:
        return grey, [], ""
    try:
        find = _finder(task, row)
        picture = load_image(find(row["image"][-1]))
        return picture, marked_regions(row["question"], find, picture.shape[:2]), ""
    except DataError as error:
        return grey, [], f"{error.what}: {row['image'][-1]}"


def _examples(task: TaskEntry, row: PredictionRow) -> list[dict[str, Any]]:
    """The pictures that were shown before the row's with the outlines of their masks, as far as they are there."""
    find, shown = _finder(task, row), []
    for image, mask in row.get("examples", ()):
        try:
            picture = load_image(find(image))
            inside = load_mask(find(mask), picture.shape[:2]) > 0
        except DataError:
            continue  # what is wrong with the row's own picture is told
        size = _shrunk(picture.shape[:2])
        encoded = _encoded(picture, size, task.generated)
        shown.append({"picture": encoded, "size": [size[1], size[0]], "shapes": [outlines(inside, size)]})
    return shown


def _finder(task: TaskEntry, row: PredictionRow) -> Callable[[str], str | Blob]:
    """Looks up what the row's record names: below the task's root, or in the assembled dataset that carries it."""
    if is_dataset(task.file):
        return _dataset(task.file)[row["record"]].find
    return functools.partial(find_file, task.root)


@functools.lru_cache(maxsize=8)
def _dataset(name: str) -> Source:
    return open_source(name)


def _shrunk(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, LONGEST / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _encoded(picture: np.ndarray, size: tuple[int, int], drawing: bool) -> str:
    """A data address, so that a case can be saved as a picture from a page that lies on a disk."""
    shown = np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.LANCZOS))
    file = io.BytesIO()
    Image.fromarray(mark_drawing(shown) if drawing else shown).save(file, "webp", quality=80, method=2)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _extent(row: PredictionRow) -> list[float] | None:
    """[height, width] of the row's picture in mm; None where its spacing is not known."""
    if not row.get("spacing"):
        return None
    return [step * side for step, side in zip(row["spacing"], row["size"], strict=True)]


def _area(row: PredictionRow, prefix: str) -> float | None:
    """mm2 that the masks of an answer (`prefix` "true_": of the truth) cover together; None where it is not known."""
    masks = row.get(f"{prefix}masks")
    if masks is None or not row.get("spacing"):
        return None
    covered = np.logical_or.reduce([decode_rle(rle) for rle in masks]) if masks else np.zeros(1)
    return float(np.count_nonzero(covered)) * math.prod(row["spacing"])


def _shapes(row: PredictionRow, prefix: str, size: tuple[int, int]) -> list[str] | None:
    """The outlines of an answer's masks or boxes (`prefix` "true_": of the truth); None if it is about neither."""
    if f"{prefix}masks" in row:
        return [outlines(decode_rle(rle), size) for rle in row[f"{prefix}masks"]]
    if f"{prefix}boxes" not in row:
        return None
    return [box_path(box, BOX_GRID, size) for box in row[f"{prefix}boxes"]]

"""Which answers of a sweep are looked at, and their pictures: best, median and worst, false masks, and what changed
against the baseline.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medplib_jax.data.errors import DataError
from medplib_jax.data.images import Blob, load_image
from medplib_jax.data.overlay import PALETTE, outline, overlay
from medplib_jax.data.records import find_file
from medplib_jax.data.rle import decode_rle
from medplib_jax.data.sources import Source, is_dataset, open_source
from medplib_jax.evaluate.evaluators.predictions import PredictionRow, read_rows
from medplib_jax.evaluate.report.comparisons import ALL, Figure
from medplib_jax.evaluate.report.pictures import (
    REGION_COLOUR,
    THUMBNAIL,
    mark_drawing,
    mark_tokens,
    marked_regions,
    open_thumbnail,
)
from medplib_jax.evaluate.report.sweep_load import ScoredCell, Sweep
from medplib_jax.evaluate.result import TaskEntry

PER_GROUP = 3
FOLDER = "report_pictures"
BOX_GRID = 1000  # boxes in text lie on a grid of this size, stretched over the picture
# What stands for one answer: the first of these scores that it has.
SCORES = {
    "dice": "Dice",
    "closed_accuracy": "",
    "open_f1": "F1",
    "roc_accuracy": "",
    "rouge_l": "ROUGE-L",
}  # no name: right or wrong


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Answers of one task. Those of the checkpoints `shown` stand side by side; the first of them chose the records."""

    protocol: str
    shown: tuple[str, ...]
    cards: tuple[dict[str, Any], ...]


def make_galleries(sweep: Sweep, figures: Sequence[Figure]) -> dict[str, Gallery]:
    """{task: gallery}, under the first protocol.

    Writes the pictures to FOLDER in the sweep's folder, only those that are shown.
    """
    folder = sweep.workdir / FOLDER
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.webp"):
        old.unlink()
    values = {
        (figure.task, figure.protocol, figure.checkpoint): figure.value
        for figure in figures
        if figure.main and figure.modality == ALL
    }
    galleries = {}
    for task, protocol, cells in tqdm(sweep.columns, desc="pictures", unit="task"):
        if task.name in galleries:
            continue
        best = max(cells, key=lambda cell: values.get((task.name, protocol, cell.checkpoint), -1))
        baseline = [cell for cell in cells if cell.checkpoint == sweep.baseline and cell is not best]
        galleries[task.name] = _gallery(folder, f"{len(galleries):02d}", task, [best, *baseline])
    return galleries


def _gallery(folder: Path, stem: str, task: TaskEntry, cells: Sequence[ScoredCell]) -> Gallery:
    rows = [{row["record"]: row for row in read_rows(*cell.predictions)} for cell in cells]
    cards = []
    for group, records in choose(*rows).items():
        for record in records:
            answers = {
                cell.checkpoint: found[record] for cell, found in zip(cells, rows, strict=True) if record in found
            }
            cards.append(_card(folder, f"{stem}-{record}", task, group, answers))
    return Gallery(cells[0].protocol, tuple(cell.checkpoint for cell in cells), tuple(cards))


def score_of(row: PredictionRow) -> tuple[str, float] | None:
    """The name and value of the score that stands for an answer; None for a question about masks that has no target."""
    scores = row["scores"]
    if not scores.get("target", 1):
        return None
    if scores.get("boxes"):
        return "boxes met", scores["boxes_found"] / scores["boxes"]
    return next(((label, scores[name]) for name, label in SCORES.items() if name in scores), None)


def _shown(score: tuple[str, float] | None) -> str:
    if score is None:
        return ""
    name, value = score
    return f"{name} {value:.3f}" if name else "right" if value == 1 else "wrong"


def choose(
    rows: Mapping[int, PredictionRow], baseline: Mapping[int, PredictionRow] | None = None
) -> dict[str, list[int]]:
    """{group: record numbers}, each record once: best, median and worst scores, masks drawn where none belongs, and the
    largest gains and losses against `baseline`. Equal scores go by record number.
    """
    scores = {record: found[1] for record, row in rows.items() if (found := score_of(row))}
    ordered = sorted(scores, key=lambda record: (scores[record], record))
    middle = max(0, len(ordered) // 2 - PER_GROUP // 2)
    groups = {"worst": ordered[:PER_GROUP], "best": ordered[::-1][:PER_GROUP], "median": ordered[middle:][:PER_GROUP]}
    false_masks = [
        record for record, row in sorted(rows.items()) if row["scores"].get("drawn") and not row["scores"]["target"]
    ]
    groups["false mask"] = false_masks[:PER_GROUP]
    if baseline:
        before = {record: found[1] for record in scores if record in baseline and (found := score_of(baseline[record]))}
        change = sorted(before, key=lambda record: (scores[record] - before[record], record))
        groups["gained"] = [record for record in change[::-1] if scores[record] > before[record]][:PER_GROUP]
        groups["lost"] = [record for record in change if scores[record] < before[record]][:PER_GROUP]
    seen: set[int] = set()
    chosen = {}
    for name in ("best", "median", "worst", "false mask", "gained", "lost"):
        chosen[name] = [record for record in groups.get(name, ()) if record not in seen]
        seen |= set(chosen[name])
    return chosen


def _card(folder: Path, stem: str, task: TaskEntry, group: str, rows: Mapping[str, PredictionRow]) -> dict[str, Any]:
    """What the page needs of one question; `rows` are the checkpoints' answers."""
    first = next(iter(rows.values()))
    picture, problem = _picture(task, first)
    shown: list[tuple[str, np.ndarray, list[np.ndarray] | None]] = []
    if picture is not None:
        shown.append(("picture", picture, None))
    if picture is not None and (true := _shapes(first, "true_", picture)) is not None:
        shown.append(("truth", overlay(picture, true, PALETTE), true))
        for checkpoint, row in rows.items():
            drawn = _shapes(row, "", picture) or []
            shown.append((checkpoint, outline(overlay(picture, drawn, PALETTE), true), drawn))
    panels = []
    for number, (caption, pixels, shapes) in enumerate(shown):
        pixels = mark_drawing(pixels) if task.generated else pixels
        Image.fromarray(pixels).save(folder / f"{stem}-{number}.webp", quality=85, method=2)
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        panels.append({"caption": caption, "file": f"{FOLDER}/{stem}-{number}.webp", "empty": shapes == []} | size)
    answers = [
        {"checkpoint": name, "text": mark_tokens(row["answer"]), "score": _shown(score_of(row))}
        for name, row in rows.items()
    ]
    return {
        "group": group,
        "modality": first["modality"] or "none",
        "record": first["record"],
        "panels": panels,
        "problem": problem,
        "question": mark_tokens(first["question"]),
        "expected": mark_tokens(first["expected"]),
        "answers": answers,
    }


def _picture(task: TaskEntry, row: PredictionRow) -> tuple[np.ndarray | None, str]:
    """The row's picture with the region that its question marks, None if it has none.

    A report can be made where the pictures are not: then grey of the masks' shape, and why.
    """
    if not row["image"]:
        return None, ""
    try:
        find = _finder(task, row)
        path = find(row["image"][-1])
        marked = marked_regions(row["question"], find, load_image(path).shape[:2])
        return overlay(open_thumbnail(path), marked, (REGION_COLOUR,)), ""
    except DataError as error:
        height, width = next((rle["size"] for rle in (*row.get("true_masks", ()), *row.get("masks", ()))), (1, 1))
        size = [max(1, round(side * THUMBNAIL / max(height, width))) for side in (height, width)]
        return np.full((*size, 3), 90, np.uint8), f"{error.what}: {row['image'][-1]}"


def _finder(task: TaskEntry, row: PredictionRow) -> Callable[[str], str | Blob]:
    """Looks up what the row's record names: below the task's root, or in the assembled dataset that carries it."""
    if is_dataset(task.file):
        return _dataset(task.file)[row["record"]].find
    return functools.partial(find_file, task.root)


@functools.lru_cache(maxsize=8)
def _dataset(name: str) -> Source:
    return open_source(name)


def _shapes(row: PredictionRow, prefix: str, picture: np.ndarray) -> list[np.ndarray] | None:
    """The masks or boxes of an answer (`prefix` "true_": of the truth) as bool [h, w]; None if it is about neither."""
    if f"{prefix}masks" in row:
        return [decode_rle(rle) for rle in row[f"{prefix}masks"]]
    if f"{prefix}boxes" not in row:
        return None
    height, width = picture.shape[:2]
    x, y = (np.arange(size) * BOX_GRID / size for size in (width, height))
    return [((x >= x1) & (x < x2))[None] & ((y >= y1) & (y < y2))[:, None] for x1, y1, x2, y2 in row[f"{prefix}boxes"]]

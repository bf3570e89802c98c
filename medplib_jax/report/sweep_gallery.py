"""Which masks of a sweep are looked at, and their pictures: best, median and worst, false masks, and what changed against the baseline."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medplib_jax.data.errors import DataError
from medplib_jax.data.rle import decode_rle
from medplib_jax.data.sources import find_file
from medplib_jax.report.comparisons import ALL, Figure
from medplib_jax.report.pictures import PALETTE, mark_tokens, open_thumbnail, outline, overlay
from medplib_jax.report.sweep_load import Cell, Sweep, Task, read_rows

PER_GROUP = 3
FOLDER = "report_pictures"
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The pictures of one task: `shown` are the checkpoints whose masks stand side by side, the first of which chose the records."""

    task: str
    protocol: str
    shown: tuple[str, ...]
    cards: tuple[dict[str, Any], ...]


def make_galleries(sweep: Sweep, figures: Sequence[Figure]) -> dict[str, Gallery]:
    """{task: gallery} of the tasks with masks. Writes the pictures to FOLDER in the sweep's folder, only those that are shown."""
    folder = sweep.workdir / FOLDER
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.webp"):
        old.unlink()
    galleries = {}
    with_masks = {task.name: (task, cells) for task, _, cells in reversed(sweep.columns) if any("gIoU" in cell.statistics for cell in cells)}
    for task, cells in tqdm(with_masks.values(), desc="pictures", unit="task"):
        column = [figure for figure in figures if (figure.task, figure.protocol) == (task.name, cells[0].protocol)]
        values = {figure.checkpoint: figure.value for figure in column if figure.main and figure.modality == ALL}
        best = max(cells, key=lambda cell: values.get(cell.checkpoint, -1))
        baseline = [cell for cell in cells if cell.checkpoint == sweep.baseline and cell is not best]
        galleries[task.name] = _gallery(sweep.workdir, task, [best, *baseline])
    return galleries


def _gallery(workdir: Path, task: Task, cells: Sequence[Cell]) -> Gallery:
    rows = [{row["record"]: row for row in read_rows(cell.predictions)} for cell in cells]
    cards = []
    for group, records in choose(*rows).items():
        for record in records:
            cards.append(_card(workdir, task, group, [found.get(record) for found in rows], [cell.checkpoint for cell in cells]))
    return Gallery(task.name, cells[0].protocol, tuple(cell.checkpoint for cell in cells), tuple(cards))


def choose(rows: Mapping[int, Row], baseline: Mapping[int, Row] | None = None) -> dict[str, list[int]]:
    """{group: record numbers}, each record once: best, median and worst Dice of questions with a target, masks drawn where none belongs, and
    the largest gains and losses against `baseline`. Equal scores go by record number."""
    target = sorted((record for record, row in rows.items() if row["scores"]["target"]), key=lambda record: (rows[record]["scores"]["dice"], record))
    middle = max(0, len(target) // 2 - PER_GROUP // 2)
    groups = {"worst": target[:PER_GROUP], "best": target[::-1][:PER_GROUP], "median": target[middle:][:PER_GROUP]}
    groups["false mask"] = [record for record, row in sorted(rows.items()) if row["scores"]["drawn"] and not row["scores"]["target"]][:PER_GROUP]
    if baseline:
        change = {record: rows[record]["scores"]["dice"] - baseline[record]["scores"]["dice"] for record in target if record in baseline}
        by_change = sorted(change, key=lambda record: (change[record], record))
        groups["gained"] = [record for record in by_change[::-1] if change[record] > 0][:PER_GROUP]
        groups["lost"] = [record for record in by_change if change[record] < 0][:PER_GROUP]
    seen: set[int] = set()
    chosen = {}
    for name in ("best", "median", "worst", "false mask", "gained", "lost"):
        chosen[name] = [record for record in groups.get(name, ()) if record not in seen]
        seen |= set(chosen[name])
    return chosen


def _card(workdir: Path, task: Task, group: str, rows: Sequence[Row | None], checkpoints: Sequence[str]) -> dict[str, Any]:
    """What the page needs of one question; `rows` are the checkpoints' answers, the first of which is there."""
    first = rows[0]
    true = [decode_rle(rle) for rle in first["true_masks"]]
    picture, problem = _picture(task, first)
    save = _saver(workdir, f"{re.sub('[^A-Za-z0-9.-]+', '_', task.name)}-{first['record']}")
    panels = [save("picture", picture), save("truth", overlay(picture, true, PALETTE)) | {"empty": not true}]
    answers = []
    for checkpoint, row in zip(checkpoints, rows, strict=True):
        if row is None:
            continue
        masks = [decode_rle(rle) for rle in row["masks"]]
        score = row["scores"]["dice"] if row["scores"]["target"] else None
        panels.append(save(checkpoint, outline(overlay(picture, masks, PALETTE), true)) | {"empty": not masks, "score": score})
        answers.append((checkpoint, mark_tokens(row["answer"])))
    return {
        "group": group, "modality": first["modality"], "record": first["record"], "panels": panels, "problem": problem,
        "question": mark_tokens(first["question"]), "expected": mark_tokens(first["expected"]), "answers": answers,
    }  # fmt: skip


def _picture(task: Task, row: Row) -> tuple[np.ndarray, str]:
    """The row's picture, or grey of the masks' shape and why: a report can be made where the pictures are not."""
    try:
        return open_thumbnail(find_file(task.root, row["image"][-1])), ""
    except DataError as error:
        height, width = (row["true_masks"] or row["masks"] or [{"size": (1, 1)}])[0]["size"]
        scale = 224 / max(height, width)
        return np.full((max(1, round(height * scale)), max(1, round(width * scale)), 3), 90, np.uint8), f"{error.what}: {row['image'][-1]}"


def _saver(workdir: Path, stem: str) -> Callable[[str, np.ndarray], dict[str, Any]]:
    count = 0

    def save(caption: str, pixels: np.ndarray) -> dict[str, Any]:
        nonlocal count
        name = f"{stem}-{count}.webp"
        count += 1
        Image.fromarray(pixels).save(workdir / FOLDER / name, quality=85, method=2)
        return {"caption": caption, "file": f"{FOLDER}/{name}", "height": pixels.shape[0], "width": pixels.shape[1], "empty": False, "score": None}

    return save

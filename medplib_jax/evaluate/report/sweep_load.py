"""Reads a sweep's folder: sweep.json and the rows of its predictions."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tqdm import tqdm

from medplib_jax.evaluate.metrics import PROTOCOLS, Statistic, statistics, values
from medplib_jax.evaluate.metrics.catalogue import describe

FORMAT = ("checkpoints", "tasks", "cells")
_FIELDS = (
    "record",
    "image",
    "modality",
    "answer",
    "expected",
    "scores",
)  # masks and routers of a million rows would fill the memory


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One row of the tables. `run` groups the checkpoints of one training, in which `step` orders them."""

    name: str
    path: str = ""
    run: str = ""
    step: int | None = None
    kind: str = "jax"
    quantize: str = ""  # int8: it answered with weights of 8 bits


@dataclasses.dataclass(frozen=True)
class Task:
    """One annotation file. `root`: where the rows' image paths start; `source`: where the data are from, if known."""

    name: str
    kind: str
    file: str
    records: int
    root: str = ""
    part: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One checkpoint's answers to one task under one protocol. `records`, `images` and `modalities` are those of the rows, in their order."""

    checkpoint: str
    task: str
    protocol: str
    max_new_tokens: int | None
    mask_threshold: float | None
    predictions: tuple[Path, ...]
    skipped: tuple[dict[str, Any], ...]
    router: dict[str, Any] | None
    records: np.ndarray
    images: tuple[str, ...]
    modalities: np.ndarray
    statistics: dict[str, Statistic]
    notes: tuple[str, ...]  # what was left out, and where rows and sweep.json disagree

    @property
    def key(self) -> tuple[str, str, str]:
        return self.checkpoint, self.task, self.protocol


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All that was evaluated. `baseline` is the checkpoint that the others are compared with."""

    workdir: Path
    baseline: str | None
    checkpoints: tuple[Checkpoint, ...]
    tasks: tuple[Task, ...]
    cells: tuple[Cell, ...]

    @property
    def protocols(self) -> tuple[str, ...]:
        """Those that were run."""
        return tuple(protocol for protocol in PROTOCOLS if any(cell.protocol == protocol for cell in self.cells))

    def column(self, task: str, protocol: str) -> list[Cell]:
        """The cells of one task and protocol in the order of the checkpoints."""
        order = {checkpoint.name: number for number, checkpoint in enumerate(self.checkpoints)}
        return sorted(
            (cell for cell in self.cells if (cell.task, cell.protocol) == (task, protocol)),
            key=lambda cell: order[cell.checkpoint],
        )

    @property
    def columns(self) -> list[tuple[Task, str, list[Cell]]]:
        """Every task and protocol that has cells, with them."""
        pairs = (
            (task, protocol, self.column(task.name, protocol)) for task in self.tasks for protocol in self.protocols
        )
        return [(task, protocol, cells) for task, protocol, cells in pairs if cells]


def load_sweep(workdir: str | Path) -> Sweep:
    """Everything in a sweep's folder. Raises ValueError when sweep.json lacks a part, names an unknown baseline,
    checkpoint or task, or a line cannot be read.
    """
    workdir = Path(workdir)
    file = workdir / "sweep.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    missing = [name for name in FORMAT if name not in raw]
    if missing:
        raise ValueError(f"{file}: expected {', '.join(FORMAT)}, {', '.join(missing)} not found")
    checkpoints = tuple(_known(Checkpoint, entry) for entry in raw["checkpoints"])
    tasks = tuple(_known(Task, entry) for entry in raw["tasks"])
    baseline = raw.get("baseline")
    names = [checkpoint.name for checkpoint in checkpoints]
    if baseline is not None and baseline not in names:
        raise ValueError(f"{file}: baseline {baseline!r} is not one of the checkpoints {names}")
    for cell in raw["cells"]:
        if cell["checkpoint"] not in names or cell["task"] not in [task.name for task in tasks]:
            raise ValueError(
                f"{file}: a cell of {cell['checkpoint']!r} on {cell['task']!r}, one of which is not listed"
            )
    cells = tuple(_load_cell(workdir, entry) for entry in tqdm(raw["cells"], desc="reading predictions", unit="cell"))
    return Sweep(workdir, baseline, checkpoints, tasks, tuple(cell for cell in cells if cell.statistics))


def _known(kind, entry):
    """A dataclass of the entry's fields that it has; fields of a later version are left out."""
    return kind(**{field.name: entry[field.name] for field in dataclasses.fields(kind) if field.name in entry})


def _load_cell(workdir: Path, entry: dict[str, Any]) -> Cell:
    paths = tuple(workdir / name for name in entry["predictions"])
    rows = read_rows(paths, _FIELDS)
    found = statistics(rows, entry["protocol"]) if rows else {}
    return Cell(
        checkpoint=entry["checkpoint"],
        task=entry["task"],
        protocol=entry["protocol"],
        max_new_tokens=entry.get("max_new_tokens"),
        mask_threshold=entry.get("mask_threshold"),
        predictions=paths,
        skipped=tuple(entry.get("skipped", ())),
        router=entry.get("router"),
        records=np.array([row["record"] for row in rows], int),
        images=tuple("|".join(row["image"]) or f"record {row['record']}" for row in rows),
        modalities=np.array([row["modality"] or "none" for row in rows]),
        statistics=found,
        notes=(*_left_out(entry), *_disagreements(entry, rows, values(found))),
    )


def _left_out(entry) -> Iterator[str]:
    for metric, why in entry.get("left_out", {}).items():
        yield f"{entry['task']}: {describe(metric).label} is left out: {why}"


def _disagreements(entry, rows, found) -> Iterator[str]:
    place = f"{entry['checkpoint']} on {entry['task']} ({entry['protocol']})"
    if len(rows) != entry["records"]:
        yield f"{place}: {len(rows)} rows on disk, sweep.json counts {entry['records']}; the figures here are of the rows"
    for name, value in found.items():
        if name in entry["metrics"] and abs(entry["metrics"][name] - value) > 1e-6:
            yield f"{place}: {name} of the rows is {value:.6f}, sweep.json says {entry['metrics'][name]:.6f}"


def read_rows(paths: Sequence[Path], fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The scored rows of a cell's files, sorted by record, with those `fields` alone if any are given; headers and skipped records are left out.
    A record's scores may stand in several files.

    Raises ValueError for a line that cannot be read.
    """
    rows = {}
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                row = _parse(line, f"{path}, line {number}")
                if row.get("record") in rows:
                    rows[row["record"]]["scores"] |= row["scores"]
                elif "scores" in row:
                    rows[row["record"]] = {name: row[name] for name in fields} if fields else row
    return [rows[record] for record in sorted(rows)]


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        return orjson.loads(line)  # a sweep has a million lines, and json takes three times as long
    except ValueError:
        try:
            return json.loads(line)  # NaN is not JSON, but Python writes it
        except ValueError as error:
            raise ValueError(f"{place}: not JSON ({error})") from error

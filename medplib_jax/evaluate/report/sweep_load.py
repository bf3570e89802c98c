"""Reads a sweep's folder: sweep.json and the rows of its predictions."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medplib_jax.evaluate.evaluators.predictions import PredictionRow, read_rows
from medplib_jax.evaluate.kinds import TaskKind, find_kind
from medplib_jax.evaluate.metrics import PROTOCOLS, Statistic, values
from medplib_jax.evaluate.metrics.catalogue import Metric, describe, register_own
from medplib_jax.evaluate.result import (
    NAIVE,
    CellEntry,
    CheckpointEntry,
    LeftOut,
    MetricEntry,
    RunEntry,
    TaskEntry,
    read_result,
)

STRUCTURE = "structure: "  # begins the names of parts that are no modality
_FIELDS = (
    "record",
    "image",
    "modality",
    "patient",
    "structure",
    "answer",
    "expected",
    "scores",
)  # masks and routers of a million rows would fill the memory


@dataclasses.dataclass(frozen=True)
class ScoredCell:
    """A cell of sweep.json (`entry`) with the scores of its answers.

    `records`, `images` and `modalities` are those of the rows, in their order.
    """

    entry: CellEntry
    predictions: tuple[Path, ...]
    records: np.ndarray
    images: tuple[str, ...]
    modalities: np.ndarray
    patients: tuple[str, ...]  # "" where not known
    structures: np.ndarray  # what each question is about, "" where not known
    statistics: dict[str, Statistic]
    notes: tuple[str, ...]  # what was left out, and where rows and sweep.json disagree

    @functools.cached_property
    def groups(self) -> tuple[str, ...]:
        """What is resampled: each row's patient where known, else its image. Answers about one are not independent."""
        rows = zip(self.patients, self.images, strict=True)
        return tuple(f"patient {patient}" if patient else image for patient, image in rows)

    def part(self, name: str) -> np.ndarray:
        """bool [N], the rows of a modality, or of a structure where `name` begins with STRUCTURE."""
        if name.startswith(STRUCTURE):
            return self.structures == name.removeprefix(STRUCTURE)
        return self.modalities == name

    @property
    def parts(self) -> list[str]:
        """The names of all modalities and structures of its rows."""
        structures = [f"{STRUCTURE}{name}" for name in sorted(set(self.structures.tolist()) - {""})]
        return sorted(set(self.modalities.tolist())) + structures

    @property
    def checkpoint(self) -> str:
        return self.entry.checkpoint

    @property
    def task(self) -> str:
        return self.entry.task

    @property
    def protocol(self) -> str:
        return self.entry.protocol


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All that was evaluated. `baseline` is the checkpoint that the others are compared with."""

    workdir: Path
    baseline: str | None
    checkpoints: tuple[CheckpointEntry, ...]
    tasks: tuple[TaskEntry, ...]
    cells: tuple[ScoredCell, ...]
    left_out: tuple[LeftOut, ...] = ()
    own_metrics: tuple[MetricEntry, ...] = ()
    runs: tuple[RunEntry, ...] = ()

    @functools.cached_property
    def naive(self) -> frozenset[str]:
        """The names of those that answer without a model."""
        return frozenset(entry.name for entry in self.checkpoints if entry.kind == NAIVE)

    @property
    def protocols(self) -> tuple[str, ...]:
        """Those that were run."""
        return tuple(protocol for protocol in PROTOCOLS if protocol in {cell.protocol for cell in self.cells})

    def column(self, task: str, protocol: str) -> list[ScoredCell]:
        """The cells of one task and protocol in the order of the checkpoints."""
        order = {checkpoint.name: number for number, checkpoint in enumerate(self.checkpoints)}
        return sorted(
            (cell for cell in self.cells if (cell.task, cell.protocol) == (task, protocol)),
            key=lambda cell: order[cell.checkpoint],
        )

    @property
    def columns(self) -> list[tuple[TaskEntry, str, list[ScoredCell]]]:
        """Every task and protocol that has cells, with them."""
        pairs = (
            (task, protocol, self.column(task.name, protocol)) for task in self.tasks for protocol in self.protocols
        )
        return [(task, protocol, cells) for task, protocol, cells in pairs if cells]


def load_sweep(workdir: str | Path) -> Sweep:
    """Everything in a sweep's folder. Raises what `read_result` raises, and ValueError when a line cannot be read."""
    workdir = Path(workdir)
    result = read_result(workdir)
    for own in result.metrics:
        register_own(own.name, Metric(own.label, own.meaning, own.better, own.by_modality, own.unit))
    kinds = {task.name: find_kind(task.kind, task.part) for task in result.tasks}
    cells = tuple(
        _load_cell(workdir, entry, kinds[entry.task])
        for entry in tqdm(result.cells, desc="reading predictions", unit="cell")
    )
    scored = tuple(cell for cell in cells if values(cell.statistics))
    return Sweep(
        workdir, result.baseline, result.checkpoints, result.tasks, scored, result.left_out, result.metrics, result.runs
    )


def _load_cell(workdir: Path, entry: CellEntry, kind: TaskKind) -> ScoredCell:
    paths = tuple(workdir / name for name in entry.predictions)
    rows = read_rows(*paths, fields=(*_FIELDS, *kind.fields))
    found = kind.statistics(rows, entry.protocol) if rows else {}
    return ScoredCell(
        entry,
        paths,
        records=np.array([row["record"] for row in rows], int),
        images=tuple("|".join(row["image"]) or f"record {row['record']}" for row in rows),
        modalities=np.array([row["modality"] or "none" for row in rows]),
        patients=tuple(row["patient"] or "" for row in rows),
        structures=np.array([row["structure"] or "" for row in rows]),
        statistics=found,
        notes=(*_cut_off(entry), *_left_out(entry), *_disagreements(entry, rows, values(found))),
    )


def _cut_off(entry: CellEntry) -> Iterator[str]:
    if entry.max_new_tokens is None:  # answers without a model
        return
    if entry.cut_off is None:
        yield (
            f"{entry.checkpoint} on {entry.task}: how many answers were cut off after {entry.max_new_tokens} tokens is "
            "unknown, because their lines do not say; to know it, ask again in another workdir"
        )
    elif entry.cut_off:
        yield (
            f"{entry.checkpoint} on {entry.task}: {entry.cut_off} of {entry.records} answers were cut off after "
            f"{entry.max_new_tokens} tokens and are scored as they are; max_new_tokens says how long they may be"
        )


def _left_out(entry: CellEntry) -> Iterator[str]:
    for metric, why in entry.left_out.items():
        yield f"{entry.task}: {describe(metric).label} is left out: {why}"


def _disagreements(entry: CellEntry, rows: Sequence[PredictionRow], found: Mapping[str, float]) -> Iterator[str]:
    place = f"{entry.checkpoint} on {entry.task} ({entry.protocol})"
    if len(rows) != entry.records:
        yield f"{place}: {len(rows)} rows on disk, sweep.json counts {entry.records}; the figures here are of the rows"
    for name, value in found.items():
        if name in entry.metrics and abs(entry.metrics[name] - value) > 1e-6:
            yield f"{place}: {name} of the rows is {value:.6f}, sweep.json says {entry.metrics[name]:.6f}"

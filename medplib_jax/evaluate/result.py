"""sweep.json: every figure of a sweep. This is its one schema: the sweep writes it, the report reads it."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from medplib_jax.parallel.lock import folder_lock

RESULT, LOCK = "sweep.json", ".sweep.lock"
NAIVE = "naive"  # the kind of checkpoints that answer without a model
LOCK_SECONDS = 120.0  # a run holds the lock for as long as it writes one file


@dataclasses.dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint that was asked. `run` names its training run, in which `step` orders the checkpoints."""

    name: str
    path: str = ""  # as it was asked for
    run: str = ""
    step: int | None = None
    kind: str = "jax"  # torch: converted PyTorch weights, naive: an answer without a model (`kinds.naive`)
    quantize: str = ""  # what had 8 bits while it answered, see `decode.layout`
    weights: str = ""  # what it is by its content (`checkpoint.step_digest`)

    @property
    def key(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """An annotation file that was asked."""

    name: str
    kind: str  # of `evaluate.kinds`
    file: str
    records: int
    root: str = ""  # folder where the paths of images and masks start
    part: str = ""  # of a kind that has parts
    source: str = ""  # where the data are from, if known
    content: str = ""  # SHA-256 of the annotation file
    data: str = ""  # of every record and what it names (`data.sources.digest`), of datasets, too
    examples: str = ""  # the training file whose majority and mean box the answers without a model are
    generated: bool = False  # its pictures are drawings, not images of patients

    @property
    def key(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class CellEntry:
    """One checkpoint's answers to one task under one protocol."""

    checkpoint: str
    task: str
    protocol: str
    predictions: tuple[str, ...]  # files of answers, relative to the workdir
    records: int  # answered
    metrics: dict[str, float]  # "mDice", "mDice/<modality>", "mDice/modality_mean"
    max_new_tokens: int | None = None
    mask_threshold: float | None = None
    cut_off: int | None = None  # answers that took all of max_new_tokens, and may lack their end; None: unknown
    skipped: tuple[dict[str, Any], ...] = ()  # records that could not be used (`DataError.as_dict`)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)  # metric -> why it was not computed
    router: dict[str, Any] | None = None  # see `evaluators.router.summarise`

    @property
    def key(self) -> tuple[str, str, str]:
        return self.checkpoint, self.task, self.protocol


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A checkpoint, folder or task that was asked for and has no cells.

    `failed`: it should have some, so that the sweep did not succeed.
    """

    what: str
    why: str
    failed: bool = False

    @property
    def key(self) -> str:
        return self.what

    def __str__(self) -> str:
        return f"{self.what} is left out: {self.why}"


@dataclasses.dataclass(frozen=True)
class MetricEntry:
    """A metric of the user's (`own.metric`), as reports explain it; `file` and `content` (SHA-256): where from."""

    name: str
    label: str
    meaning: str
    better: str = "higher"
    by_modality: bool = True
    unit: str = "%"
    file: str = ""
    content: str = ""

    @property
    def key(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class RunEntry:
    """One command that evaluated: when, by what and on what."""

    date: str
    command: str
    commit: str
    versions: dict[str, str]
    machine: str
    devices: str

    @property
    def key(self) -> str:
        return f"{self.date} {self.command}"


AnyEntry = TypeVar("AnyEntry", CheckpointEntry, TaskEntry, CellEntry, LeftOut, MetricEntry, RunEntry)


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The content of sweep.json. `baseline` names the checkpoint that the report compares the others with."""

    baseline: str | None = None
    checkpoints: tuple[CheckpointEntry, ...] = ()
    tasks: tuple[TaskEntry, ...] = ()
    cells: tuple[CellEntry, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    metrics: tuple[MetricEntry, ...] = ()  # of the user's
    runs: tuple[RunEntry, ...] = ()

    @property
    def of_models(self) -> tuple[CellEntry, ...]:
        """The cells of checkpoints, without the answers that need no model (`rescore`)."""
        naive = {entry.name for entry in self.checkpoints if entry.kind == NAIVE}
        return tuple(cell for cell in self.cells if cell.checkpoint not in naive)


def read_result(workdir: Path) -> SweepResult:
    """sweep.json of a sweep's workdir. Fields of a later version are left out.

    Raises FileNotFoundError where there is none, ValueError when a part or field is missing, or a cell or the baseline
    names a checkpoint or task that is not listed.
    """
    file = workdir / RESULT
    raw = json.loads(file.read_text(encoding="utf-8"))
    missing = [part for part in ("checkpoints", "tasks", "cells") if part not in raw]
    if missing:
        raise ValueError(f"{file}: expected checkpoints, tasks and cells, {', '.join(missing)} not found")
    try:
        result = SweepResult(
            raw.get("baseline"),
            tuple(_entry(CheckpointEntry, entry) for entry in raw["checkpoints"]),
            tuple(_entry(TaskEntry, entry) for entry in raw["tasks"]),
            tuple(_entry(CellEntry, entry) for entry in raw["cells"]),
            tuple(_entry(LeftOut, entry) for entry in raw.get("left_out", ())),
            tuple(_entry(MetricEntry, entry) for entry in raw.get("metrics", ())),
            tuple(_entry(RunEntry, entry) for entry in raw.get("runs", ())),
        )
    except TypeError as error:  # says which field is missing
        raise ValueError(f"{file}: {error}") from error
    _check_names(file, result)
    return result


def _entry(kind: type[AnyEntry], raw: dict[str, Any]) -> AnyEntry:
    values: dict[str, Any] = {field.name: raw[field.name] for field in dataclasses.fields(kind) if field.name in raw}
    lists: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return kind(**values | lists)


def _check_names(file: Path, result: SweepResult) -> None:
    checkpoints, tasks = ([entry.name for entry in entries] for entries in (result.checkpoints, result.tasks))
    if result.baseline is not None and result.baseline not in checkpoints:
        raise ValueError(f"{file}: baseline {result.baseline!r} is not one of the checkpoints {checkpoints}")
    for cell in result.cells:
        if cell.checkpoint not in checkpoints or cell.task not in tasks:
            raise ValueError(f"{file}: a cell of {cell.checkpoint!r} on {cell.task!r}, one of which is not listed")


def update_result(workdir: Path, change: Callable[[SweepResult], SweepResult]) -> SweepResult:
    """Changes sweep.json under a lock, so that sweeps that run side by side in one workdir keep each other's cells.

    Returns the new content.
    """
    with folder_lock(workdir / LOCK, wait_seconds=LOCK_SECONDS):
        file = workdir / RESULT
        result = change(read_result(workdir) if file.exists() else SweepResult())
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
    return result


def merge(before: Iterable[AnyEntry], new: Iterable[AnyEntry], order: Sequence[Any]) -> tuple[AnyEntry, ...]:
    """The entries of earlier sweeps and, behind them in the `order` of their keys, those of this one; a new entry
    replaces one of its key.
    """
    entries = {entry.key: entry for entry in (*before, *new)}
    planned = set(order)
    return (
        *(entries[key] for key in entries if key not in planned),
        *(entries[key] for key in order if key in entries),
    )

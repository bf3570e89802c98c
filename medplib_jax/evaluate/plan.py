"""What a sweep is going to ask: cells of a checkpoint, a task and a protocol, each cut into shards of records."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.evaluate.checkpoints import SweepCheckpoint, find_checkpoints
from medplib_jax.evaluate.evaluators import captions, reference
from medplib_jax.evaluate.evaluators.predictions import PredictionRow, read_lines
from medplib_jax.evaluate.kinds import find_kind
from medplib_jax.evaluate.result import RESULT, LeftOut, read_result
from medplib_jax.evaluate.tasks import SweepTask, find_tasks

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """How answers of one checkpoint are made in one protocol."""

    protocol: str
    template: str
    unpad: str
    max_new_tokens: int
    mask_threshold: float

    @classmethod
    def of(cls, config: SweepConfig, experiment: ExperimentConfig, protocol: str) -> "AnswerSettings":
        max_new_tokens = config.max_new_tokens or experiment.eval.max_new_tokens
        if protocol == "reference":
            template = reference.TEMPLATE if experiment.model.draws_masks else reference.TEMPLATE_WITH_BOXES
            return cls(protocol, template, reference.UNPAD, max_new_tokens, reference.MASK_THRESHOLD)
        threshold = config.mask_threshold or experiment.eval.mask_threshold
        return cls(protocol, experiment.data.template, experiment.model.mask.unpad, max_new_tokens, threshold)


@dataclasses.dataclass(frozen=True)
class PlannedCell:
    """One task put to one checkpoint in one protocol."""

    checkpoint: SweepCheckpoint
    task: SweepTask
    settings: AnswerSettings
    shard_size: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.checkpoint.name, self.task.name, self.settings.protocol

    def __str__(self) -> str:
        return " ".join(self.key)

    @property
    def header(self) -> dict[str, Any]:
        """What the lines of its files are made from: predictions with another header belong to another sweep."""
        made_from = {
            "task": self.task.name,
            "kind": self.task.kind,
            "data": self.task.digest,
            "checkpoint": self.checkpoint.name,
            "step": self.checkpoint.step,
            "weights": self.checkpoint.digest,
            "shard": self.shard_size,
        }
        quantize = {"quantize": self.checkpoint.quantize} if self.checkpoint.quantize else {}
        kind = find_kind(self.task.kind, self.task.config.part)
        scoring = {"scoring": kind.scoring} if kind.scoring > 1 else {}
        return made_from | quantize | scoring | dataclasses.asdict(self.settings)

    @property
    def folder(self) -> Path:
        return Path("predictions", self.checkpoint.name, self.settings.protocol)

    @property
    def lock(self) -> Path:
        """The lock of whoever answers it, below the workdir."""
        return self.folder / f".{self.task.name}.lock"

    def shards(self) -> dict[Path, tuple[int, ...]]:
        """{path below the workdir: its records}."""
        shards: dict[Path, list[int]] = {}
        for record in self.task.records:
            path = self.folder / f"{self.task.name}.{record // self.shard_size:05d}.jsonl"
            shards.setdefault(path, []).append(record)
        return {path: tuple(records) for path, records in shards.items()}

    @property
    def caption_files(self) -> dict[captions.CaptionProgram, Path]:
        """{program that scores its captions: its file below the workdir}; none for other tasks."""
        return {
            program: self.folder / f"{self.task.name}.{program.name}.jsonl"
            for program in captions.PROGRAMS
            if self.task.config.part in program.parts
        }

    def lines(self, workdir: Path) -> list[PredictionRow] | None:
        """What the files say of each record, in their order; None while a record has no line."""
        lines = [line for path in self.shards() for line in read_lines(workdir / path, self.header)]
        by_record = {line["record"]: line for line in lines}
        if not by_record.keys() >= set(self.task.records):
            return None
        return [by_record[record] for record in self.task.records]


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """All that a sweep asks, and what it leaves out of what was asked for."""

    config: SweepConfig
    workdir: Path
    checkpoints: tuple[SweepCheckpoint, ...]
    experiments: dict[str, ExperimentConfig]  # by the checkpoint's name
    cells: tuple[PlannedCell, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def asked(self) -> list[str]:
        """Everything that was asked for, as `LeftOut.what` names it."""
        tasks = dict.fromkeys(f"task {cell.task.name}" for cell in self.cells)
        return [*(left.what for left in self.left_out), *(one.name for one in self.checkpoints), *tasks]

    def of(self, checkpoint: SweepCheckpoint) -> list[PlannedCell]:
        return [cell for cell in self.cells if cell.checkpoint == checkpoint]


def plan_sweep(config: SweepConfig, workdir: Path) -> SweepPlan:
    """Finds the checkpoints and tasks of a sweep; nothing is written.

    Raises FileNotFoundError for checkpoints that are not there, ValueError for tasks that are not, for a baseline that
    is no checkpoint, for slots and refill that do not fit, and for predictions that were made from something else;
    DataError for a bad record unless `on_error` is skip.
    """
    checkpoints, unusable = find_checkpoints(config.checkpoints, config.steps, workdir / "converted", config.quantize)
    tasks, absent = find_tasks(config.selected, config.limit, config.on_error, config.missing)
    if "reference" in config.protocols and any(task.kind == "icl" for task in tasks):
        raise ValueError("an icl task has no protocol 'reference': the original loses the examples' pictures")
    experiments = {checkpoint.name: checkpoint.experiment() for checkpoint in checkpoints}
    for experiment in experiments.values():
        slots_of(config, experiment)
    cells = tuple(
        PlannedCell(checkpoint, task, AnswerSettings.of(config, experiments[checkpoint.name], protocol), config.shard)
        for checkpoint in checkpoints
        for task in tasks
        for protocol in config.protocols
    )
    _check_baseline(config.baseline, workdir, [checkpoint.name for checkpoint in checkpoints])
    return SweepPlan(config, workdir, tuple(checkpoints), experiments, cells, (*unusable, *absent))


def slots_of(config: SweepConfig, experiment: ExperimentConfig) -> tuple[int, int]:
    """(slots, refill): answers in the making, and prompts that are run at a time.

    ValueError for more prompts than slots.
    """
    slots = config.slots or experiment.eval.batch_size
    refill = config.refill or max(1, slots // 2)
    if refill > slots:
        raise ValueError(f"refill {refill} exceeds the {slots} slots: expected at most as many prompts as slots")
    return slots, refill


def _check_baseline(baseline: str, workdir: Path, planned: list[str]) -> None:
    if not baseline:
        return
    before = read_result(workdir).checkpoints if (workdir / RESULT).exists() else ()
    names = [*(entry.name for entry in before), *planned]
    if baseline not in names:
        raise ValueError(f"baseline {baseline!r} is not one of the checkpoints {names}")

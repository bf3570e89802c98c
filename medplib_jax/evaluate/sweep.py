"""The engine of evaluation: checkpoints x tasks x protocols, each cut into shards of records that all processes share
out.

A process holds the model on its own devices and takes whole shards. Nothing is exchanged while answers are made, and a
record's line is the same whoever makes it. `<workdir>/predictions/<checkpoint>/<protocol>/<task>.<shard>.jsonl` holds
the lines; what has a line is not asked again. When all are there, captions are scored (`evaluators/captions.py`), and
process 0 writes `<workdir>/sweep.json` (`result.py`).
"""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from medplib_jax.config.model import ModelConfig
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.answering import answer_cell, load_model
from medplib_jax.evaluate.checkpoints import SweepCheckpoint
from medplib_jax.evaluate.evaluators import captions, router
from medplib_jax.evaluate.evaluators.predictions import SKIPPED, PredictionRow, count_cut_off
from medplib_jax.evaluate.kinds import find_kind
from medplib_jax.evaluate.plan import PlannedCell, SweepPlan, plan_sweep
from medplib_jax.evaluate.result import CellEntry, LeftOut, SweepResult, merge, read_result, update_result
from medplib_jax.parallel.lock import FolderInUse, folder_lock
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.processes import of_every_process, of_process_0, require_shared, wait_for_others

log = logging.getLogger(__name__)


class IncompleteSweep(RuntimeError):
    """Cells that were planned are not there."""


def run_sweep(config: SweepConfig, workdir: str | os.PathLike) -> SweepResult:
    """Answers what has no line yet and returns what `sweep.json` holds; cells of earlier sweeps in the same workdir
    stay in it.

    A checkpoint that cannot be loaded is named in `left_out`, and the others are asked. Raises what `plan_sweep`
    raises, ValueError for a workdir that not all processes see, and IncompleteSweep when another sweep in this workdir
    still answers a cell.
    """
    workdir = Path(workdir).absolute()
    require_shared(workdir)
    return answer_plan(plan_sweep(config, workdir))


def answer_plan(plan: SweepPlan) -> SweepResult:
    """The second half of `run_sweep`, which writes."""
    unfinished = {cell.checkpoint.name for cell in plan.cells if cell.lines(plan.workdir) is None}
    wait_for_others("planned")  # nobody writes before all have seen what is there
    ledger = Ledger(plan)
    mesh = make_mesh(plan.config.mesh, jax.local_devices())
    in_use: dict[tuple[str, str, str], str] = {}
    for checkpoint in plan.checkpoints:
        if checkpoint.name in unfinished:
            in_use |= _answer_checkpoint(checkpoint, plan, mesh, ledger)
        for cell in plan.of(checkpoint):
            if not cell.caption_files:
                ledger.add(cell, {})
    wait_for_others("answered")
    why_not = score_captions(plan.cells, plan.workdir)
    for cell in plan.cells:  # to which other processes have contributed since
        ledger.add(cell, why_not)
    problem = of_process_0("complete", ledger.close(in_use))
    if problem:
        raise IncompleteSweep(problem)
    return read_result(plan.workdir)


def _answer_checkpoint(
    checkpoint: SweepCheckpoint, plan: SweepPlan, mesh: Mesh, ledger: "Ledger"
) -> dict[tuple[str, str, str], str]:
    """Answers this process's shards of a checkpoint's cells.

    Returns the keys of cells that another sweep is answering, and what its lock says.
    """
    loaded, problem, in_use = None, "", {}
    try:
        loaded = load_model(checkpoint, plan.experiments[checkpoint.name], mesh, plan.config.sharding)
    except Exception as error:  # whatever Orbax and TensorStore raise for files that are not what they were
        problem = f"{type(error).__name__}: {error}"
    problem = next(filter(None, of_every_process(f"loaded/{checkpoint.name}", problem)), "")
    if loaded is None or problem:
        ledger.leave_out(checkpoint, problem)
        return {}
    with contextlib.ExitStack() as locks:
        for turn, cell in enumerate(plan.cells):
            if cell.checkpoint != checkpoint:
                continue
            if why := _lock(cell, plan.workdir, locks):
                in_use[cell.key] = why
                continue
            answer_cell(cell, loaded, plan.workdir, turn, plan.config)
            if not cell.caption_files:
                ledger.add(cell, {})
        wait_for_others(f"answered/{checkpoint.name}")  # the locks are process 0's, and hold for all
    return in_use


def _lock(cell: PlannedCell, workdir: Path, locks: contextlib.ExitStack) -> str:
    """Takes the lock of a cell until `locks` are closed; returns who holds it, empty if this sweep does."""
    why = ""
    if jax.process_index() == 0:
        try:
            locks.enter_context(folder_lock(workdir / cell.lock))
        except FolderInUse as error:
            why = str(error)
    return of_process_0(f"lock/{cell}", why)


def score_captions(cells: Sequence[PlannedCell], workdir: Path) -> dict[str, str]:
    """Scores the cells with captions, as far as they are answered, shared out over the processes; {program's name: why
    it cannot run}.
    """
    why_not = {}
    for program in captions.PROGRAMS:
        mine = _run_program(program, cells, workdir)
        why = next(filter(None, of_every_process(f"captions/{program.name}", mine)), "")
        if why:
            why_not[program.name] = why
            if jax.process_index() == 0:
                log.warning("%s is left out: %s", metrics.describe(program.metrics[0]).label, why)
    return why_not


def _run_program(program: captions.CaptionProgram, cells: Sequence[PlannedCell], workdir: Path) -> str:
    """Scores this process's share of the cells; returns why the program cannot run, "" if it can."""
    captioned = [cell for cell in cells if program in cell.caption_files]
    for cell in captioned[jax.process_index() :: jax.process_count()]:
        answered = [line for line in cell.lines(workdir) or () if SKIPPED not in line]
        try:
            program.write(workdir / cell.caption_files[program], cell.header, answered)
        except metrics.MissingExtra as error:
            return str(error)
    return ""


class Ledger:
    """What process 0 writes into sweep.json, cell by cell; the other processes' does nothing.

    Planned cells stand in the plan's order, whoever finished first.
    """

    def __init__(self, plan: SweepPlan):
        self._plan, self._added = plan, set[tuple[str, str, str]]()
        self._left_out = list(plan.left_out)
        self._checkpoints = {checkpoint.name: checkpoint.entry() for checkpoint in plan.checkpoints}
        self._tasks = {cell.task.name: cell.task.entry() for cell in plan.cells}

    def leave_out(self, checkpoint: SweepCheckpoint, why: str) -> None:
        """Notes that a checkpoint could not be loaded."""
        self._left_out.append(LeftOut(checkpoint.name, why, failed=True))
        log.error("%s", self._left_out[-1])

    def add(self, cell: PlannedCell, why_not: Mapping[str, str]) -> None:
        """Writes the metrics of a cell, if all its lines are there. `why_not`: see `score_captions`."""
        if jax.process_index() > 0 or cell.key in self._added:
            return
        lines = cell.lines(self._plan.workdir)
        if lines is None:
            return
        self._added.add(cell.key)
        model = self._plan.experiments[cell.checkpoint.name].model
        self._write([summarise(cell, lines, self._plan.workdir, model, why_not)])

    def close(self, in_use: dict[tuple[str, str, str], str]) -> str:
        """Writes what was left out.

        Returns why cells are missing, empty if none is but those of checkpoints that were left out.
        """
        if jax.process_index() > 0:
            return ""
        self._write([])
        gone = {left.what for left in self._left_out}
        missing = [
            cell for cell in self._plan.cells if cell.key not in self._added and cell.checkpoint.name not in gone
        ]
        if not missing:
            return ""
        why = in_use.get(missing[0].key, "answers are missing")
        return f"{len(missing)} of {len(self._plan.cells)} cells are not complete, first {missing[0]}: {why}"

    def _write(self, cells: list[CellEntry]) -> None:
        checkpoints = [self._checkpoints[name] for name in dict.fromkeys(cell.checkpoint for cell in cells)]
        tasks = [self._tasks[name] for name in dict.fromkeys(cell.task for cell in cells)]
        asked = self._plan.asked

        def change(before: SweepResult) -> SweepResult:
            baseline = self._plan.config.baseline or before.baseline
            merged = merge(before.checkpoints, checkpoints, list(self._checkpoints))
            return SweepResult(
                baseline if baseline in [entry.name for entry in merged] else None,
                merged,
                merge(before.tasks, tasks, list(self._tasks)),
                merge(before.cells, cells, [cell.key for cell in self._plan.cells]),
                merge([left for left in before.left_out if left.key not in asked], self._left_out, asked),
                before.metrics,
                before.runs,
            )

        update_result(self._plan.workdir, change)


def summarise(
    cell: PlannedCell, lines: Sequence[PredictionRow], workdir: Path, model: ModelConfig, why_not: Mapping[str, str]
) -> CellEntry:
    """The metrics of a cell from its lines, and from the files of its captions' programs."""
    rows, files, left_out = [line for line in lines if SKIPPED not in line], list(cell.shards()), {}
    for program, file in cell.caption_files.items() if rows else ():
        scored = captions.with_scores(workdir / file, cell.header, rows)
        if scored is None:
            left_out |= dict.fromkeys(program.metrics, why_not.get(program.name, ""))
        else:
            rows, files = scored, [*files, file]
    values = {}
    if rows:
        found = find_kind(cell.task.kind, cell.task.config.part).statistics(rows, cell.settings.protocol)
        values = metrics.by_modality(found, [row["modality"] for row in rows])
    return CellEntry(
        cell.checkpoint.name,
        cell.task.name,
        cell.settings.protocol,
        tuple(str(path) for path in files),
        len(rows),
        values,
        cell.settings.max_new_tokens,
        cell.settings.mask_threshold,
        count_cut_off(rows),
        tuple(line[SKIPPED] for line in lines if SKIPPED in line),
        left_out,
        router.summarise(rows, model) if model.moe_layers and rows else None,
    )

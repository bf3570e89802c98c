"""Two checkpoints of sweeps side by side: which records changed, how, with pictures; and gates for continuous
integration.

COMMAND
    python -m medplib_jax.evaluate.compare runs/new runs/old --out runs/difference \\
        --fail-if "grounding.mdice < baseline - 0.01"

Each side is a sweep's folder, or FOLDER@CHECKPOINT where it has several. `--out` gets a report in which the second side
is the baseline, and changed.csv with a line for each answer whose score changed. `--fail-if TASK.METRIC OPERATOR VALUE`
(several may be given; VALUE is a number, or `baseline` with a number added or subtracted; TASK a name or a kind) ends
the command with 1 where it holds.
"""

import argparse
import csv
import dataclasses
import operator
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medplib_jax.evaluate.evaluators.predictions import PredictionRow, read_rows
from medplib_jax.evaluate.kinds import find_kind
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.result import (
    NAIVE,
    RESULT,
    CellEntry,
    CheckpointEntry,
    SweepResult,
    TaskEntry,
    merge,
    read_result,
    update_result,
)

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_NUMBER = r"\s*(?:\d+\.?\d*|\.\d+)"
_VALUE = rf"(?:(baseline)\s*([+-]{_NUMBER})?|([+-]?{_NUMBER}))"
_GATE = re.compile(rf"\s*(\S+\.\S+?)\s*(<=|>=|<|>)\s*{_VALUE}\s*")


@dataclasses.dataclass(frozen=True)
class Side:
    """One checkpoint of a sweep's folder."""

    workdir: Path
    result: SweepResult
    checkpoint: CheckpointEntry

    @classmethod
    def of(cls, text: str) -> "Side":
        """FOLDER or FOLDER@CHECKPOINT. ValueError where the checkpoint is not there, or is one of several."""
        folder, _, name = text.partition("@")
        result = read_result(Path(folder))
        models = [entry for entry in result.checkpoints if entry.kind != NAIVE]
        wanted = [entry for entry in models if entry.name == name] if name else models
        if len(wanted) != 1:
            names = ", ".join(entry.name for entry in models)
            raise ValueError(f"{text}: expected FOLDER@CHECKPOINT with one of {names or 'no checkpoint'}")
        return cls(Path(folder).absolute(), result, wanted[0])

    def cells(self, name: str, out: Path) -> list[CellEntry]:
        """Its cells under another checkpoint's name, their files as seen from `out`."""
        return [
            dataclasses.replace(
                cell,
                checkpoint=name,
                predictions=tuple(os.path.relpath(self.workdir / path, out) for path in cell.predictions),
            )
            for cell in self.result.cells
            if cell.checkpoint == self.checkpoint.name
        ]

    def tasks(self) -> dict[str, TaskEntry]:
        asked = {cell.task for cell in self.result.cells if cell.checkpoint == self.checkpoint.name}
        return {task.name: task for task in self.result.tasks if task.name in asked}


def compare_runs(new: Side, old: Side, out: Path) -> SweepResult:
    """Writes sweep.json, report and changed.csv of the two sides below `out`.

    ValueError where they have no task in common, one whose data differ, or an own metric of two files; and where `out`
    is the folder of a sweep.
    """
    out = out.absolute()
    names = _distinct(new, old)
    common = _common_tasks(new.tasks(), old.tasks())
    _check_metrics(new.result, old.result)
    _check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    sides = [(new, names[0]), (old, names[1])]
    cells = [
        cell for side, name in sides for cell in side.cells(name, out) if cell.task in {task.name for task in common}
    ]
    found = SweepResult(
        names[1],
        tuple(dataclasses.replace(side.checkpoint, name=name) for side, name in sides),
        tuple(common),
        tuple(cells),
        metrics=merge(old.result.metrics, new.result.metrics, [entry.key for entry in new.result.metrics]),
        runs=merge(old.result.runs, new.result.runs, ()),
    )
    update_result(out, lambda before: found)
    write_sweep_report(out)
    with open(out / "changed.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["task", "protocol", "record", "score", *_CHANGED])
        writer.writeheader()
        writer.writerows(changes(out, found))
    return found


_CHANGED = ("before", "after", "question", "expected", "answer_before", "answer_after")


def _distinct(new: Side, old: Side) -> tuple[str, str]:
    if new.checkpoint.name != old.checkpoint.name:
        return new.checkpoint.name, old.checkpoint.name
    if (new.workdir, new.checkpoint) == (old.workdir, old.checkpoint):
        raise ValueError(f"both sides are {new.checkpoint.name} of {new.workdir}")
    return f"{new.checkpoint.name} (new)", f"{old.checkpoint.name} (old)"


def _common_tasks(new: dict[str, TaskEntry], old: dict[str, TaskEntry]) -> list[TaskEntry]:
    common = [task for name, task in new.items() if name in old]
    if not common:
        raise ValueError(f"no task in common: {', '.join(new) or 'none'} and {', '.join(old) or 'none'}")
    for task in common:
        other = old[task.name]
        if (task.content, task.data) != (other.content, other.data):
            raise ValueError(
                f"task {task.name}: the annotation files or what they name differ ({task.file}, {other.file})"
            )
    return common


def _check_metrics(new: SweepResult, old: SweepResult) -> None:
    """Refuses a metric of the user's by which the sides were scored in two ways."""
    others = {entry.name: entry for entry in old.metrics}
    for entry in new.metrics:
        other = others.get(entry.name, entry)
        if other.content != entry.content:
            raise ValueError(
                f"metric {entry.name}: scored by two files ({entry.file}, {other.file}); rescore both sweeps by one"
            )


def _check_out(out: Path) -> None:
    """Refuses to write over the figures of a sweep: those of a comparison are of predictions elsewhere."""
    cells = read_result(out).of_models if (out / RESULT).exists() else ()
    if any(path.startswith("predictions/") for cell in cells for path in cell.predictions):
        raise ValueError(f"{out}: expected a folder for the comparison alone, found a sweep")


def changes(out: Path, result: SweepResult) -> Iterator[dict[str, Any]]:
    """Every record of the first checkpoint whose score is another one than the baseline's, the largest loss first."""
    kinds = {task.name: find_kind(task.kind, task.part) for task in result.tasks}
    cells = {cell.key: cell for cell in result.cells}
    for cell in result.cells:
        other = cells.get((result.baseline or "", cell.task, cell.protocol))
        if cell.checkpoint == result.baseline or other is None:
            continue
        after, before = ({row["record"]: row for row in _rows(out, one)} for one in (cell, other))
        score_of = kinds[cell.task].shown_score
        lines = [
            _change(cell, before[record], row, score_of)
            for record, row in after.items()
            if record in before and score_of(row["scores"]) != score_of(before[record]["scores"])
        ]
        yield from sorted(lines, key=lambda line: (line["after"] or 0) - (line["before"] or 0))


def _rows(out: Path, cell: CellEntry) -> list[PredictionRow]:
    fields = ("record", "scores", "question", "expected", "answer")
    return read_rows(*(out / path for path in cell.predictions), fields=fields)


def _change(cell: CellEntry, before: PredictionRow, after: PredictionRow, score_of) -> dict[str, Any]:
    scores = [score_of(row["scores"]) or (None, None) for row in (before, after)]
    line = {"task": cell.task, "protocol": cell.protocol, "record": after["record"]}
    line |= {"score": scores[1][0] or scores[0][0] or "right", "before": scores[0][1], "after": scores[1][1]}
    line |= {name: after[name] for name in ("question", "expected")}
    return line | {"answer_before": before["answer"], "answer_after": after["answer"]}


@dataclasses.dataclass(frozen=True)
class Gate:
    """A condition on one figure under which the comparison fails."""

    text: str
    figure: str  # TASK.METRIC, both of which may have dots
    operator: str
    of_baseline: bool
    number: float

    @classmethod
    def of(cls, text: str) -> "Gate":
        match = _GATE.fullmatch(text)
        if match is None:
            raise ValueError(f"--fail-if {text!r}: expected TASK.METRIC < NUMBER or TASK.METRIC < baseline - NUMBER")
        number = (match[4] or match[5] or "0").replace(" ", "")
        return cls(text, match[1], match[2], bool(match[3]), float(number))

    def check(self, result: SweepResult) -> list[str]:
        """A line for each protocol in which it holds.

        ValueError for a task or metric that is not there, and for a baseline that answered other records.
        """
        task, metric = self._find(result.tasks)
        cells = [cell for cell in result.cells if cell.task == task]
        baseline = {cell.protocol: cell for cell in cells if cell.checkpoint == result.baseline}
        found = []
        for cell in cells:
            if cell.checkpoint == result.baseline:
                continue
            value, limit = self._value(cell, metric), self.number
            if self.of_baseline:
                limit += self._value(self._counterpart(cell, baseline), metric)
            if _OPERATORS[self.operator](value, limit):
                found.append(f"{self.text}: {value:.4f} {self.operator} {limit:.4f} ({cell.protocol})")
        return found

    def _find(self, tasks: Sequence[TaskEntry]) -> tuple[str, str]:
        """The task, by its name or else its kind, and the metric."""
        dots = [place for place, character in enumerate(self.figure) if character == "."]
        splits = [(self.figure[:dot], self.figure[dot + 1 :]) for dot in dots]
        named = [(one.name, metric) for name, metric in splits for one in tasks if one.name.lower() == name.lower()]
        named = named or [(one.name, metric) for kind, metric in splits for one in tasks if one.kind == kind]
        if len(named) != 1:
            names = ", ".join(f"{task.name} ({task.kind})" for task in tasks)
            raise ValueError(f"--fail-if {self.text!r}: expected one task {splits[0][0]}, there are {names}")
        return named[0]

    def _counterpart(self, cell: CellEntry, baseline: dict[str, CellEntry]) -> CellEntry:
        """The baseline's cell of the same protocol and records."""
        if cell.protocol not in baseline:
            raise ValueError(f"--fail-if {self.text!r}: the baseline was not asked under protocol {cell.protocol}")
        other = baseline[cell.protocol]
        answered = [(one.records, {error["record"] for error in one.skipped}) for one in (cell, other)]
        if answered[0] != answered[1]:
            raise ValueError(
                f"--fail-if {self.text!r}: {cell.checkpoint} and {other.checkpoint} answered different records of "
                f"{cell.task} ({cell.records} and {other.records}), so that their figures cannot be compared"
            )
        return other

    def _value(self, cell: CellEntry, metric: str) -> float:
        by_name = {name.lower(): value for name, value in cell.metrics.items()}
        if metric.lower() not in by_name:
            names = ", ".join(name for name in cell.metrics if "/" not in name)
            raise ValueError(f"--fail-if {self.text!r}: {cell.checkpoint} on {cell.task} has {names}")
        return by_name[metric.lower()]


def summary(out: Path, result: SweepResult) -> Iterator[str]:
    """A line for each task and protocol of both sides: how many answers got better and worse."""
    lines = [line for line in changes(out, result) if None not in (line["before"], line["after"])]
    asked = {cell.key[1:] for cell in result.cells if cell.checkpoint == result.baseline}
    for cell in result.cells:
        if cell.checkpoint == result.baseline or cell.key[1:] not in asked:
            continue
        mine = [line for line in lines if (line["task"], line["protocol"]) == cell.key[1:]]
        worse = sum(line["after"] < line["before"] for line in mine)
        better = f"{len(mine) - worse} answers better, {worse} worse"
        yield f"{cell.task}: {better}, of {cell.records:,} records ({cell.protocol})"


def run(new: str, old: str, out: Path, conditions: Sequence[str]) -> int:
    gates = [Gate.of(text) for text in conditions]
    result = compare_runs(Side.of(new), Side.of(old), out)
    print("\n".join(summary(out, result)))
    print(f"Report: {out / 'report.html'}")
    failed = [line for gate in gates for line in gate.check(result)]
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failed))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("new", help="folder of a sweep, or FOLDER@CHECKPOINT")
    parser.add_argument("old", help="what it is compared with")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--fail-if", action="append", default=[], help="TASK.METRIC < baseline - NUMBER")
    arguments = parser.parse_args()
    try:
        sys.exit(run(arguments.new, arguments.old, arguments.out, arguments.fail_if))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

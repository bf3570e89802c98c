"""What a sweep's lines tell without the model: the user's own metrics, and answers without a model to compare with.

COMMAND
    python -m medplib_jax.evaluate.rescore --workdir runs/sweep --metrics my_metrics.py

Works on the folder of any sweep, also where checkpoints and pictures are gone, and writes its report anew. Scores of
own metrics stand in `<task>.own.jsonl` beside the answers and are made again each time.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import MASK, Record
from medplib_jax.data.rle import decode_rle, encode_rle
from medplib_jax.data.sources import open_source
from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.predictions import PredictionRow, count_cut_off, read_lines, read_rows
from medplib_jax.evaluate.kinds import Answer, TaskKind, find_kind
from medplib_jax.evaluate.kinds.naive import Example, Guess, box_of
from medplib_jax.evaluate.kinds.refer_box import BOX_GRID
from medplib_jax.evaluate.own import MetricFailed, OwnMetric, load_metrics
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.result import (
    NAIVE,
    CellEntry,
    CheckpointEntry,
    SweepResult,
    TaskEntry,
    merge,
    read_result,
    update_result,
)

log = logging.getLogger(__name__)

OWN_SUFFIX, EXAMPLES = ".own.jsonl", 2_000
_KEPT = ("record", "image", "modality", "patient", "structure", "question", "expected", "answer_type")
_KEPT += ("spacing", "size")  # of masks, where known


def rescore(workdir: str | Path, own: Sequence[OwnMetric] = ()) -> SweepResult:
    """Adds the answers without a model, and the scores of own metrics, to a sweep's folder; returns its result.

    Raises what `read_result` raises, ValueError for a line that cannot be read, and MetricFailed for a metric that
    cannot be used.
    """
    workdir = Path(workdir)
    first = read_result(workdir)
    counted = _count_cut_off(workdir, first)
    found = _add_own(workdir, _add_naive(workdir, counted), own)  # takes minutes: others may write meanwhile
    read, scored = ({cell.key: cell for cell in result.cells} for result in (first, found))
    naive = [entry for entry in found.checkpoints if entry.kind == NAIVE]
    guesses = [cell for cell in found.cells if cell.checkpoint in {entry.name for entry in naive}]

    def change(before: SweepResult) -> SweepResult:
        models = [entry for entry in before.checkpoints if entry.kind != NAIVE]
        same = {cell.key for cell in before.cells if read.get(cell.key) == cell}
        cells = [scored[cell.key] if cell.key in same else cell for cell in before.of_models]
        return dataclasses.replace(
            before,
            checkpoints=(*models, *naive),
            cells=(*cells, *guesses),
            metrics=merge(before.metrics, found.metrics, [entry.key for entry in found.metrics]),
        )

    return update_result(workdir, change)


def _count_cut_off(workdir: Path, result: SweepResult) -> SweepResult:
    """The result with what the lines say of answers that were cut off; a warning names the cells where some do not."""

    def counted(cell: CellEntry) -> CellEntry:
        rows = read_rows(*(workdir / name for name in cell.predictions), fields=("scores", "cut_off"))
        count = count_cut_off(rows)
        if count is None:
            log.warning(
                "%s on %s: how many answers were cut off is unknown: lines do not say", cell.checkpoint, cell.task
            )
        return dataclasses.replace(cell, cut_off=count)

    models = {cell.key for cell in result.of_models}
    return dataclasses.replace(
        result, cells=tuple(counted(cell) if cell.key in models else cell for cell in result.cells)
    )


def _add_own(workdir: Path, result: SweepResult, own: Sequence[OwnMetric]) -> SweepResult:
    if not own:
        return result
    tasks = {task.name: task for task in result.tasks}
    cells = tuple(
        _own_cell(workdir, cell, tasks[cell.task], own) for cell in tqdm(result.cells, desc="own metrics", unit="cell")
    )
    entries = [metric.entry() for metric in own]
    found = merge(result.metrics, entries, [entry.key for entry in entries])
    return dataclasses.replace(result, cells=cells, metrics=found)


def _own_cell(workdir: Path, cell: CellEntry, task: TaskEntry, own: Sequence[OwnMetric]) -> CellEntry:
    """The cell with a file of own scores beside its answers; those of earlier own metrics stay while the answers do."""
    answers = tuple(name for name in cell.predictions if not name.endswith(OWN_SUFFIX))
    path = workdir / Path(answers[0]).parent / f"{cell.task}{OWN_SUFFIX}" if answers else None
    wanted = [metric for metric in own if not metric.kinds or task.kind in metric.kinds]
    if path is None or not wanted:
        return cell
    place = {"checkpoint": cell.checkpoint, "task": cell.task, "kind": task.kind, "protocol": cell.protocol}
    rows = read_rows(*(workdir / name for name in answers))
    _check_free([metric.name for metric in wanted], rows)
    header = {"task": cell.task, "protocol": cell.protocol, "made_from": _digest(rows)}
    earlier = {line["record"]: line["scores"] for line in _made_before(path, header)}
    lines = []
    for row in rows:
        scores = {metric.name: metric(row, place) for metric in wanted}
        kept = {name: value for name, value in earlier.get(row["record"], {}).items() if name not in scores}
        lines.append({"record": row["record"], "scores": kept | {k: v for k, v in scores.items() if v is not None}})
    _write(path, header, lines)
    names = (*answers, str(path.relative_to(workdir)))
    scored = [row | {"scores": row["scores"] | line["scores"]} for row, line in zip(rows, lines, strict=True)]
    return dataclasses.replace(cell, predictions=names, metrics=_metrics(scored, task, cell.protocol))


def _check_free(names: Sequence[str], rows: Sequence[PredictionRow]) -> None:
    taken = {name for row in rows for name in row["scores"]}.intersection(names)
    if taken:
        raise MetricFailed(f"metric {min(taken)}: the answers have a score of that name; give yours another name")


def _metrics(rows: Sequence[PredictionRow], task: TaskEntry, protocol: str) -> dict[str, float]:
    found = find_kind(task.kind, task.part).statistics(rows, protocol)
    return metrics.by_modality(found, [row["modality"] for row in rows])


def _add_naive(workdir: Path, result: SweepResult) -> SweepResult:
    """One more checkpoint for each way of answering without a model; made again where the answered records changed."""
    answered: dict[tuple[str, str], CellEntry] = {}  # for each task and protocol the cell with the most records
    for cell in result.of_models:
        most = answered.get((cell.task, cell.protocol))
        if cell.records and (most is None or cell.records > most.records):
            answered[cell.task, cell.protocol] = cell
    checkpoints: dict[str, CheckpointEntry] = {}
    cells, tasks = [], {task.name: task for task in result.tasks}
    for (name, protocol), cell in tqdm(answered.items(), desc="answers without a model", unit="task"):
        rows = read_rows(*(workdir / path for path in cell.predictions if not path.endswith(OWN_SUFFIX)))
        if not rows:  # the files of its answers are gone
            continue
        kind, task = find_kind(tasks[name].kind, tasks[name].part), tasks[name]
        examples = _examples(task, rows)
        if not examples:
            continue
        guesses = kind.naive(examples)
        checkpoints |= {guess: CheckpointEntry(guess, run="no model", kind=NAIVE) for guess in guesses}
        cells += _naive_cells(workdir, guesses, rows, task, kind, protocol)
    models = [entry for entry in result.checkpoints if entry.kind != NAIVE]
    return dataclasses.replace(result, checkpoints=(*models, *checkpoints.values()), cells=(*result.of_models, *cells))


def _naive_cells(
    workdir: Path,
    guesses: Mapping[str, Guess],
    rows: Sequence[PredictionRow],
    task: TaskEntry,
    kind: TaskKind,
    protocol: str,
) -> list[CellEntry]:
    about = [kind.name, kind.part, kind.scoring, _content(task.examples)]
    kept = {*_KEPT, *kind.fields, "true_masks"} - {"masks"}
    facts = ({name: value for name, value in row.items() if name in kept} for row in rows)
    header = {"task": task.name, "protocol": protocol, "made_from": _digest((about, *facts))}
    paths = {name: Path("predictions", re.sub(r"\W", "_", name), protocol, f"{task.name}.jsonl") for name in guesses}
    lines = {name: _made_before(workdir / path, header | {"naive": name}) for name, path in paths.items()}
    missing = [name for name in guesses if len(lines[name]) != len(rows)]
    made = [_naive_rows(row, [guesses[name] for name in missing], kind, protocol) for row in _with_sizes(rows)]
    for name, found in zip(missing, zip(*made, strict=True), strict=True):
        lines[name] = list(found)
        _write(workdir / paths[name], header | {"naive": name}, found)
    return [
        CellEntry(name, task.name, protocol, (str(path),), len(rows), _metrics(lines[name], task, protocol), cut_off=0)
        for name, path in paths.items()
    ]


def _with_sizes(rows: Sequence[PredictionRow]) -> list[PredictionRow]:
    """Slices of volumes with the `size` of masks in them, which those without a mask do not tell by themselves."""
    known = {
        row["volume"]["name"]: mask["size"]
        for row in rows
        if row.get("volume")
        for mask in (*row.get("masks", ()), *row.get("true_masks", ()))
    }
    size_of = lambda volume: known.get(volume["name"], volume["size"])
    return [row | {"size": size_of(row["volume"])} if row.get("volume") else row for row in rows]


def _digest(facts: Iterable[Any]) -> str:
    total = hashlib.sha256()
    for fact in facts:
        total.update(json.dumps(fact, sort_keys=True).encode() + b"\n")
    return total.hexdigest()


def _made_before(path: Path, header: PredictionRow) -> list[PredictionRow]:
    """The lines of a file that is there; none of one that was made from something else."""
    try:
        return read_lines(path, header)
    except ValueError:
        return []


def _content(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else file


def _naive_rows(row: PredictionRow, guesses: Sequence[Guess], kind: TaskKind, protocol: str) -> list[PredictionRow]:
    """The lines of the guesses about one record."""
    true = tuple(decode_rle(rle) for rle in row.get("true_masks", ())) if guesses else ()
    truth, lines = Answer("", row["expected"], row["answer_type"], (), true, row.get("spacing")), []
    for guess in guesses:
        answer = guess(row, truth)
        line = {name: row[name] for name in (*_KEPT, *kind.fields) if name in row} | {"answer": answer.text}
        line |= kind.score(answer, protocol)
        if kind.draws_masks:
            masks = [encode_rle(mask) for mask in answer.masks]
            line |= {"masks": masks, "true_masks": row.get("true_masks", [])}
        lines.append(line)
    return lines


def _write(path: Path, header: PredictionRow, lines: Iterable[PredictionRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *lines))
    partial.replace(path)


def _examples(task: TaskEntry, rows: Sequence[PredictionRow]) -> list[Example]:
    """The truth of training records (EXAMPLES of them or a few more, evenly spread), or of the answered ones where none
    are known.

    None, with a warning, where most cannot be used: a mean over the others would be of negatives, for instance.
    """
    if not task.examples:
        return [Example(row["expected"], _row_boxes(row)) for row in rows]
    found, problems = [], []
    try:
        source = open_source(task.examples, task.root)
        for index in range(0, len(source), max(1, len(source) // EXAMPLES)):
            try:
                found.append(_example(source[index]))
            except DataError as error:  # a record that cannot be used is no example
                problems.append(error)
    except DataError as error:  # the file itself
        problems.append(error)
    if len(problems) <= len(found):
        return found
    log.warning(
        "%s has no answers without a model: %d of %d training records can be used, the first problem is: %s",
        task.name,
        len(found),
        len(found) + len(problems),
        problems[0],
    )
    return []


def _example(record: Record) -> Example:
    text, boxes = record.turns[-1][1], [_text_boxes(record.turns[-1][1])]
    if names := MASK.findall(text):
        size = images.load_image(record.find(record.images[0])).shape[:2]
        boxes += [box_of(images.load_mask(record.find(name), size) > 0) for name in names]
    return Example(MASK.sub("", text).strip(), np.concatenate(boxes))


def _row_boxes(row: PredictionRow) -> np.ndarray:
    masks = [box_of(decode_rle(rle)) for rle in row.get("true_masks", ())]
    return np.concatenate([_text_boxes(row["expected"]), *masks])


def _text_boxes(text: str) -> np.ndarray:
    return metrics.parse_boxes(text) / BOX_GRID


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", required=True, help="folder of a sweep, with its sweep.json")
    parser.add_argument("--metrics", default="", help="comma-separated files and entry points, see evaluate/own.py")
    arguments = parser.parse_args()
    try:
        rescore(arguments.workdir, load_metrics(arguments.metrics))
        print(write_sweep_report(arguments.workdir))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

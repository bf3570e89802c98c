"""SPICE of referring captions (Med-GRIT RC).

Its Java program scores many at a time, so its scores stand in a file of their own beside the predictions.
"""

from collections.abc import Sequence
from pathlib import Path

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.predictions import PredictionRow, Shard, read_lines

PART = "RC"


def write_spice(path: Path, header: PredictionRow, rows: Sequence[PredictionRow]) -> None:
    """Scores the rows that have no line in the file, {"record", "scores": {"spice"}}.

    Raises MissingExtra when SPICE cannot run.
    """
    known = {line["record"] for line in read_lines(path, header)}
    rows = [row for row in rows if row["record"] not in known]
    if not rows:
        return
    scores = metrics.spice([row["answer"] for row in rows], [row["expected"] for row in rows])
    shard = Shard(path, header, [row["record"] for row in rows])
    for row, score in zip(rows, scores, strict=True):
        shard.add({"record": row["record"], "scores": {"spice": score}})


def with_spice(path: Path, header: PredictionRow, rows: Sequence[PredictionRow]) -> list[PredictionRow] | None:
    """The rows with the file's scores among theirs; None when it lacks one of them."""
    scores = {line["record"]: line["scores"] for line in read_lines(path, header)}
    if not all(row["record"] in scores for row in rows):
        return None
    return [row | {"scores": row["scores"] | scores[row["record"]]} for row in rows]

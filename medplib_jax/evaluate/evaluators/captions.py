"""Scores of captions by other programs: SPICE (Med-GRIT RC) and METEOR 1.5 (RC and MIA).

They score many answers at a time, so their scores stand in files of their own beside the predictions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.predictions import PredictionRow, Shard, read_lines


@dataclasses.dataclass(frozen=True)
class CaptionProgram:
    """`score` gives each answer's scores; `parts` of Med-GRIT are scored; `metrics` are what is lost without it."""

    name: str  # in the name of its file
    parts: tuple[str, ...]
    metrics: tuple[str, ...]
    score: Callable[[Sequence[str], Sequence[str]], list[dict[str, float]]]

    def write(self, path: Path, header: PredictionRow, rows: Sequence[PredictionRow]) -> None:
        """Scores the rows that have no line in the file, {"record", "scores"}.

        Raises MissingExtra when the program cannot run.
        """
        known = {line["record"] for line in read_lines(path, header)}
        rows = [row for row in rows if row["record"] not in known]
        if not rows:
            return
        scores = self.score([row["answer"] for row in rows], [row["expected"] for row in rows])
        shard = Shard(path, header, [row["record"] for row in rows])
        for row, score in zip(rows, scores, strict=True):
            shard.add({"record": row["record"], "scores": score})


def with_scores(path: Path, header: PredictionRow, rows: Sequence[PredictionRow]) -> list[PredictionRow] | None:
    """The rows with the file's scores among theirs; None when it lacks one of them."""
    scores = {line["record"]: line["scores"] for line in read_lines(path, header)}
    if not all(row["record"] in scores for row in rows):
        return None
    return [row | {"scores": row["scores"] | scores[row["record"]]} for row in rows]


PROGRAMS = (
    CaptionProgram("spice", ("RC",), ("spice",), metrics.spice),
    CaptionProgram("meteor", ("RC", "MIA"), ("meteor_1.5", "mBMR_1.5"), metrics.meteor_counts),
)

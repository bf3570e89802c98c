"""What a kind of question is: how an answer is checked and scored, which metrics sum the scores up, and what the report
shows of it.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from medplib_jax.data.records import Record
from medplib_jax.evaluate.evaluators.predictions import PredictionRow
from medplib_jax.evaluate.metrics import Statistic, statistics
from medplib_jax.evaluate.metrics.catalogue import Metric

if TYPE_CHECKING:  # reports are made without jax
    from medplib_jax.batch import Batch
    from medplib_jax.data.pipeline import Loader
    from medplib_jax.evaluate.kinds.naive import Example, Guess


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated answer beside the expected one.

    Masks are bool [height, width] of the picture (shrunk, if it exceeds the mask canvas). spacing: mm between their
    rows and between their columns, where known.
    """

    text: str
    expected: str
    answer_type: str = ""
    masks: tuple[np.ndarray, ...] = ()
    true_masks: tuple[np.ndarray, ...] = ()
    spacing: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Contents:
    """How many of each the records of a file have at most."""

    images: int = 0
    regions: int = 0
    masks: int = 0
    volumes: int = 0


class TaskKind(abc.ABC):
    """One kind of question, or one part of a set whose parts are scored each in their own way.

    A module of this folder with a `KINDS` of these is all that a new kind needs: the sweep, its report and the tables
    take everything from here. Metrics are the mean of each score unless `statistics` says otherwise.
    """

    name: ClassVar[str]
    part: str = ""
    draws_masks: ClassVar[bool] = False  # whether the masks of an answer are drawn
    fields: ClassVar[Sequence[str]] = ()  # of a line, beside its scores, what `statistics` needs
    metrics: ClassVar[Mapping[str, Metric]] = {}  # those that `metrics.catalogue` does not name
    scoring: ClassVar[int] = 1  # raised when the same answer gets other scores: files of predictions hold them
    main: ClassVar[Sequence[str]] = ()  # which of its metrics stands for a task: the first that it has

    @abc.abstractmethod
    def score(self, answer: Answer, protocol: str) -> PredictionRow:
        """The scores of one answer, under "scores", and what else its line is to hold."""

    def claim(self, contents: Contents) -> int:
        """How well it fits a file whose kind is not given; 0 for not at all. The best fit is taken."""
        return 0

    def check(self, prompt: "Batch", record: Record, loader: "Loader", protocol: str) -> None:
        """Raises DataError for a prompt that lacks what the question is about."""
        return  # most questions are about the picture, which every prompt has

    def statistics(self, rows: Sequence[Mapping[str, Any]], protocol: str) -> dict[str, Statistic]:
        """The metrics of rows that have their scores under "scores"."""
        return statistics(rows, protocol)

    def naive(self, examples: Sequence["Example"]) -> "dict[str, Guess]":
        """{name: how it answers} of the answers without a model that stand beside every figure.

        examples: the truth of training records, or, where none are known, of the task itself.
        """
        return {}

    def shown_score(self, scores: Mapping[str, float]) -> tuple[str, float] | None:
        """The name and value in [0, 1] of the score by which the report orders answers; None for one that has none.

        An answer that is right or wrong has a score without a name.
        """
        return next(((name.replace("_", " "), value) for name, value in scores.items() if 0 <= value <= 1), None)

    def flags(self, scores: Mapping[str, float]) -> tuple[str, ...]:
        """What went wrong with an answer, in the words of the report's filter."""
        return ()

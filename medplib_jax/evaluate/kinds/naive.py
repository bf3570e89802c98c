"""Answers without a model, with which every figure has to be compared: a constant, a majority, a mean box."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from medplib_jax.evaluate.kinds.base import Answer

Row = Mapping[str, Any]
Guess = Callable[[Row, Answer], Answer]  # the line of a record and its truth -> an answer


@dataclasses.dataclass(frozen=True)
class Example:
    """The truth of one record, from which guesses are made. boxes: [n, 4], x1 y1 x2 y2 as shares of the picture."""

    expected: str
    boxes: np.ndarray


def say(text: str) -> Guess:
    return lambda row, truth: dataclasses.replace(truth, text=text, masks=())


def majority(examples: Sequence[Example]) -> str:
    """The expected answer that occurs most; of equals the first in the alphabet."""
    counts = Counter(example.expected for example in examples)
    return min(counts, key=lambda text: (-counts[text], text)) if counts else ""


def mean_box(examples: Sequence[Example]) -> np.ndarray:
    """[4], the mean of all boxes; the whole picture where there is none."""
    boxes = [example.boxes for example in examples if len(example.boxes)]
    return np.concatenate(boxes).mean(0) if boxes else np.array([0.0, 0.0, 1.0, 1.0])


def draw_box(box: np.ndarray) -> Guess:
    """One mask: the box, given as shares of the picture, in every record's picture.

    Without a true mask only whether anything is drawn counts, unless a row says the `size` of its masks.
    """

    def guess(row: Row, truth: Answer) -> Answer:
        height, width = truth.true_masks[0].shape if truth.true_masks else row.get("size", (1, 1))
        x, y = ((np.arange(size) + 0.5) / size for size in (width, height))
        mask = ((x >= box[0]) & (x <= box[2]))[None] & ((y >= box[1]) & (y <= box[3]))[:, None]
        return dataclasses.replace(truth, text="<SEG>", masks=(mask,))

    return guess


def box_of(mask: np.ndarray) -> np.ndarray:
    """[0 or 1, 4], the box around the pixels of a mask [h, w], as shares of the picture."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros((0, 4))
    (height, width), ends = mask.shape, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return np.array([ends], float) / (width, height, width, height)

"""What every evaluator does: make a line of an answered record and score it.

`metrics.statistics` sums the scores up.
"""

import abc
import dataclasses

import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import Record
from medplib_jax.data.rle import encode_rle
from medplib_jax.decode.masks import MaskDrawer
from medplib_jax.decode.slots import Generation
from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.predictions import PredictionRow


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated answer beside the expected one.

    Masks are bool [height, width] of the picture (shrunk, if it exceeds the mask canvas).
    """

    text: str
    expected: str
    answer_type: str
    masks: tuple[np.ndarray, ...] = ()
    true_masks: tuple[np.ndarray, ...] = ()


class Evaluator(abc.ABC):
    """Scores the answers to the questions of one file. Subclasses say how one answer is scored.

    `draw_masks` (see `mask_drawer`) is for questions with masks.
    """

    def __init__(self, loader: Loader, *, protocol: str = "exact", draw_masks: MaskDrawer | None = None):
        metrics.check_protocol(protocol)
        self.protocol = protocol
        self._loader, self._draw_masks = loader, draw_masks

    @abc.abstractmethod
    def score(self, answer: Answer) -> PredictionRow:
        """The scores of one answer, under "scores", and what else its line is to hold."""

    def check(self, prompt: Batch, record: Record) -> None:
        """Raises DataError for a prompt that lacks what the question is about."""
        return  # most questions are about the picture, which every prompt has

    def row(self, prompt: Batch, generation: Generation) -> PredictionRow:
        """The line of one record, from a prompt and its answer with a batch axis of 1."""
        record = self._loader.record(int(prompt.record[0]))
        self.check(prompt, record)
        drawn = {}
        masks = true_masks = ()
        if self._draw_masks is not None and generation.predicted_iou is not None:
            height, width = prompt.mask_size[0]
            masks = tuple(self._draw_masks(prompt, generation)[0, generation.mask_valid[0], :height, :width])
            true_masks = tuple(prompt.gt_masks[0, prompt.mask_valid[0], :height, :width] > 0)
            drawn = {
                "masks": [encode_rle(mask) for mask in masks],
                "true_masks": [encode_rle(mask) for mask in true_masks],
                "predicted_iou": [
                    round(float(value), 4) for value in generation.predicted_iou[0, generation.mask_valid[0]]
                ],
            }
        text = self._loader.read_answer(generation.tokens[0, : generation.lengths[0]].tolist())
        answer = Answer(
            text, self._loader.encode(record, question=True).answer.strip(), record.answer_type, masks, true_masks
        )
        row = {
            "record": record.index,
            "image": list(record.images),
            "modality": record.modality,
            "question": record.turns[-2][1],
            "answer": answer.text,
            "expected": answer.expected,
            "answer_type": record.answer_type,
        }
        row |= {"patient": record.patient} if record.patient else {}
        row |= self.score(answer) | drawn
        return row if generation.choices is None else row | {"router": generation.choices[0].tolist()}

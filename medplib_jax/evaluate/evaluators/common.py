"""From an answered prompt to the scored line of its record.

`metrics.statistics` sums the scores up.
"""

import dataclasses

from medplib_jax.batch import Batch
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import Record
from medplib_jax.data.rle import encode_rle
from medplib_jax.decode.masks import MaskDrawer
from medplib_jax.decode.slots import Generation
from medplib_jax.evaluate.evaluators.predictions import PredictionRow
from medplib_jax.evaluate.kinds import Answer, TaskKind
from medplib_jax.evaluate.metrics import check_protocol


class Evaluator:
    """Scores the answers to the questions of one file, as its kind says.

    `draw_masks` (see `mask_drawer`) is for questions with masks.
    """

    def __init__(
        self, kind: TaskKind, loader: Loader, *, protocol: str = "exact", draw_masks: MaskDrawer | None = None
    ):
        check_protocol(protocol)
        self._kind, self._protocol = kind, protocol
        self._loader, self._draw_masks = loader, draw_masks

    def row(self, prompt: Batch, generation: Generation) -> PredictionRow:
        """The line of one record, from a prompt and its answer with a batch axis of 1."""
        record = self._loader.record(int(prompt.record[0]))
        self._kind.check(prompt, record, self._loader, self._protocol)
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
        expected = self._loader.encode(record, question=True).answer.strip()
        measures = self._measures(record, prompt)
        answer = Answer(text, expected, record.answer_type, masks, true_masks, measures.get("spacing"))
        row = {
            "record": record.index,
            "image": list(record.images),
            "modality": record.modality,
            "question": record.turns[-2][1],
            "answer": answer.text,
            "expected": answer.expected,
            "answer_type": record.answer_type,
        }
        known = {"patient": record.patient, "structure": record.structure}
        row |= {name: value for name, value in known.items() if value}
        row |= {} if record.examples is None else {"examples": [list(example) for example in record.examples]}
        row |= {"volume": dataclasses.asdict(record.volume)} if record.volume else {}
        row |= measures
        row["cut_off"] = bool(generation.cut_off[0])
        row |= self._kind.score(answer, self._protocol) | drawn
        return row if generation.choices is None else row | {"router": generation.choices[0].tolist()}

    def _measures(self, record: Record, prompt: Batch) -> PredictionRow:
        """`size` (height, width) of masks on the record's picture, and `spacing`, mm between their rows and between
        their columns: that of the picture, unless it was shrunk to the mask canvas. Empty where it is not known.
        """
        if record.spacing is None or not record.images:
            return {}
        size = (int(prompt.mask_size[0, 0]), int(prompt.mask_size[0, 1]))
        down, right = (
            step * (whole / side)
            for step, whole, side in zip(record.spacing, self._loader.picture_size(record), size, strict=True)
        )
        return {"spacing": (down, right), "size": size}

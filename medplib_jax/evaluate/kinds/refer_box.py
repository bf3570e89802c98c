"""Questions with boxes in text (Med-GRIT-270k; Huang et al., MICCAI 2024; BiRD's
tests/models/BiRD/eval_*_score_modality.py).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.predictions import PredictionRow
from medplib_jax.evaluate.kinds.base import Answer, TaskKind
from medplib_jax.evaluate.kinds.naive import Example, Guess, majority, mean_box, say

BOX_GRID = 1000  # boxes in text lie on a grid of this size, stretched over the picture


class GroundBox(TaskKind):
    """VG, visual grounding:

    Which true boxes a predicted box of their own meets (Recall@0.5); reference: any predicted box.
    """

    name, part = "refer_box", "VG"
    main = ("recall_at_0.5",)
    scoring = 2

    def score(self, answer: Answer, protocol: str) -> PredictionRow:
        found, true = (metrics.parse_boxes(text, protocol) for text in (answer.text, answer.expected))
        score = metrics.match_boxes if protocol == "exact" else metrics.recall_at_iou
        return {"scores": score(found, true), "boxes": found.tolist(), "true_boxes": true.tolist()}

    def naive(self, examples: Sequence[Example]) -> dict[str, Guess]:
        boxes = {"whole image": np.array([0.0, 0.0, 1.0, 1.0]), "mean box": mean_box(examples)}
        return {name: say(_as_text(box)) for name, box in boxes.items()}

    def shown_score(self, scores: Mapping[str, float]) -> tuple[str, float] | None:
        if not scores.get("boxes"):
            return None
        name, summed = ("IoU", "iou_sum") if "iou_sum" in scores else ("boxes met", "boxes_found")
        return name, scores[summed] / scores["boxes"]


class ReferClass(TaskKind):
    """ROC, referring object classification: every word of the truth stands in the answer."""

    name, part = "refer_box", "ROC"
    main = ("roc_accuracy",)

    def score(self, answer: Answer, protocol: str) -> PredictionRow:
        return {"scores": {"roc_accuracy": metrics.roc_hit(answer.text, answer.expected)}}

    def naive(self, examples: Sequence[Example]) -> dict[str, Guess]:
        return {"majority answer": say(majority(examples))}

    def shown_score(self, scores: Mapping[str, float]) -> tuple[str, float] | None:
        return ("", scores["roc_accuracy"]) if "roc_accuracy" in scores else None


class Caption(TaskKind):
    """RC and MIA, referring captions and image analysis:

    BLEU, METEOR, ROUGE-L and their mean; exact: also whether the answer is the expected one.
    """

    name = "refer_box"
    main = ("mBMR", "spice")
    scoring = 2

    def __init__(self, part: str):
        self.part = part

    def score(self, answer: Answer, protocol: str) -> PredictionRow:
        scores = metrics.mia_scores(answer.text, answer.expected, protocol)
        if protocol == "exact":
            same = metrics.normalise_answer(answer.text) == metrics.normalise_answer(answer.expected)
            scores |= {"exact_match": float(same)}
        return {"scores": scores}

    def naive(self, examples: Sequence[Example]) -> dict[str, Guess]:
        return {"majority answer": say(majority(examples))}

    def shown_score(self, scores: Mapping[str, float]) -> tuple[str, float] | None:
        return ("ROUGE-L", scores["rouge_l"]) if "rouge_l" in scores else None


def _as_text(box: np.ndarray) -> str:
    """A box given as shares of the picture, on the grid of boxes in text."""
    return "<box>({:.0f},{:.0f}),({:.0f},{:.0f})</box>".format(*(box * BOX_GRID))


KINDS = (GroundBox(), ReferClass(), Caption("RC"), Caption("MIA"))
PARTS = tuple(kind.part for kind in KINDS)

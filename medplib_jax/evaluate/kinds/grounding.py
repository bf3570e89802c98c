"""Questions answered with masks (MeCoVQA-Grounding), several per answer or none (the original's model/eval/vqa_infer.py
validate_seg).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.predictions import PredictionRow
from medplib_jax.evaluate.kinds.base import Answer, Contents, TaskKind
from medplib_jax.evaluate.kinds.naive import Example, Guess, draw_box, mean_box, say


class Grounding(TaskKind):
    """Overlap of the k-th mask with the k-th <SEG>'s (see `metrics.mask_scores`)."""

    name = "grounding"
    draws_masks = True
    main = ("mDice", "no_target_accuracy")

    def claim(self, contents: Contents) -> int:
        return 3 if contents.masks else 0

    def score(self, answer: Answer, protocol: str) -> PredictionRow:
        """An answer without <SEG> draws nothing; a <SEG> beyond the mask slots counts as a mask without pixels.

        In the protocol `reference` one mask is drawn always, and compared with the first true one.
        """
        if protocol == "reference":
            return {"scores": metrics.mask_scores(answer.masks[:1], answer.true_masks[:1], protocol, answer.spacing)}
        scores = metrics.mask_scores(answer.masks, answer.true_masks, protocol, answer.spacing)
        return {"scores": scores | {"masks": answer.text.count("<SEG>")}}

    def naive(self, examples: Sequence[Example]) -> dict[str, Guess]:
        return {
            "empty mask": say("No."),
            "whole image": draw_box(np.array([0.0, 0.0, 1.0, 1.0])),
            "mean box": draw_box(mean_box(examples)),
        }

    def shown_score(self, scores: Mapping[str, float]) -> tuple[str, float] | None:
        return ("Dice", scores["dice"]) if scores.get("target", 1) else None

    def flags(self, scores: Mapping[str, float]) -> tuple[str, ...]:
        if scores.get("target", 1):
            return () if scores["drawn"] else ("missed",)
        return ("false mask",) if scores["drawn"] else ()


KINDS = (Grounding(),)

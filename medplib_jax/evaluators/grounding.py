"""Questions answered with masks (MeCoVQA-Grounding), several per answer or none (the original's model/eval/vqa_infer.py validate_seg)."""

from collections.abc import Sequence

from medplib_jax import metrics
from medplib_jax.evaluators.common import Answer, Evaluator, Row


class GroundingEvaluator(Evaluator):
    """mDice, mIoU, gIoU, cIoU, no-target accuracy, false-mask rate (see `metrics.summarise_masks`); the k-th mask is the k-th <SEG>'s."""

    def score(self, answer: Answer) -> dict[str, float]:
        """An answer without <SEG> draws nothing; a <SEG> beyond the mask slots counts as a mask without pixels."""
        scores = metrics.mask_scores(answer.masks, answer.true_masks, self.protocol)
        return scores | {"masks": answer.text.count("<SEG>")}

    def summarise(self, rows: Sequence[Row]) -> dict[str, float]:
        return metrics.summarise_masks([row["scores"] for row in rows], self.protocol)

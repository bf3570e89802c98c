"""Questions answered with masks (MeCoVQA-Grounding), several per answer or none (the original's model/eval/vqa_infer.py
validate_seg).
"""

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.common import Answer, Evaluator
from medplib_jax.evaluate.evaluators.predictions import PredictionRow


class GroundingEvaluator(Evaluator):
    """Overlap of the k-th mask with the k-th <SEG>'s (see `metrics.mask_scores`)."""

    def score(self, answer: Answer) -> PredictionRow:
        """An answer without <SEG> draws nothing; a <SEG> beyond the mask slots counts as a mask without pixels.

        In the protocol `reference` one mask is drawn always, and compared with the first true one.
        """
        if self.protocol == "reference":
            return {"scores": metrics.mask_scores(answer.masks[:1], answer.true_masks[:1], self.protocol)}
        scores = metrics.mask_scores(answer.masks, answer.true_masks, self.protocol)
        return {"scores": scores | {"masks": answer.text.count("<SEG>")}}

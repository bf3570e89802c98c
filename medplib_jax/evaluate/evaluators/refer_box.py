"""Questions with boxes in text (Med-GRIT-270k; Huang et al., MICCAI 2024; BiRD's
tests/models/BiRD/eval_*_score_modality.py).
"""

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.common import Answer, Evaluator
from medplib_jax.evaluate.evaluators.predictions import PredictionRow


class GroundBoxEvaluator(Evaluator):
    """VG, visual grounding: which true boxes some predicted box meets (Recall@0.5)."""

    def score(self, answer: Answer) -> PredictionRow:
        found, true = (metrics.parse_boxes(text) for text in (answer.text, answer.expected))
        return {"scores": metrics.recall_at_iou(found, true), "boxes": found.tolist(), "true_boxes": true.tolist()}


class ReferClassEvaluator(Evaluator):
    """ROC, referring object classification: every word of the truth stands in the answer."""

    def score(self, answer: Answer) -> PredictionRow:
        return {"scores": {"roc_accuracy": metrics.roc_hit(answer.text, answer.expected)}}


class CaptionEvaluator(Evaluator):
    """RC and MIA, referring captions and image analysis: BLEU, METEOR, ROUGE-L and their mean."""

    def score(self, answer: Answer) -> PredictionRow:
        return {"scores": metrics.mia_scores(answer.text, answer.expected)}


PARTS: dict[str, type[Evaluator]] = {
    "VG": GroundBoxEvaluator,
    "ROC": ReferClassEvaluator,
    "RC": CaptionEvaluator,
    "MIA": CaptionEvaluator,
}

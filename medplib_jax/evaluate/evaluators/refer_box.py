"""Questions with boxes in text (Med-GRIT-270k; Huang et al., MICCAI 2024; BiRD's
tests/models/BiRD/eval_*_score_modality.py).
"""

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.common import Answer, Evaluator
from medplib_jax.evaluate.evaluators.predictions import PredictionRow


class GroundBoxEvaluator(Evaluator):
    """VG, visual grounding:

    Which true boxes a predicted box of their own meets (Recall@0.5); reference: any predicted box.
    """

    def score(self, answer: Answer) -> PredictionRow:
        found, true = (metrics.parse_boxes(text) for text in (answer.text, answer.expected))
        score = metrics.match_boxes if self.protocol == "exact" else metrics.recall_at_iou
        return {"scores": score(found, true), "boxes": found.tolist(), "true_boxes": true.tolist()}


class ReferClassEvaluator(Evaluator):
    """ROC, referring object classification: every word of the truth stands in the answer."""

    def score(self, answer: Answer) -> PredictionRow:
        return {"scores": {"roc_accuracy": metrics.roc_hit(answer.text, answer.expected)}}


class CaptionEvaluator(Evaluator):
    """RC and MIA, referring captions and image analysis:

    BLEU, METEOR, ROUGE-L and their mean; exact: also whether the answer is the expected one.
    """

    def score(self, answer: Answer) -> PredictionRow:
        scores = metrics.mia_scores(answer.text, answer.expected)
        if self.protocol == "exact":
            same = metrics.normalise_answer(answer.text) == metrics.normalise_answer(answer.expected)
            scores |= {"exact_match": float(same)}
        return {"scores": scores}


PARTS: dict[str, type[Evaluator]] = {
    "VG": GroundBoxEvaluator,
    "ROC": ReferClassEvaluator,
    "RC": CaptionEvaluator,
    "MIA": CaptionEvaluator,
}

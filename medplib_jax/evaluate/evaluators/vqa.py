"""Questions answered in words: closed (yes/no, choices) and open ones (the original's model/eval/cal_metric.py)."""

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.common import Answer, Evaluator
from medplib_jax.evaluate.evaluators.predictions import PredictionRow


def is_closed(answer_type: str, expected: str) -> bool:
    """Whether a question counts as closed: by its type (of `records.ANSWER_TYPES`), or, without one, because yes or no
    is expected.
    """
    return answer_type == "closed" or (not answer_type and metrics.normalise_answer(expected.lower()) in ("yes", "no"))


class VqaEvaluator(Evaluator):
    """Whether a closed answer is right; exact match, F1, BLEU, ROUGE-L and the like of an open one."""

    def score(self, answer: Answer) -> PredictionRow:
        if is_closed(answer.answer_type, answer.expected):
            return {"scores": {"closed_accuracy": metrics.closed_hit(answer.text, answer.expected, self.protocol)}}
        scores = metrics.open_scores(answer.text, answer.expected, self.protocol)
        return {"scores": {f"open_{name}": value for name, value in scores.items()}}

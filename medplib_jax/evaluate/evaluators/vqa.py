"""Questions answered in words: closed (yes/no, choices) and open ones (the original's model/eval/cal_metric.py)."""

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.common import Answer, Evaluator
from medplib_jax.evaluate.evaluators.predictions import Row

CLOSED_TYPES = ("closed", "yes/no")
OPEN_TYPES = ("open", "other", "number")


def is_closed(answer_type: str, expected: str) -> bool:
    """Whether a question counts as closed: by its type, or, without one, because yes or no is expected. ValueError for an unknown type."""
    if answer_type.lower() in CLOSED_TYPES + OPEN_TYPES:
        return answer_type.lower() in CLOSED_TYPES
    if answer_type:
        raise ValueError(f"answer_type {answer_type!r} is not one of {CLOSED_TYPES + OPEN_TYPES}")
    return metrics.normalise_answer(expected.lower()) in ("yes", "no")


class VqaEvaluator(Evaluator):
    """Whether a closed answer is right; exact match, F1, BLEU, ROUGE-L and the like of an open one."""

    def score(self, answer: Answer) -> Row:
        if is_closed(answer.answer_type, answer.expected):
            return {"scores": {"closed_accuracy": metrics.closed_hit(answer.text, answer.expected, self.protocol)}}
        scores = metrics.open_scores(answer.text, answer.expected, self.protocol)
        return {"scores": {f"open_{name}": value for name, value in scores.items()}}

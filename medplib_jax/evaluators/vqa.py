"""Questions answered in words: closed (yes/no, choices) and open ones (the original's model/eval/cal_metric.py)."""

from collections.abc import Sequence

import numpy as np

from medplib_jax import metrics
from medplib_jax.evaluators.common import Answer, Evaluator, Row

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
    """Closed accuracy; exact match, F1, BLEU, ROUGE-L and candidate-set accuracy of open answers. Those of an absent kind are left out."""

    def score(self, answer: Answer) -> dict[str, float]:
        if is_closed(answer.answer_type, answer.expected):
            return {"closed_accuracy": metrics.closed_hit(answer.text, answer.expected, self.protocol)}
        return {f"open_{name}": value for name, value in metrics.open_scores(answer.text, answer.expected, self.protocol).items()}

    def summarise(self, rows: Sequence[Row]) -> dict[str, float]:
        """Means of the scores; candidates are the expected answers of the whole file, open and closed, as in the original."""
        summary = {}
        for name in dict.fromkeys(name for row in rows for name in row["scores"]):
            summary[name] = float(np.mean([row["scores"][name] for row in rows if name in row["scores"]]))
        opened = [row for row in rows if "closed_accuracy" not in row["scores"]]
        if opened:
            texts = ([row[key] for row in opened] for key in ("answer", "expected"))
            hits = metrics.candidate_hits(*texts, [row["expected"] for row in self.rows()], self.protocol)
            summary["open_candidate_accuracy"] = float(np.mean(hits))
        return summary

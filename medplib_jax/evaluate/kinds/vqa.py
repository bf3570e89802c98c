"""Questions answered in words: closed (yes/no, choices) and open ones (the original's model/eval/cal_metric.py)."""

from collections.abc import Mapping, Sequence

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.predictions import PredictionRow
from medplib_jax.evaluate.kinds.base import Answer, Contents, TaskKind
from medplib_jax.evaluate.kinds.naive import Example, Guess, majority, say


def is_closed(answer_type: str, expected: str) -> bool:
    """Whether a question counts as closed: by its type (of `records.ANSWER_TYPES`), or, without one, because yes or no
    is expected.
    """
    return answer_type == "closed" or (not answer_type and metrics.normalise_answer(expected.lower()) in ("yes", "no"))


class Vqa(TaskKind):
    """Whether a closed answer is right; exact match, F1, BLEU, ROUGE-L and the like of an open one."""

    name = "vqa"
    main = ("accuracy",)

    def claim(self, contents: Contents) -> int:
        return 1

    def score(self, answer: Answer, protocol: str) -> PredictionRow:
        if is_closed(answer.answer_type, answer.expected):
            return {"scores": {"closed_accuracy": metrics.closed_hit(answer.text, answer.expected, protocol)}}
        scores = metrics.open_scores(answer.text, answer.expected, protocol)
        return {"scores": {f"open_{name}": value for name, value in scores.items()}}

    def naive(self, examples: Sequence[Example]) -> dict[str, Guess]:
        return {"always yes": say("Yes"), "majority answer": say(majority(examples))}

    def shown_score(self, scores: Mapping[str, float]) -> tuple[str, float] | None:
        if "closed_accuracy" in scores:
            return "", scores["closed_accuracy"]
        return ("F1", scores["open_f1"]) if "open_f1" in scores else None

    def flags(self, scores: Mapping[str, float]) -> tuple[str, ...]:
        right = scores.get("closed_accuracy", scores.get("open_exact_match", 1))
        return () if right == 1 else ("wrong",)


KINDS = (Vqa(),)

"""What each metric is called, what it means and which are shown by modality; for reports."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Metric:
    """`meaning` completes "NAME: ..."; `better` is "higher" or "lower".

    `by_modality`: the report has a table of it by modality. `unit`: "%" for values in [0, 1], which are shown in
    percent; others are shown as they are.
    """

    label: str
    meaning: str
    better: str = "higher"
    by_modality: bool = False
    unit: str = "%"

    def show(self, value: float, digits: int = 1, sign: str = "") -> str:
        """A value of it as reports print it, without the unit."""
        return f"{100 * value if self.unit == '%' else value:{sign}.{digits}f}"

    @property
    def title(self) -> str:
        return self.label if self.unit in ("", "%") else f"{self.label} ({self.unit})"


_KNOWN = "whose picture has a known spacing"
METRICS = {
    "mDice": Metric("mDice", "mean Dice of questions with a target; reference: of all questions, from their IoU"),
    "mIoU": Metric("mIoU", "mean IoU of questions with a target; reference: of all questions"),
    "gIoU": Metric("gIoU", "mean IoU of all questions, where a rightly empty answer counts 1 (LISA)"),
    "cIoU": Metric("cIoU", "all intersections over all unions (LISA)"),
    "surface_dice": Metric(
        "surface Dice", "share of both outlines within 1 % of the picture's diagonal of the other one"
    ),
    "nsd_2mm": Metric(
        "NSD at 2 mm", f"mean share of both outlines within 2 mm of the other one, of questions with a target {_KNOWN}"
    ),
    "hd95_mm": Metric(
        "HD95",
        f"mean 95th percentile of the distances between outlines, of questions with a target and a mask {_KNOWN}",
        "lower",
        unit="mm",
    ),
    "area_error_mm2": Metric(
        "area error",
        f"mean difference of the drawn and the true area, of questions with a target {_KNOWN}",
        "lower",
        unit="mm²",
    ),
    "precision_at_0.5": Metric("P@0.5", "share of questions with a target whose IoU exceeds 0.5"),
    "hit_rate": Metric(
        "hit rate", "share of questions with a target for which anything is drawn: sensitivity of existence"
    ),
    "no_target_accuracy": Metric(
        "no-target accuracy", "share of questions without a target that are answered without a mask"
    ),
    "false_mask_rate": Metric(
        "false-mask rate", "share of questions without a target for which anything is drawn", "lower"
    ),
    "existence_specificity": Metric(
        "existence specificity", "share of questions without a target for which nothing is drawn"
    ),
    "existence_precision": Metric(
        "existence precision", "share of questions with a target among those for which anything is drawn"
    ),
    "yes_sensitivity": Metric("yes sensitivity", "share of the questions to be answered yes that are"),
    "yes_specificity": Metric("yes specificity", "share of the questions to be answered no that are not answered yes"),
    "yes_precision": Metric("yes precision", "share of the answers yes that are right"),
    "accuracy": Metric(
        "accuracy",
        "closed answers that are right and open ones that match exactly; reference: word precision of the open ones",
    ),
    "closed_accuracy": Metric(
        "closed accuracy", "share of closed answers equal to the expected one after normalisation"
    ),
    "open_exact_match": Metric(
        "open exact match", "share of open answers equal after normalisation; reference: word precision"
    ),
    "open_f1": Metric("open F1", "mean F1 of the words of open answers"),
    "open_precision": Metric("open precision", "mean precision of the words of open answers"),
    "open_recall": Metric("open recall", "mean recall of the words of open answers"),
    "open_candidate_accuracy": Metric(
        "candidate accuracy", "share of open answers whose nearest expected answer of the file is their own"
    ),
    **{
        f"open_bleu_{n}": Metric(
            f"open BLEU-{n}", f"mean BLEU-{n} of open answers; reference: order {n} alone" if n < 4 else "mean BLEU-4"
        )
        for n in (1, 2, 3, 4)
    },
    "open_rouge_l": Metric("open ROUGE-L", "mean ROUGE-L of open answers"),
    "open_meteor": Metric("open METEOR", "mean METEOR of open answers, exact and stem stages (no synonyms)"),
    "recall_at_0.5": Metric(
        "Recall@0.5",
        "share of true boxes that a predicted box of their own meets at IoU above 0.5; reference: any predicted box",
    ),
    "box_iou": Metric("box IoU", "mean over true boxes of the IoU with the predicted box of their own, 0 without one"),
    "exact_match": Metric("exact match", "share of answers equal to the expected one after normalisation"),
    "roc_accuracy": Metric("ROC accuracy", "share of answers that hold every word of the truth"),
    "mBMR": Metric("mBMR", "mean of BLEU-1 to BLEU-4, METEOR and ROUGE-L"),
    "mBMR_1.5": Metric("mBMR 1.5", "the same with METEOR 1.5, as BiRD reports it"),
    **{f"bleu_{n}": Metric(f"BLEU-{n}", f"BLEU-{n} of the corpus") for n in (1, 2, 3, 4)},
    "meteor": Metric(
        "METEOR", "mean METEOR, exact and stem stages (no synonyms; METEOR 1.5, as in BiRD's mBMR, gives other values)"
    ),
    "meteor_1.5": Metric("METEOR 1.5", "METEOR 1.5 of the corpus, by its Java program"),
    "rouge_l": Metric("ROUGE-L", "mean ROUGE-L with recall weighing 1.2 times precision"),
    "spice": Metric("SPICE", "mean SPICE"),
}

for _name in (
    *("mDice", "recall_at_0.5", "roc_accuracy", "mBMR", "mBMR_1.5", "spice", "accuracy", "no_target_accuracy"),
    *("mIoU", "surface_dice", "nsd_2mm", "hd95_mm", "false_mask_rate", "closed_accuracy", "open_f1"),
):
    METRICS[_name] = dataclasses.replace(METRICS[_name], by_modality=True)


def register(name: str, metric: Metric) -> None:
    """Makes a metric known to reports. ValueError for a name that means something else already."""
    if METRICS.setdefault(name, metric) != metric:
        raise ValueError(f"metric {name!r} is known already: {METRICS[name].meaning}")


_OWN: dict[str, Metric] = {}  # of the users', as the folders say that were read


def register_own(name: str, metric: Metric) -> None:
    """Makes a metric of a user's known to reports; the last one of a name counts."""
    if name in METRICS:
        raise ValueError(f"metric {name!r} is known already: {METRICS[name].meaning}")
    _OWN[name] = metric


def describe(name: str) -> Metric:
    """The metric of that name; one that is not listed stands for itself, higher being better."""
    return METRICS.get(name) or _OWN.get(name) or (Metric(name, "mean over the records that have it"))


def main_metric(names: Sequence[str], preferred: Sequence[str]) -> str:
    """The metric that stands for a task which has these: the first of the preferred ones, else its first."""
    return next((name for name in preferred if name in names), names[0])


def in_order(names) -> list[str]:
    """The names, those listed first in the list's order."""
    known = [*METRICS, *_OWN]
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))

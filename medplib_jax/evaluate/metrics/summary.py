"""From scores of records to metrics.

A metric is a function of sums over records, so it can be resampled and split by modality without a second pass.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from medplib_jax.evaluate.metrics.captions import BLEU_COUNTS, ORDERS, corpus_bleu
from medplib_jax.evaluate.metrics.programs import METEOR_COUNTS, meteor_of
from medplib_jax.evaluate.metrics.protocol import check_protocol
from medplib_jax.evaluate.metrics.text import candidate_hits, normalise_answer

MASK_SCORES = frozenset({"iou", "dice", "surface_dice", "intersection", "union", "target", "drawn", "masks"})
BOX_SCORES = frozenset({"boxes_found", "boxes", "iou_sum"})
OfSums = Callable[[np.ndarray], np.ndarray]  # a metric of sums over records
CAPTION_COUNTS = frozenset((*BLEU_COUNTS, *METEOR_COUNTS))  # no scores by themselves
MED_GRIT_MODALITIES = 8  # BiRD's scripts divide by all of them, also when a file lacks some


def ratio(sums: np.ndarray) -> np.ndarray:
    """sums[..., 0] / sums[..., 1], NaN where nothing was counted."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One metric of N records: `of_sums` (float [..., K] -> [...], NaN where nothing counts) of the sum over records of
    `parts` [N, K].

    `modalities`: the mean over modalities divides by this many at least.
    """

    parts: np.ndarray
    of_sums: OfSums = ratio
    modalities: int = 0

    def value(self) -> float:
        return float(self.of_sums(self.parts.sum(0)))

    def __getitem__(self, records: np.ndarray) -> "Statistic":
        """The same metric of some of the records (indices or a boolean mask)."""
        return dataclasses.replace(self, parts=self.parts[records])


def statistics(rows: Sequence[Mapping[str, Any]], protocol: str = "exact") -> dict[str, Statistic]:
    """The metrics of rows that have their scores under "scores"; which ones there are follows from the scores' names.

    Masks (`mask_scores`): see `mask_statistics`. Boxes (`match_boxes`, `recall_at_iou`): recall_at_0.5, box_iou.
    Captions (`mia_scores`): bleu_1..4 of the corpus, meteor, rouge_l and their mean, mBMR; with `meteor_counts` also
    meteor_1.5 and mBMR_1.5, which has it in place of meteor. Every other score: its mean
    over the rows that have it; beside it `accuracy` (the closed answers and the exactly matched open ones) and
    open_candidate_accuracy, whose candidates are the expected answers of all rows, as in the original.
    """
    check_protocol(protocol)
    scores = [row["scores"] for row in rows]
    names = dict.fromkeys(name for score in scores for name in score)
    found = {}
    if MASK_SCORES & names.keys():
        found |= mask_statistics(scores, protocol)
    if "boxes" in names:
        modalities = MED_GRIT_MODALITIES if protocol == "reference" else 0
        found["recall_at_0.5"] = Statistic(_columns(scores, ("boxes_found", "boxes")), modalities=modalities)
        if "iou_sum" in names:
            found["box_iou"] = Statistic(_columns(scores, ("iou_sum", "boxes")))
    if "ngrams_1" in names:
        found |= caption_statistics(scores, protocol)
    means = {
        name: _mean_statistic([score.get(name) for score in scores])
        for name in names
        if name not in found and not is_part(name)
    }
    if "roc_accuracy" in means and protocol == "reference":
        means["roc_accuracy"] = dataclasses.replace(means["roc_accuracy"], modalities=MED_GRIT_MODALITIES)
    if {"closed_accuracy", "open_exact_match"} & names.keys():
        found["accuracy"] = _mean_statistic(
            [score.get("closed_accuracy", score.get("open_exact_match")) for score in scores]
        )
    if "closed_accuracy" in names:
        found |= yes_no_statistics(rows)
    if "open_exact_match" in names:
        is_open = [i for i, score in enumerate(scores) if "open_exact_match" in score]
        answers, expected = ([rows[i][key] for i in is_open] for key in ("answer", "expected"))
        hit = candidate_hits(answers, expected, [row["expected"] for row in rows], protocol)
        hits = dict(zip(is_open, hit, strict=True))
        means["open_candidate_accuracy"] = _mean_statistic([hits.get(i) for i in range(len(rows))])
    return found | means


def is_part(name: str) -> bool:
    """Whether a score of that name is summed up together with others, so that it is no metric by itself."""
    return name in MASK_SCORES or name in BOX_SCORES or name in CAPTION_COUNTS


def mask_statistics(scores: Sequence[Mapping[str, float]], protocol: str = "exact") -> dict[str, Statistic]:
    """Grounding metrics of the dicts of `mask_scores`.

    mDice, mIoU, surface_dice: means over questions with a target (`reference`: over all). gIoU: mean IoU over all
    questions, where a rightly empty answer counts 1. cIoU: all intersections over all unions (LISA, Lai et al. 2024,
    and utils/utils.py of the original). precision_at_0.5: questions with a target whose IoU exceeds 0.5. hit_rate:
    those where any pixel was drawn, the sensitivity of existence. no_target_accuracy: questions without a target whose
    answer holds no mask. false_mask_rate: those where a pixel was drawn; existence_specificity: those where none was.
    existence_precision: questions with a target among those for which anything was drawn.
    """
    target, drawn, masks, iou, dice = _columns(scores, ("target", "drawn", "masks", "iou", "dice")).T
    intersection, union = _columns(scores, ("intersection", "union")).T
    counted = np.ones_like(target) if protocol == "reference" else target
    everyone, empty = np.ones_like(target), 1 - target
    generalised = iou if protocol == "exact" else np.where(union > 0, intersection / (union + 1e-5), 1.0)
    pairs = {
        "mDice": (dice * counted, counted),
        "mIoU": (iou * counted, counted),
        "gIoU": (generalised, everyone),
        "cIoU": (intersection, union),
        "precision_at_0.5": ((iou > 0.5) * target, target),
        "hit_rate": (drawn * target, target),
        "no_target_accuracy": ((masks == 0) * empty, empty),
        "false_mask_rate": (drawn * empty, empty),
        "existence_specificity": ((1 - drawn) * empty, empty),
        "existence_precision": (drawn * target, drawn),
    }
    if any("surface_dice" in score for score in scores):
        measured = counted * np.array(["surface_dice" in score for score in scores])
        pairs["surface_dice"] = (_columns(scores, ("surface_dice",))[:, 0] * measured, measured)
    return {name: Statistic(np.stack(pair, axis=1)) for name, pair in pairs.items()}


def yes_no_statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Statistic]:
    """yes_sensitivity, yes_specificity and yes_precision of the closed questions that expect yes or no; none without
    any. An answer that is neither is no yes.
    """
    asked, said = (
        [normalise_answer(row[side].lower()) if "closed_accuracy" in row["scores"] else "" for row in rows]
        for side in ("expected", "answer")
    )
    counted = np.array([text in ("yes", "no") for text in asked], float)
    if not counted.any():
        return {}
    yes, said_yes = (np.array([text == "yes" for text in texts], float) * counted for texts in (asked, said))
    no = counted - yes
    pairs = {
        "yes_sensitivity": (yes * said_yes, yes),
        "yes_specificity": (no * (1 - said_yes), no),
        "yes_precision": (yes * said_yes, said_yes),
    }
    return {name: Statistic(np.stack(pair, axis=1)) for name, pair in pairs.items()}


def caption_statistics(scores: Sequence[Mapping[str, float]], protocol: str = "exact") -> dict[str, Statistic]:
    """bleu_1..4 of the corpus, meteor, rouge_l and mBMR, their mean, of the dicts of `mia_scores`.

    Where all have those of `meteor_counts`, too: meteor_1.5 of the corpus, and mBMR_1.5 with it.
    """
    modalities = MED_GRIT_MODALITIES if protocol == "reference" else 0
    counts = _columns(scores, (*METEOR_COUNTS, *BLEU_COUNTS, "meteor", "rouge_l"))
    parts = np.concatenate([counts, np.ones((len(scores), 1))], axis=1)
    values: dict[str, OfSums] = {f"bleu_{n}": functools.partial(_bleu, order=n) for n in ORDERS}
    values["rouge_l"] = lambda sums: ratio(sums[..., [-2, -1]])
    others = tuple(values.values())
    values["meteor"] = lambda sums: ratio(sums[..., [-3, -1]])
    values["mBMR"] = _mean_of(*others, values["meteor"])
    if all(METEOR_COUNTS[0] in score for score in scores):
        values["meteor_1.5"] = lambda sums: meteor_of(sums[..., : len(METEOR_COUNTS)])
        values["mBMR_1.5"] = _mean_of(*others, values["meteor_1.5"])
    return {name: Statistic(parts, value, modalities) for name, value in values.items()}


def _bleu(sums: np.ndarray, order: int) -> np.ndarray:
    return corpus_bleu(sums[..., len(METEOR_COUNTS) : -3], order)


def _mean_of(*metrics: OfSums) -> OfSums:
    return lambda sums: np.mean([metric(sums) for metric in metrics], axis=0)


def _columns(scores, names) -> np.ndarray:
    return np.array([[score.get(name, 0) for name in names] for score in scores], float).reshape(
        len(scores), len(names)
    )


def _mean_statistic(values: Sequence[float | None]) -> Statistic:
    """The mean of the values that there are."""
    return Statistic(
        np.array([(0.0, 0.0) if value is None else (value, 1.0) for value in values], float).reshape(-1, 2)
    )


def values(found: Mapping[str, Statistic]) -> dict[str, float]:
    """{metric: value}, without those for which nothing was counted."""
    valued = {name: statistic.value() for name, statistic in found.items()}
    return {name: value for name, value in valued.items() if not np.isnan(value)}


def by_modality(found: Mapping[str, Statistic], modalities: Sequence[str]) -> dict[str, float]:
    """`values` of all records, as `metric/<modality>` (`none` for records without one), and the mean of those as
    `metric/modality_mean`.
    """
    result = values(found)
    of_record = np.array([modality or "none" for modality in modalities])
    each = {
        modality: values({name: found[name][of_record == modality] for name in result})
        for modality in sorted(set(of_record.tolist()))
    }
    for name in tuple(result):
        measured = {modality: split[name] for modality, split in each.items() if name in split}
        result |= {f"{name}/{modality}": value for modality, value in measured.items()}
        result[f"{name}/modality_mean"] = sum(measured.values()) / max(len(measured), found[name].modalities)
    return result

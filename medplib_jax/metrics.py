"""Metrics of text answers and of masks: pure functions of strings and numpy arrays, no state.

Two protocols. `exact` is the definition of the literature; `reference` is the arithmetic of the original program
(MedPLIB model/eval), kept so that published figures can be compared. Where they differ:

    exact match     exact: 1 when the normalised answers are equal. reference: distinct truth words found / predicted words (a precision)
    F1              exact: overlap of multisets (SQuAD). reference: a shared word counts as often as it was predicted
    candidates      exact: a prediction without a word of any candidate hits none. reference: it hits the first
    empty answers   exact: an answer of articles only ("A" of a multiple choice) is compared as it stands. reference: its scores are 0
    BLEU-1..3       exact: cumulative, as the literature. reference: the precision of that n-gram order alone, times the brevity penalty
    IoU, Dice       exact: an empty union is 1, and questions without a target stay out of mIoU and mDice. reference: it is 0 and stays in
    surplus masks   exact: a drawn mask beyond the true ones counts as a pair with IoU 0. reference: it is ignored
    gIoU            reference adds 1e-5 to every union
Unlike the original's, the normalisation strips every full stop, not only the first 32.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

PROTOCOLS = ("exact", "reference")

# Normalisation of answers: the VQA challenge's rules and word lists (Antol et al. 2015), as in model/eval/glossary.py.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
    how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've 'twas 'ow's'at
""".split()
# Each contraction is recognised with one of its apostrophes missing.
_CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _CONTRACTED for i in range(len(word)) if word[i] == "'"}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the list's own slip


def check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is not one of {PROTOCOLS}")


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, digits for number words, apostrophes put back (model/eval/glossary.py normalize_word).

    A punctuation mark becomes a space, or nothing where it stands beside a space or the text holds a number like 3,500.
    """
    thousands = re.search(r"\d,\d", text)
    spaced = text
    for mark in _PUNCTUATION:
        spaced = spaced.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    words = re.sub(r"\.(?!\d)", "", spaced).lower().split()
    numbered = (_NUMBERS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def answer_words(text: str, protocol: str = "exact") -> list[str]:
    """The words that are compared."""
    words = normalise_answer(text.lower()).split()
    return words if words or protocol == "reference" else text.lower().split()


def closed_hit(prediction: str, truth: str, protocol: str = "exact") -> float:
    """1 when the answers are equal after normalisation, else 0 (model/eval/cal_metric.py)."""
    return float(answer_words(prediction, protocol) == answer_words(truth, protocol))


def word_precision(prediction: Sequence[str], truth: Sequence[str]) -> float:
    """Distinct words of the truth that were predicted over the number of predicted words (the original's "exact match"); 0 if none."""
    return len(set(truth) & set(prediction)) / len(prediction) if prediction else 0.0


def token_f1(prediction: Sequence[str], truth: Sequence[str], protocol: str = "exact") -> tuple[float, float, float]:
    """(F1, precision, recall) over words. `exact`: overlap of multisets, as SQuAD; two empty answers agree. One empty answer scores 0."""
    predicted, true = Counter(prediction), Counter(truth)
    if protocol == "exact":
        if not predicted and not true:
            return 1.0, 1.0, 1.0
        shared = (predicted & true).total()
        misses = true.total() - shared
    else:
        shared = sum(count for word, count in predicted.items() if word in true)
        misses = sum(count for word, count in true.items() if word not in predicted)
    if not shared:
        return 0.0, 0.0, 0.0
    precision, recall = shared / predicted.total(), shared / (shared + misses)
    return 2 * precision * recall / (precision + recall), precision, recall


def bleu(prediction: Sequence[str], truth: Sequence[str], weights: Sequence[float]) -> float:
    """Sentence BLEU (Papineni et al. 2002) against one reference, weights[n-1] for n-grams, no smoothing.

    Equals nltk.translate.bleu_score.sentence_bleu: an order without a match counts as the smallest normal float; no shared word is 0.
    """
    if not set(prediction) & set(truth):
        return 0.0
    log_precision = math.fsum(weight * math.log(_ngram_precision(prediction, truth, n)) for n, weight in enumerate(weights, 1))
    return math.exp(min(0.0, 1 - len(truth) / len(prediction))) * math.exp(log_precision)


def _ngram_precision(prediction: Sequence[str], truth: Sequence[str], n: int) -> float:
    predicted, true = (Counter(zip(*(words[i:] for i in range(n)))) for words in (prediction, truth))
    shared = (predicted & true).total()
    return shared / predicted.total() if shared else sys.float_info.min


def rouge_l(prediction: Sequence[str], truth: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words; two empty answers agree, one empty answer scores 0."""
    if not prediction or not truth:
        return float(not prediction and not truth)
    lengths = [0] * (len(truth) + 1)
    for word in prediction:
        diagonal = 0
        for j, true_word in enumerate(truth, 1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == true_word else max(above, lengths[j - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(prediction) + len(truth))


def open_scores(prediction: str, truth: str, protocol: str = "exact") -> dict[str, float]:
    """Every per-answer score of an open question, each in [0, 1] (model/eval/cal_metric.py)."""
    predicted, true = answer_words(prediction, protocol), answer_words(truth, protocol)
    f1, precision, recall = token_f1(predicted, true, protocol)
    exact_match = float(predicted == true) if protocol == "exact" else word_precision(predicted, true)
    scores = {"exact_match": exact_match, "f1": f1, "precision": precision, "recall": recall, "rouge_l": rouge_l(predicted, true)}
    for n in range(1, 5):
        alone = protocol == "reference" and n < 4
        scores[f"bleu_{n}"] = bleu(predicted, true, [0.0] * (n - 1) + [1.0] if alone else [1 / n] * n)
    return scores


def candidate_hits(predictions: Sequence[str], truths: Sequence[str], candidates: Iterable[str], protocol: str = "exact") -> list[float]:
    """1 for each prediction that IS the truth, or whose nearest candidate is.

    Source: model/eval/evaluate_metrics.py calculate_appearance_with_normalization.
    Nearest: the largest share of a candidate's distinct words that were predicted; among equals the first in sorted order (the original
    takes whichever its set yields first). `exact`: a prediction that shares no word with any candidate has no nearest one.
    """
    texts = [normalise_answer(candidate) for candidate in sorted(set(candidates))]
    words = [frozenset(text.split()) for text in texts]
    hits = []
    for prediction, truth in zip(predictions, truths, strict=True):
        predicted, true = (normalise_answer(text.lower()) for text in (prediction, truth))
        found = set(predicted.split())
        similarity = [len(found & candidate) / len(candidate) if candidate else 0.0 for candidate in words]
        best = max(similarity)
        has_nearest = best > 0 or protocol == "reference"
        hits.append(float(predicted == true or (has_nearest and texts[similarity.index(best)] == true)))
    return hits


def binarise(logits: np.ndarray, threshold: float) -> np.ndarray:
    """True where sigmoid(logits) > threshold, without computing the sigmoid. threshold in (0, 1)."""
    return logits > math.log(threshold / (1 - threshold))


def overlap(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """(intersection, union) in pixels of two boolean masks of one shape. Raises ValueError when the shapes differ."""
    if prediction.shape != truth.shape:
        raise ValueError(f"predicted mask has shape {prediction.shape}, the true one {truth.shape}")
    return int(np.count_nonzero(prediction & truth)), int(np.count_nonzero(prediction | truth))


def iou(intersection: float, union: float, protocol: str = "exact") -> float:
    """Intersection over union; nothing drawn where nothing is to be drawn is 1 (`reference`: 0)."""
    return intersection / union if union else float(protocol == "exact")


def dice(intersection: float, union: float, protocol: str = "exact") -> float:
    """2 |A and B| / (|A| + |B|) = 2 IoU / (1 + IoU)."""
    value = iou(intersection, union, protocol)
    return 2 * value / (1 + value)


def mask_scores(predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray], protocol: str = "exact") -> dict[str, float]:
    """Scores of one question: its predicted masks against its true ones, matched in order; boolean arrays of one shape.

    A true mask without a prediction is paired with an empty mask, and so is a drawn one without a true mask (`reference`: it is ignored).
    `iou` and `dice` are means over the pairs, `intersection` and `union` sums; `target` is 1 when a true pixel exists, `drawn` when a
    predicted pixel does, `masks` counts predictions.
    """
    pairs = [overlap(predictions[i], true) if i < len(predictions) else (0, int(np.count_nonzero(true))) for i, true in enumerate(truths)]
    if protocol == "exact":
        pairs += [(0, int(np.count_nonzero(drawn))) for drawn in predictions[len(truths) :] if drawn.any()]
    pairs = pairs or [(0, 0)]
    return {
        "iou": _mean([iou(*pair, protocol) for pair in pairs]),
        "dice": _mean([dice(*pair, protocol) for pair in pairs]),
        "intersection": sum(pair[0] for pair in pairs),
        "union": sum(pair[1] for pair in pairs),
        "target": int(any(mask.any() for mask in truths)),
        "drawn": int(any(mask.any() for mask in predictions)),
        "masks": len(predictions),
    }


def summarise_masks(scores: Sequence[dict[str, float]], protocol: str = "exact") -> dict[str, float]:
    """Grounding metrics over questions (the dicts of `mask_scores`); a metric without a question to count is left out.

    mDice, mIoU: means over questions with a target (`reference`: over all). gIoU: mean IoU over all questions, where a rightly empty
    answer counts 1. cIoU: all intersections over all unions (LISA, Lai et al. 2024, and utils/utils.py of the original).
    no_target_accuracy: questions without a target whose answer holds no mask. false_mask_rate: those where a pixel was drawn.
    """
    check_protocol(protocol)
    summary = {}
    counted = [score for score in scores if score["target"] or protocol == "reference"]
    if counted:
        summary |= {"mDice": _mean([score["dice"] for score in counted]), "mIoU": _mean([score["iou"] for score in counted])}
    if scores:
        summary["gIoU"] = _mean([_generalised_iou(score, protocol) for score in scores])
        union = sum(score["union"] for score in scores)
        summary["cIoU"] = iou(sum(score["intersection"] for score in scores), union, protocol)
    empty = [score for score in scores if not score["target"]]
    if empty:
        summary["no_target_accuracy"] = _mean([score["masks"] == 0 for score in empty])
        summary["false_mask_rate"] = _mean([score["drawn"] for score in empty])
    return summary


def _generalised_iou(score: dict[str, float], protocol: str) -> float:
    if protocol == "exact":
        return score["iou"]
    return score["intersection"] / (score["union"] + 1e-5) if score["union"] else 1.0


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))

"""Scores of one answer in words against the expected one (MedPLIB model/eval/cal_metric.py and evaluate_metrics.py)."""

import functools
import re
import sys
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.translate.bleu_score import sentence_bleu
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from scipy import sparse

_CHUNK = 4_000_000  # numbers in a matrix of answers and candidates, which bounds the memory

# Normalisation of answers: the VQA challenge's rules and word lists (Antol et al. 2015), as in model/eval/glossary.py.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {
    "none": "0"
}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't
    not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've 'twas 'ow's'at
""".split()
# Each contraction is recognised with one of its apostrophes missing.
_CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _CONTRACTED for i in range(len(word)) if word[i] == "'"}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the list's own slip

# Chinese and Japanese put no spaces between words. Each ideograph or kana counts as one (sacrebleu's tokenizer zh).
_IDEOGRAPHS = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
_FULL_WIDTH_PUNCTUATION = re.compile("[\u3000-\u303f\u201c\u201d\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")
_FULL_WIDTH = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}


def space_ideographs(text: str) -> str:
    """The text with spaces around each ideograph and kana, without full-width punctuation, letters and digits of
    ASCII's width.
    """
    if text.isascii():
        return text
    return _IDEOGRAPHS.sub(r" \1 ", _FULL_WIDTH_PUNCTUATION.sub(" ", text).translate(_FULL_WIDTH))


@functools.lru_cache(100_000)  # all checkpoints are asked the same questions
def normalise_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, digits for number words, apostrophes put back (model/eval/glossary.py
    normalize_word).

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
    """The words that are compared.

    `exact`: ideographs are words of their own, and full-width punctuation does not count.
    """
    if protocol == "reference":
        return normalise_answer(text.lower()).split()
    text = space_ideographs(text).lower()
    return normalise_answer(text).split() or text.split()


def closed_hit(prediction: str, truth: str, protocol: str = "exact") -> float:
    """1 when the answers are equal after normalisation, else 0 (model/eval/cal_metric.py)."""
    return float(answer_words(prediction, protocol) == answer_words(truth, protocol))


def word_precision(prediction: Sequence[str], truth: Sequence[str]) -> float:
    """Distinct words of the truth that were predicted over the number of predicted words (the original's "exact
    match"); 0 if none.
    """
    return len(set(truth) & set(prediction)) / len(prediction) if prediction else 0.0


def token_f1(prediction: Sequence[str], truth: Sequence[str], protocol: str = "exact") -> tuple[float, float, float]:
    """(F1, precision, recall) over words.

    `exact`: overlap of multisets, as SQuAD; two empty answers agree. One empty answer scores 0.
    """
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

    nltk's: an order without a match counts as the smallest normal float; no shared word is 0.
    """
    score = sentence_bleu([truth], prediction, weights, smoothing_function=_unsmoothed)
    return float(np.asarray(score))


def _unsmoothed(precisions, **_):
    """nltk's default, which besides warns of every order without a match."""
    return [precision if precision.numerator else sys.float_info.min for precision in precisions]


def rouge_l(prediction: Sequence[str], truth: Sequence[str], beta: float = 1.0) -> float:
    """ROUGE-L (Lin 2004): F-measure of the longest common subsequence of words (without spaces); recall weighs `beta`
    times precision.

    Two empty answers agree, one empty answer scores 0.
    """
    if not prediction or not truth:
        return float(not prediction and not truth)
    precision, recall, _ = _rouge_scorer().score(" ".join(truth), " ".join(prediction))["rougeL"]
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if precision else 0.0


@functools.cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=types.SimpleNamespace(tokenize=str.split))


def meteor(prediction: Sequence[str], truth: Sequence[str]) -> float:
    """METEOR (Lavie and Agarwal 2007) of its exact and stem stages; two empty answers agree, one empty answer scores 0.

    The stage of synonyms is left out: it needs WordNet, which does not come with nltk, and a score must not depend on
    what is installed.
    """
    if not prediction or not truth:
        return float(not prediction and not truth)
    return single_meteor_score(truth, prediction, stemmer=_stemmer(), wordnet=_NO_SYNONYMS)


_NO_SYNONYMS: Any = types.SimpleNamespace(synsets=lambda word: ())


@functools.cache
def _stemmer() -> Any:
    stem = functools.lru_cache(100_000)(PorterStemmer().stem)  # slow, and the same words come again
    return types.SimpleNamespace(stem=stem)


def open_scores(prediction: str, truth: str, protocol: str = "exact") -> dict[str, float]:
    """Every per-answer score of an open question, each in [0, 1] (model/eval/cal_metric.py)."""
    predicted, true = answer_words(prediction, protocol), answer_words(truth, protocol)
    f1, precision, recall = token_f1(predicted, true, protocol)
    exact_match = float(predicted == true) if protocol == "exact" else word_precision(predicted, true)
    scores = {"exact_match": exact_match, "f1": f1, "precision": precision, "recall": recall}
    scores |= {"rouge_l": rouge_l(predicted, true), "meteor": meteor(predicted, true)}
    for n in range(1, 5):
        alone = protocol == "reference" and n < 4
        scores[f"bleu_{n}"] = bleu(predicted, true, [0.0] * (n - 1) + [1.0] if alone else [1 / n] * n)
    return scores


def candidate_hits(
    predictions: Sequence[str], truths: Sequence[str], candidates: Iterable[str], protocol: str = "exact"
) -> list[float]:
    """1 for each prediction that IS the truth, or whose nearest candidate is.

    Source: model/eval/evaluate_metrics.py calculate_appearance_with_normalization. Nearest: the largest share of a
    candidate's distinct words that were predicted; among equals the first in sorted order (the original takes whichever
    its set yields first). `exact`: a prediction that shares no word with any candidate has no nearest one.
    """
    prepare = space_ideographs if protocol == "exact" else str
    texts = [normalise_answer(prepare(candidate)) for candidate in sorted(set(candidates))]
    predicted, true = ([normalise_answer(prepare(text).lower()) for text in side] for side in (predictions, truths))
    column_of = {
        word: column for column, word in enumerate(dict.fromkeys(word for text in texts for word in text.split()))
    }
    said_NxW, wanted_CxW = _occurrences(predicted, column_of), _occurrences(texts, column_of)
    sizes_C = np.maximum(wanted_CxW.sum(1), 1)
    hits, rows = [], max(1, _CHUNK // max(len(texts), 1))
    for start in range(0, len(predicted), rows):
        share_NxC = (said_NxW[start : start + rows] @ wanted_CxW.T).toarray() / sizes_C
        for i, (nearest, share) in enumerate(zip(share_NxC.argmax(1), share_NxC.max(1), strict=True), start):
            has_nearest = share > 0 or protocol == "reference"
            hits.append(float(predicted[i] == true[i] or (has_nearest and texts[nearest] == true[i])))
    return hits


def _occurrences(texts: Sequence[str], column_of: Mapping[str, int]) -> sparse.csr_array:
    """1 where a text [N] holds a word [W]; words without a column are left out."""
    columns = [[column_of[word] for word in set(text.split()) if word in column_of] for text in texts]
    ends = np.cumsum([0, *map(len, columns)])
    flat = np.array([column for row in columns for column in row], np.int32)
    return sparse.csr_array((np.ones(len(flat), np.int32), flat, ends), shape=(len(texts), len(column_of)))

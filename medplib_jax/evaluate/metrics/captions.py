"""Scores of longer answers, as captions are scored: what BiRD's mBMR is made of (its MIA task).

The original takes them from pycocoevalcap, whose tokenizer and METEOR 1.5 are Java programs. Here BLEU and ROUGE-L have
its arithmetic, on words of nltk's Treebank tokenizer that are brought to the form of Stanford's. METEOR is
`text.meteor`, with other weights than METEOR 1.5 and without its synonyms and paraphrases, so it is another number: on
BiRD's recorded responses it is 0.13 to 0.16 higher. `programs.py` has METEOR 1.5 itself, where there is Java.
"""

import re
from collections import Counter

import numpy as np
from nltk.tokenize import TreebankWordTokenizer
from nltk.util import ngrams

from medplib_jax.evaluate.metrics.text import meteor, rouge_l, space_ideographs

ORDERS = (1, 2, 3, 4)
BLEU_COUNTS = ("words", "words_true", *(f"ngrams_{n}{suffix}" for n in ORDERS for suffix in ("", "_found")))
# What pycocoevalcap's ptbtokenizer drops; nltk writes the same signs.
_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "(", ")", "{", "}", "[", "]", "<", ">", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_BRACKET = re.compile(r"[()\[\]{}]")
_TAG = re.compile(r"(</?[a-z]+>)")
# Words that keep their full stop in Stanford's tokenizer, as far as reports and captions hold them.
_ABBREVIATION = re.compile(r"(?:[a-z]\.)+|(?:dr|mr|mrs|ms|prof|vs|etc|fig|figs|no|nos|st|jr|sr|inc)\.")
_COCO_BETA = 1.2  # of ROUGE-L in pycocoevalcap


def caption_words(text: str, protocol: str = "exact") -> list[str]:
    """Lower-case words without punctuation; ideographs are words of their own.

    reference: brackets are words and tags are whole, as pycocoevalcap's list of punctuation leaves them.
    """
    pieces = [space_ideographs(text).lower()]
    if protocol == "reference":
        pieces = _TAG.split(_BRACKET.sub(lambda found: f" {_BRACKETS[found.group()]} ", pieces[0]))
    words = []
    for i, piece in enumerate(pieces):
        words += [piece] if i % 2 else map(_without_stop, TreebankWordTokenizer().tokenize(piece))
    return [word for word in words if word not in _PUNCTUATION]


def _without_stop(word: str) -> str:
    """Without the full stop that ends a sentence within a text, which nltk's tokenizer leaves at the word."""
    return word if word in _PUNCTUATION or _ABBREVIATION.fullmatch(word) else word.removesuffix(".")


def mia_scores(answer: str, truth: str, protocol: str = "exact") -> dict[str, float]:
    """What `statistics` sums to BLEU-1..4 of the whole corpus, and this answer's METEOR and ROUGE-L.

    `ngrams_n`: n-grams of the answer, `ngrams_n_found`: those that the truth has, too (each as often as there, at
    most).
    """
    predicted, true = caption_words(answer, protocol), caption_words(truth, protocol)
    counts = {"words": len(predicted), "words_true": len(true)}
    for n in ORDERS:
        there, wanted = Counter(ngrams(predicted, n)), Counter(ngrams(true, n))
        counts |= {f"ngrams_{n}": there.total(), f"ngrams_{n}_found": (there & wanted).total()}
    return counts | {"meteor": meteor(predicted, true), "rouge_l": rouge_l(predicted, true, _COCO_BETA)}


def corpus_bleu(counts: np.ndarray, order: int) -> np.ndarray:
    """BLEU (Papineni et al. 2002) of a corpus, from its sums [..., len(BLEU_COUNTS)] in that order -> [...]; NaN
    without any words.

    As in pycocoevalcap, an order without a shared n-gram counts as nearly 0.
    """
    words, words_true, there, found = (
        counts[..., 0],
        counts[..., 1],
        counts[..., 2::2][..., :order],
        counts[..., 3::2][..., :order],
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        log_precision = np.log((found + 1e-15) / (there + 1e-9)).mean(-1)
        brevity = np.minimum(0.0, 1 - words_true / words)
    return np.where(words > 0, np.exp(log_precision + brevity), np.where(words_true > 0, 0.0, np.nan))

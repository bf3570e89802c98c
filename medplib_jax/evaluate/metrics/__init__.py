"""Metrics of text answers, masks, boxes and captions: pure functions of strings and numpy arrays, no state.

`protocol.py` says what the protocols `exact` and `reference` mean. A score belongs to one answer, a metric to many:
`statistics` makes metrics of scores, `resampling` says how sure they are.
"""

from medplib_jax.evaluate.metrics.boxes import box_iou, match_boxes, parse_boxes, recall_at_iou, roc_hit
from medplib_jax.evaluate.metrics.captions import mia_scores
from medplib_jax.evaluate.metrics.catalogue import describe
from medplib_jax.evaluate.metrics.masks import SURFACE_TOLERANCE, dice, iou, mask_scores, overlap, surface_dice
from medplib_jax.evaluate.metrics.programs import MissingExtra, meteor_counts, spice
from medplib_jax.evaluate.metrics.protocol import PROTOCOLS, check_protocol
from medplib_jax.evaluate.metrics.summary import Statistic, by_modality, mask_statistics, statistics, values
from medplib_jax.evaluate.metrics.text import (
    answer_words,
    bleu,
    candidate_hits,
    closed_hit,
    meteor,
    normalise_answer,
    open_scores,
    rouge_l,
    token_f1,
    word_precision,
)

__all__ = [
    "PROTOCOLS",
    "SURFACE_TOLERANCE",
    "MissingExtra",
    "Statistic",
    "answer_words",
    "bleu",
    "box_iou",
    "by_modality",
    "candidate_hits",
    "check_protocol",
    "closed_hit",
    "describe",
    "dice",
    "iou",
    "mask_scores",
    "match_boxes",
    "mask_statistics",
    "meteor",
    "meteor_counts",
    "mia_scores",
    "normalise_answer",
    "open_scores",
    "overlap",
    "parse_boxes",
    "recall_at_iou",
    "roc_hit",
    "rouge_l",
    "spice",
    "statistics",
    "surface_dice",
    "token_f1",
    "values",
    "word_precision",
]

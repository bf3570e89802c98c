"""Scores of boxes in text and of referring captions (BiRD tests/models/BiRD/eval_{VG,RO,GC,MII}_score_modality.py)."""

import re

import numpy as np
from scipy.optimize import linear_sum_assignment

from medplib_jax.evaluate.metrics.text import space_ideographs

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\({_NUMBER},{_NUMBER}\),?\s*\({_NUMBER},{_NUMBER}\)")
_TAGGED = re.compile(r"<box>(.*?)</box>")
_BARE = re.compile(r"\(\d+,\d+\),\(\d+,\d+\)")  # as the original looks for it
UNREADABLE = [0.0] * 4  # a box that meets no other


def parse_boxes(text: str, protocol: str = "exact") -> np.ndarray:
    """float64 [n, 4], x1 y1 x2 y2 in the text's own units, of every `<box>(x1,y1),(x2,y2)</box>`.

    In a text without the tags, of every bare `(x1,y1),(x2,y2)`. A tagged box that cannot be read counts as one of
    zeros, which meets no other. reference: any four numbers between the tags, however they are bracketed, are a box,
    and bare ones hold no spaces.
    """
    if protocol == "reference":
        found = [_four_numbers(inside) for inside in _TAGGED.findall(text) or _BARE.findall(text)]
    else:
        matches = [_BOX.search(inside) for inside in _TAGGED.findall(text)] or list(_BOX.finditer(text))
        found = [[float(number) for number in match.groups()] if match else UNREADABLE for match in matches]
    return np.array(found).reshape(-1, 4)


def _four_numbers(inside: str) -> list[float]:
    try:
        numbers = [float(number) for number in re.sub(r"[()]", "", inside).split(",")]
    except ValueError:
        numbers = []
    return numbers if len(numbers) == 4 else UNREADABLE


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU [n, m] of boxes [n, 4] and [m, 4] (x1 y1 x2 y2, x1 <= x2); 0 where both are empty."""
    a, b = np.reshape(a, (-1, 1, 4)).astype(float), np.reshape(b, (1, -1, 4)).astype(float)
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    shared = sides.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def match_boxes(predicted: np.ndarray, true: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """`boxes`, how many of them are `boxes_found`, and `iou_sum` over them, where each predicted box serves one true
    box.

    Boxes [n, 4]. Boxes are paired so that the sum of their IoU is largest; a true box without a partner has IoU 0.
    """
    iou = box_iou(predicted, true)
    paired = iou[linear_sum_assignment(iou, maximize=True)]
    return {"boxes_found": int((paired > threshold).sum()), "boxes": iou.shape[1], "iou_sum": float(paired.sum())}


def recall_at_iou(predicted: np.ndarray, true: np.ndarray, threshold: float = 0.5) -> dict[str, int]:
    """How many `boxes` there are in truth and how many of them (`boxes_found`) any predicted box meets at an IoU above
    `threshold`.

    Boxes [n, 4]. Summed over answers they make Recall@0.5; a surplus box costs nothing, as in the original.
    """
    met = (box_iou(predicted, true) > threshold).any(0)
    return {"boxes_found": int(met.sum()), "boxes": met.size}


def roc_hit(answer: str, truth: str) -> float:
    """Referring object classification: 1 when every word of the truth occurs, as a substring and in lower case, in the
    answer.
    """
    answer, truth = (space_ideographs(text).lower() for text in (answer, truth))
    return float(all(word in answer for word in truth.split(" ")))

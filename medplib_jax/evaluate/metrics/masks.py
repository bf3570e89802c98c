"""Scores of drawn masks against true ones (MedPLIB model/eval/vqa_infer.py, utils/utils.py; LISA, Lai et al. 2024)."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import spatial

from medplib_jax.volumes.metrics import contour_scores

SURFACE_TOLERANCE = 0.01  # of the picture's diagonal
TOLERANCE_MM = 2.0
NSD = f"nsd_{TOLERANCE_MM:g}mm"


def overlap(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """(intersection, union) in pixels of two boolean masks of one shape. Raises ValueError when the shapes differ."""
    if prediction.shape != truth.shape:
        raise ValueError(f"predicted mask has shape {prediction.shape}, the true one {truth.shape}")
    shared = int(np.count_nonzero(prediction & truth))
    return shared, int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth)) - shared


def iou(intersection: float, union: float, protocol: str = "exact") -> float:
    """Intersection over union; nothing drawn where nothing is to be drawn is 1 (`reference`: 0)."""
    return intersection / union if union else float(protocol == "exact")


def dice(intersection: float, union: float, protocol: str = "exact") -> float:
    """2 |A and B| / (|A| + |B|) = 2 IoU / (1 + IoU)."""
    value = iou(intersection, union, protocol)
    return 2 * value / (1 + value)


def surface_dice(prediction: np.ndarray, truth: np.ndarray, protocol: str = "exact") -> float:
    """Normalised surface Dice (Nikolov et al. 2018): the share of both outlines that lies within a tolerance of the
    other one.

    Outlines are the masks' pixels with a 4-neighbour outside; the tolerance is SURFACE_TOLERANCE of the picture's
    diagonal, because pictures of MeCoVQA carry no spacing; see `millimetre_scores` for those that do. Two empty masks
    agree (`reference`: 0), one empty mask scores 0. ValueError for masks that are not two bool [h, w] of one shape: the
    surfaces of volumes are measured in `volumes.metrics`.
    """
    if prediction.ndim != 2 or prediction.shape != truth.shape:
        raise ValueError(
            f"surface_dice is of pictures: expected masks [h, w], found {prediction.shape} and true shape {truth.shape}"
        )
    if not (prediction.any() or truth.any()):
        return float(protocol == "exact")
    if not (prediction.any() and truth.any()):
        return 0.0
    points = [_outline(mask) for mask in (prediction, truth)]
    tolerance = SURFACE_TOLERANCE * math.hypot(*truth.shape)
    within = math.nextafter(tolerance, math.inf)  # the bound itself is left out
    trees = [spatial.KDTree(own) for own in points]
    near = sum(np.count_nonzero(trees[1 - i].query(points[i], distance_upper_bound=within)[0] < within) for i in (0, 1))
    return float(near / (len(points[0]) + len(points[1])))


def _outline(mask: np.ndarray) -> np.ndarray:
    """int [n, 2], the pixels of a mask bool [h, w] that have a 4-neighbour outside; beyond the picture is outside."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.stack(np.divmod(np.flatnonzero(mask & ~inside), mask.shape[1]), axis=1)


def millimetre_scores(pairs: Sequence[tuple[np.ndarray, np.ndarray]], spacing: tuple[float, float]) -> dict[str, float]:
    """Scores in millimetres of one question's (drawn, true) masks bool [h, w]; none where no true pixel exists.

    spacing: mm between rows and between columns of the masks. Means over the pairs of which one mask has a pixel:
    `nsd_2mm` (0 where the other has none), `area_error_mm2` (the difference of their areas), and `hd95_mm`, of the
    pairs where both have some. See `volumes.metrics.contour_scores`.
    """
    pairs = [(drawn, true) for drawn, true in pairs if drawn.any() or true.any()]
    if not any(true.any() for _, true in pairs):
        return {}
    found = [contour_scores(true, drawn, spacing, [TOLERANCE_MM]) for drawn, true in pairs]
    pixels = [abs(int(drawn.sum()) - int(true.sum())) for drawn, true in pairs]
    scores = {NSD: _mean([one[NSD] for one in found]), "area_error_mm2": _mean(pixels) * math.prod(spacing)}
    distances = [one["hd95"] for one in found if math.isfinite(one["hd95"])]
    return scores | ({"hd95_mm": _mean(distances)} if distances else {})


def mask_scores(
    predictions: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    protocol: str = "exact",
    spacing: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Scores of one question: its predicted masks against its true ones, matched in order; boolean arrays of one shape.

    A true mask without a prediction is paired with an empty mask, and so is a drawn one without a true mask
    (`reference`: it is ignored). `iou`, `dice` and `surface_dice` are means over the pairs, `intersection` and `union`
    sums; `target` is 1 when a true pixel exists, `drawn` when a predicted pixel does, `masks` counts predictions. With
    a spacing also `millimetre_scores`.
    """
    pairs = [(predictions[i] if i < len(predictions) else np.zeros_like(true), true) for i, true in enumerate(truths)]
    if protocol == "exact":
        pairs += [(drawn, np.zeros_like(drawn)) for drawn in predictions[len(truths) :] if drawn.any()]
    overlaps = [overlap(*pair) for pair in pairs] or [(0, 0)]
    return {
        "iou": _mean([iou(*pair, protocol) for pair in overlaps]),
        "dice": _mean([dice(*pair, protocol) for pair in overlaps]),
        "surface_dice": _mean([surface_dice(*pair, protocol) for pair in pairs] or [iou(0, 0, protocol)]),
        "intersection": sum(pair[0] for pair in overlaps),
        "union": sum(pair[1] for pair in overlaps),
        "target": int(any(mask.any() for mask in truths)),
        "drawn": int(any(mask.any() for mask in predictions)),
        "masks": len(predictions),
    } | (millimetre_scores(pairs, spacing) if spacing else {})


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))

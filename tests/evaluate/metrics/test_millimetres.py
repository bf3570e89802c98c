"""Scores of single pictures in millimetres, against a brute-force definition in physical coordinates."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.metrics.masks import millimetre_scores
from medplib_jax.volumes.metrics import contour_scores

SPACING = (0.7, 1.9)
MASKS = arrays(bool, (7, 9))
STEPS = st.floats(0.05, 20)


def pieces(mask: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    """Where the pieces of a mask's outline lie (mm, [n, 2]) and how long each is: one between every four pixels."""
    padded = np.pad(mask, 1).astype(int)
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    height, width = spacing
    diagonal = np.hypot(height, width) / 2
    total = a + b + c + d
    lengths = np.where((total == 1) | (total == 3), diagonal, 0.0)
    lengths += np.where((total == 2) & (a == b), width, 0.0) + np.where((total == 2) & (a == c), height, 0.0)
    lengths += np.where((total == 2) & (a == d), 2 * diagonal, 0.0)
    return np.argwhere(lengths) * spacing, lengths[lengths > 0]


def percentile(distances: np.ndarray, lengths: np.ndarray) -> float:
    order = np.argsort(distances, kind="stable")
    share = np.cumsum(lengths[order]) / lengths.sum()
    return distances[order][np.flatnonzero(share >= 0.95 - 1e-12)[0]]


def brute(drawn: np.ndarray, truth: np.ndarray, spacing, tolerance: float = 2.0) -> tuple[float, float]:
    """HD95 and NSD by comparing every two pieces."""
    (places, lengths), (others, other_lengths) = pieces(truth, spacing), pieces(drawn, spacing)
    apart = np.linalg.norm(places[:, None] - others[None], axis=-1)
    near = (lengths * (apart.min(1) <= tolerance)).sum() + (other_lengths * (apart.min(0) <= tolerance)).sum()
    hd95 = max(percentile(apart.min(1), lengths), percentile(apart.min(0), other_lengths))
    return hd95, near / (lengths.sum() + other_lengths.sum())


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:24, :30]
    centres = rng.uniform(6, 18, (2, 2))
    return tuple((y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(3, 7) ** 2 for cy, cx in centres)


@pytest.mark.parametrize("seed", range(6))
def test_scores_equal_the_definition_in_physical_coordinates(seed):
    drawn, truth = blobs(seed)
    found, (hd95, nsd) = millimetre_scores([(drawn, truth)], SPACING), brute(drawn, truth, SPACING)
    assert found["hd95_mm"] == pytest.approx(hd95) and found["nsd_2mm"] == pytest.approx(nsd)
    error = abs(int(drawn.sum()) - int(truth.sum())) * 0.7 * 1.9
    assert found["area_error_mm2"] == pytest.approx(error)


@settings(max_examples=40, derandomize=True)
@given(MASKS, MASKS, STEPS, STEPS, st.sampled_from([0.125, 0.5, 4, 16]))  # without rounding
def test_a_longer_spacing_gives_longer_distances(drawn, truth, down, right, times):
    tolerance = 1.7 * right
    once = contour_scores(truth, drawn, (down, right), [tolerance])
    more = contour_scores(truth, drawn, (times * down, times * right), [times * tolerance])
    for name in ("hd95", "hd", "assd"):
        assert more[name] == pytest.approx(times * once[name], nan_ok=True)
    near, far = (f"nsd_{one:g}mm" for one in (tolerance, times * tolerance))
    assert more[far] == pytest.approx(once[near], nan_ok=True)


@settings(max_examples=40, derandomize=True)
@given(MASKS, MASKS, STEPS, STEPS)
def test_mirrored_and_turned_pictures_score_alike(drawn, truth, down, right):
    scores = millimetre_scores([(drawn, truth)], (down, right))
    assert millimetre_scores([(drawn[::-1], truth[::-1])], (down, right)) == pytest.approx(scores)
    assert millimetre_scores([(drawn[:, ::-1], truth[:, ::-1])], (down, right)) == pytest.approx(scores)
    assert millimetre_scores([(drawn.T, truth.T)], (right, down)) == pytest.approx(scores)


def test_what_is_missed_counts_as_said():
    drawn, truth = blobs(0)
    nothing = np.zeros_like(truth)
    area = truth.sum() * 0.7 * 1.9
    assert millimetre_scores([(nothing, truth)], SPACING) == {"nsd_2mm": 0, "area_error_mm2": pytest.approx(area)}
    assert millimetre_scores([(drawn, nothing)], SPACING) == {}  # of questions with a target
    assert millimetre_scores([], SPACING) == {}
    pair = millimetre_scores([(drawn, truth)], SPACING)
    both = millimetre_scores([(drawn, truth), (nothing, truth), (nothing, nothing)], SPACING)
    assert both["hd95_mm"] == pair["hd95_mm"] and both["nsd_2mm"] == pytest.approx(pair["nsd_2mm"] / 2)


def test_millimetres_are_of_the_records_whose_spacing_is_known():
    drawn, truth = blobs(0)
    known = metrics.mask_scores([drawn], [truth], "exact", SPACING)
    rows = [{"scores": scores} for scores in (known, metrics.mask_scores([drawn], [truth]))]
    statistics = metrics.statistics(rows)
    assert statistics["hd95_mm"].parts[:, 1].tolist() == [1, 0] and statistics["mDice"].parts[:, 1].tolist() == [1, 1]
    assert metrics.values(statistics)["nsd_2mm"] == known["nsd_2mm"]
    assert not {"hd95_mm", "nsd_2mm", "area_error_mm2"} & metrics.values(metrics.statistics(rows[1:])).keys()
    assert known["surface_dice"] == rows[1]["scores"]["surface_dice"]

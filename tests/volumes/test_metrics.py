"""Volume metrics equal DeepMind's surface-distance 0.1 and MONAI 1.6.1 on real structures; instances and means."""

import math

import numpy as np
import pytest

from medplib_jax.volumes import metrics
from tests.paths import GOLDEN

RECORDED = np.load(GOLDEN / "volume_metrics.npz")
PAIRS = range(len(RECORDED["names"]))
CONTOURS = np.load(GOLDEN / "contour_metrics.npz")  # of the slices below, by surface-distance 0.1


@pytest.mark.parametrize("number", PAIRS, ids=RECORDED["names"].tolist())
def test_scores_equal_the_public_programs(number):
    truth, prediction = (RECORDED[f"{kind}_{number:02d}"] > 0 for kind in ("truth", "prediction"))
    spacing = RECORDED["spacing"][number]
    found = {"dice": metrics.dice(truth, prediction)}
    found |= metrics.surface_scores(truth, prediction, spacing, [1, 2])
    found |= {f"monai_{name}": x for name, x in metrics.monai_scores(truth, prediction, spacing, [2]).items()}
    for name, expected in zip(RECORDED["columns"].tolist(), RECORDED["values"][number], strict=True):
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("number", PAIRS, ids=RECORDED["names"].tolist())
def test_scores_of_pictures_equal_the_public_program(number):
    masks = [RECORDED[f"{kind}_{number:02d}"] > 0 for kind in ("truth", "prediction")]
    fullest = int((masks[0] | masks[1]).sum((0, 1)).argmax())
    found = metrics.contour_scores(*(mask[..., fullest] for mask in masks), CONTOURS["spacing"], [1, 2])
    for name, expected in zip(CONTOURS["columns"].tolist(), CONTOURS["values"][number], strict=True):
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_plane_has_the_area_of_its_voxels():
    mask = np.zeros((6, 7, 8), bool)
    mask[:3] = True
    areas = metrics._surface_areas(np.pad(mask, 1, mode="edge"), np.array([1, 2, 3.0]))
    assert areas.sum() == pytest.approx(8 * 9 * 6)


def _balls(*centres):
    x, y, z = np.indices((30, 20, 20))
    return np.logical_or.reduce([(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 < 16 for a, b, c in centres])


def test_instances_are_matched_one_to_one():
    truth = _balls((5, 5, 5), (15, 5, 5), (25, 14, 14))
    assert metrics.instance_f1(truth, truth) == 1
    assert metrics.instance_f1(truth, _balls((5, 5, 5), (25, 14, 14))) == pytest.approx(2 * 2 / 5)
    assert metrics.instance_f1(truth, _balls((5, 5, 5), (15, 5, 5), (25, 5, 5))) == pytest.approx(2 * 2 / 6)
    assert metrics.instance_f1(truth, np.zeros_like(truth)) == 0
    assert math.isnan(metrics.instance_f1(truth & False, truth & False))
    with pytest.raises(ValueError, match="overlap"):
        metrics.instance_f1(truth, truth, 0.2)


def test_empty_volumes_in_means():
    truth, nothing = _balls((5, 5, 5)), np.zeros((30, 20, 20), bool)
    pairs = [(truth, truth), (nothing, nothing), (truth, nothing), (nothing, truth)]
    means = metrics.summary([metrics.volume_scores(*pair, (1, 1, 1), 2) for pair in pairs])
    assert (means["volumes"], means["both_empty"], means["one_empty"]) == (4, 1, 2)
    assert means["dice"] == pytest.approx(1 / 3) and means["nsd_2mm"] == pytest.approx(1 / 3)
    assert means["instance_f1"] == pytest.approx(1 / 3) and means["hd95"] == 0 and means["assd"] == 0


def test_masks_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        metrics.surface_scores(np.ones((2, 2, 2), bool), np.ones((2, 2, 3), bool), (1, 1, 1), [1])

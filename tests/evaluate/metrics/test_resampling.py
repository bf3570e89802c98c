"""Intervals and paired tests against scipy and by exact enumeration."""

import itertools

import numpy as np
import pytest
from scipy import stats

from medplib_jax.evaluate.metrics import Statistic, resampling
from medplib_jax.evaluate.metrics.resampling import bootstrap, grouped, intervals, paired_p_values


def mean(values):
    return Statistic(np.stack([values, np.ones(len(values))], axis=1))


def everyone(count):
    return np.arange(count)


def test_interval_equals_scipy():
    values = np.random.default_rng(0).beta(5, 2, 60)
    (resampled,) = bootstrap([(everyone(60), [mean(values)])], 60, seed=1)
    low, high = intervals(resampled)[:, 0]
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(2)
    ).confidence_interval
    assert (low, high) == pytest.approx(expected, abs=0.006)  # both are drawn


def test_interval_of_groups_is_wider_than_of_records():
    values = np.repeat(np.random.default_rng(0).random(40), 5)  # five equal answers about each image
    by_image = grouped(mean(values), np.repeat(np.arange(40), 5), 40)
    (records,), (images,) = (
        bootstrap([(everyone(200), [mean(values)])], 200, 3),
        bootstrap([(everyone(40), [by_image])], 40, 3),
    )
    width_of_records, width_of_images = (np.diff(intervals(resampled)[:, 0])[0] for resampled in (records, images))
    assert width_of_images == pytest.approx(width_of_records * 5**0.5, rel=0.1)


def test_blocks_see_the_same_resamples_in_any_chunks(monkeypatch):
    values = np.random.default_rng(0).random(30)
    half = np.arange(15)
    blocks = [(everyone(30), [mean(values)]), (half, [mean(values[:15]), mean(values[:15] + 1)])]
    whole, part = bootstrap(blocks, 30, seed=5)
    np.testing.assert_allclose(part[:, 1] - part[:, 0], 1, atol=1e-6)
    rest = Statistic(mean(values).parts * (np.arange(30) < 15)[:, None])
    np.testing.assert_allclose(bootstrap([(everyone(30), [rest])], 30, seed=5)[0][:, 0], part[:, 0], atol=1e-6)
    monkeypatch.setattr(resampling, "_CHUNK", 700)
    again, _ = bootstrap(blocks, 30, seed=5)
    np.testing.assert_allclose(again, whole, atol=1e-6)


def test_intervals_of_values_that_some_resamples_lack():
    values = np.tile(np.arange(100.0)[:, None], 3)
    values[:30, 1] = values[:60, 2] = np.nan
    found = intervals(values)
    np.testing.assert_allclose(found[:, 0], np.quantile(values[:, 0], [0.025, 0.975]))
    np.testing.assert_allclose(found[:, 1], np.quantile(values[30:, 1], [0.025, 0.975]))
    assert np.isnan(found[:, 2]).all()


def test_p_value_equals_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.random(50), rng.random(50) + 0.12
    ((p,),) = paired_p_values([(everyone(50), [(mean(a), mean(b))])], 50, seed=1)
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples", n_resamples=9999, rng=rng
    ).pvalue
    assert 0.01 < expected < 0.3 and p == pytest.approx(expected, abs=0.015)


def test_p_value_of_a_ratio_equals_enumeration():
    rng = np.random.default_rng(3)
    a, b = (Statistic(np.stack([rng.integers(0, 5, 8), rng.integers(5, 9, 8)], axis=1).astype(float)) for _ in range(2))
    ((p,),) = paired_p_values([(everyone(8), [(a, b)])], 8, seed=1)
    observed, extreme = abs(a.value() - b.value()), 0
    for swaps in itertools.product([False, True], repeat=8):
        swap = np.array(swaps)[:, None]
        difference = (
            Statistic(np.where(swap, b.parts, a.parts)).value() - Statistic(np.where(swap, a.parts, b.parts)).value()
        )
        extreme += abs(difference) >= observed - 1e-9
    assert p == pytest.approx(extreme / 256, abs=0.015)


def test_p_values_at_the_ends():
    same, other = mean(np.full(20, 0.5)), mean(np.full(20, 0.7))
    nothing = Statistic(np.zeros((20, 2)))
    ((equal, far, unknown),) = paired_p_values(
        [(everyone(20), [(same, same), (same, other), (same, nothing)])], 20, seed=0
    )
    assert equal == 1 and far <= 2 / (1 + resampling.PERMUTATIONS) and np.isnan(unknown)


def test_intervals_by_patient_cover_what_they_say():
    """500 drawn studies of 100 patients with 4 answers each that depend on the patient."""
    studies, patients, answers, rng = 500, 100, 4, np.random.default_rng(4)
    of_patient = rng.normal(0.5, 0.2, (studies, patients, 1))
    values = of_patient + rng.normal(0, 0.1, (studies, patients, answers))
    by_patient = [Statistic(np.stack([one.sum(1), np.full(patients, answers)], axis=1)) for one in values]
    (resampled,) = bootstrap([(everyone(patients), by_patient)], patients, seed=0)
    low, high = intervals(resampled)
    assert 0.93 <= np.mean((low <= 0.5) & (high >= 0.5)) <= 0.97
    closed_form = 2 * stats.norm.ppf(0.975) * values.mean(2).std(1, ddof=1) / patients**0.5
    np.testing.assert_allclose(high - low, closed_form, rtol=0.12)
    assert np.mean(high - low) == pytest.approx(np.mean(closed_form), rel=0.02)
    by_answer = [mean(one.ravel()) for one in values[:100]]
    (resampled,) = bootstrap([(everyone(patients * answers), by_answer)], patients * answers, seed=0)
    low, high = intervals(resampled)
    assert np.mean((low <= 0.5) & (high >= 0.5)) < 0.8  # answers about one patient are not independent


def test_p_value_of_right_and_wrong_is_mcnemars():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.1, 0.2):
        a, b = (rng.random(120) < 0.6).astype(float), (rng.random(120) < 0.6 + shift).astype(float)
        ((p,),) = paired_p_values([(everyone(120), [(mean(a), mean(b))])], 120, seed=2)
        only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
        exact = stats.binomtest(only_a, only_a + only_b).pvalue
        assert p == pytest.approx(exact, abs=0.015)


def test_p_value_of_signed_ranks_is_wilcoxons():
    rng = np.random.default_rng(2)
    for shift in (0.0, 0.3, 0.6):
        difference = rng.normal(shift, 1, 40)
        ranks = np.sign(difference) * stats.rankdata(np.abs(difference))
        ((p,),) = paired_p_values([(everyone(40), [(mean(ranks), mean(np.zeros(40)))])], 40, seed=3)
        assert p == pytest.approx(stats.wilcoxon(difference, method="exact").pvalue, abs=0.015)

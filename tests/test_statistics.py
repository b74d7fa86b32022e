"""Paired comparison against numbers worked out by hand and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, t

from crl_exp.statistics import bootstrap_interval, compare, mean_interval


def test_compare_by_hand() -> None:
    baseline = np.array([1.0, 1, 0, 0, 1, 0, 0, 1])
    steered = np.array([1.0, 0, 1, 1, 1, 1, 0, 1])
    changed = np.array([True, True, True, True, False, True, True, False])
    got = compare(baseline, steered, changed)
    assert (got.n, got.fixed, got.broken) == (8, 3, 1)
    assert got.accuracy_baseline == 0.5
    assert got.accuracy_steered == 0.75
    assert got.delta == 0.25
    assert got.ser == 0.25
    assert got.ser_all_changed == 1 / 6
    # 3 or more, or 1 or fewer, heads of 4: (4 + 1 + 4 + 1) / 16.
    assert got.p_value == pytest.approx(10 / 16)
    assert got.delta_ci95[0] < 0.25 < got.delta_ci95[1]


@pytest.mark.parametrize(("fixed", "broken"), [(0, 5), (12, 3), (40, 41), (1, 0)])
def test_p_value_is_mcnemars_exact_test(fixed: int, broken: int) -> None:
    same = 20
    baseline = np.array([0.0] * fixed + [1.0] * broken + [1.0] * same)
    steered = np.array([1.0] * fixed + [0.0] * broken + [1.0] * same)
    got = compare(baseline, steered, baseline != steered)
    assert got.p_value == pytest.approx(binomtest(fixed, fixed + broken).pvalue, rel=1e-12)
    swapped = compare(steered, baseline, baseline != steered)
    assert swapped.p_value == pytest.approx(got.p_value, rel=1e-12)
    assert swapped.delta == -got.delta


def test_graded_rewards_flip_at_one_half() -> None:
    baseline, steered = np.array([0.4, 0.5, 0.9]), np.array([0.5, 0.4, 0.6])
    got = compare(baseline, steered, np.array([True, True, True]))
    assert (got.fixed, got.broken) == (1, 1)
    assert got.delta == pytest.approx(-0.1)


def test_nothing_flips() -> None:
    scores = np.array([1.0, 0, 1])
    got = compare(scores, scores, np.zeros(3, bool))
    assert (got.p_value, got.ser, got.ser_all_changed) == (1.0, None, None)
    assert got.delta_ci95 == (0.0, 0.0)
    reworded = compare(scores, scores, np.array([True, False, False]))
    assert (reworded.ser, reworded.ser_all_changed) == (None, 0.0)


def test_one_item() -> None:
    got = compare(np.array([0.0]), np.array([1.0]), np.array([True]))
    assert (got.n, got.delta, got.p_value, got.delta_ci95) == (1, 1.0, 1.0, (1.0, 1.0))
    assert (got.ser, got.ser_all_changed) == (0.0, 0.0)


@pytest.mark.parametrize("n", [30, 300])
def test_bootstrap_interval_is_close_to_a_plain_resampling_loop(n: int) -> None:
    draw = np.random.default_rng(5)
    values = draw.choice([-1.0, 0.0, 1.0], size=n, p=[0.1, 0.6, 0.3])
    means = [draw.choice(values, size=n).mean() for _ in range(4000)]
    plain = np.quantile(means, [0.025, 0.975])
    half = (plain[1] - plain[0]) / 2
    # Means are multiples of 1/n, so that an end may fall on either of two neighbours.
    tolerance = max(0.1 * half, 1.01 / n)
    np.testing.assert_allclose(bootstrap_interval(values), plain, atol=tolerance)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_bootstrap_interval_of_many_different_values() -> None:
    values = np.random.default_rng(6).normal(2.0, 3.0, size=400)
    half = 1.96 * values.std() / np.sqrt(400)
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_mean_interval() -> None:
    values = np.array([0.80, 0.84, 0.85])
    half = t.ppf(0.975, 2) * np.sqrt(((values - values.mean()) ** 2).sum() / 2) / np.sqrt(3)
    assert mean_interval(values) == pytest.approx((0.83 - half, 0.83 + half))
    # By hand: deviations -.03, .01, .02; s² = .0007; t = 4.3027.
    assert half == pytest.approx(4.3027 * (0.0007 / 3) ** 0.5, rel=1e-4)
    assert mean_interval(np.array([0.7])) == (0.7, 0.7)

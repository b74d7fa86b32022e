"""Paired comparison against numbers worked out by hand and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, t

from crl_exp.analysis import statistics
from crl_exp.analysis.statistics import (
    accuracy_interval,
    bootstrap_interval,
    compare,
    crossed,
    crossed_difference,
    share_interval,
)


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


def test_many_different_values_are_drawn_some_resamples_at_a_time(monkeypatch) -> None:
    """Each resample of 100,000 different rewards is as many numbers."""
    values = np.random.default_rng(7).random(50)
    whole = bootstrap_interval(values)
    monkeypatch.setattr(statistics, "DRAWN_TOGETHER", 50 * 7)
    np.testing.assert_allclose(bootstrap_interval(values), whole, rtol=1e-12)


def test_bootstrap_interval_of_many_different_values() -> None:
    values = np.random.default_rng(6).normal(2.0, 3.0, size=400)
    half = 1.96 * values.std() / np.sqrt(400)
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_crossed_by_hand() -> None:
    """Two seeds, four items: item means 1, .5, .5, 0; seed means .75 and .25."""
    value_SI = np.array([[1.0, 1, 1, 0], [1.0, 0, 0, 0]])
    got = crossed(value_SI)
    assert (got.mean, got.n, got.df) == (0.5, 4, 1)
    assert got.v_items == pytest.approx((0.25 + 0 + 0 + 0.25) / 4 / 4)
    # One seed's items: variance 3/16 each, v = 3/64; noise (3/64 - 2/64) / (2 - 1).
    assert got.v_seeds == pytest.approx(0.125 / 2 - 1 / 64)
    half = np.sqrt(1.959964**2 / 32 + 12.7062**2 * 3 / 64)
    assert got.interval == pytest.approx((0.5 - half, 0.5 + half), rel=1e-5)


def test_one_seed_is_over_its_items_alone() -> None:
    values = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], size=500, p=[0.1, 0.6, 0.3])
    got = crossed(values[None])
    assert got.half() == pytest.approx(1.959964 * values.std() / np.sqrt(500), rel=1e-6)
    assert crossed(np.stack([values] * 4)).interval == pytest.approx(got.interval)


def test_seeds_without_deviation_of_their_own_add_nothing() -> None:
    assert crossed(np.array([[1.0, 0, 1, 0], [0.0, 1, 0, 1], [1.0, 1, 0, 0]])).v_seeds == 0


def test_p_is_one_minus_the_level_of_the_interval_that_reaches_zero() -> None:
    draw = np.random.default_rng(4)
    for shift in (0.01, 0.05, 0.1):
        got = crossed(draw.normal(shift, 1.0, (3, 400)) + draw.normal(0, 0.02, (3, 1)))
        assert got.half(1 - got.p_value) == pytest.approx(abs(got.mean), rel=1e-4)
        assert (got.p_value < 0.05) == (abs(got.mean) > got.half())


def test_p_at_the_ends() -> None:
    assert crossed(np.zeros((3, 10))).p_value == 1.0
    assert crossed(np.ones((3, 10))).p_value == 2.0**-9
    assert 0 <= crossed(np.tile([1.0, 1, 1, 1, 1, 1, 1, 0.999], (3, 1000))).p_value < 1e-100


def test_difference_is_paired_by_item() -> None:
    """Two methods that get the same items right differ by nothing, whatever the items."""
    right = np.random.default_rng(5).integers(0, 2, 300).astype(float)
    same = crossed_difference(np.stack([right] * 3), right[None])
    assert (same.mean, same.half(), same.p_value) == (0, 0, 1)
    better = right.copy()
    better[:6] = 1 - better[:6]
    got = crossed_difference(better[None], right[None])
    assert got.half() == pytest.approx(1.959964 * (better - right).std() / np.sqrt(300), rel=1e-6)


def test_difference_has_the_seeds_of_both() -> None:
    draw = np.random.default_rng(6)
    items = draw.normal(size=(1, 50_000))
    a = items + 1e-3 * draw.normal(size=(3, 50_000)) + np.array([[0.1], [0.2], [0.3]])
    b = items + 1e-3 * draw.normal(size=(5, 50_000)) + np.array([[0.0], [0.1], [0.2], [0.1], [0.1]])
    got = crossed_difference(a, b)
    va, vb = 0.01 / 3, 0.005 / 5
    df = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 4)  # Welch's
    assert got.df == pytest.approx(df, rel=0.01)
    assert got.half() == pytest.approx(t.ppf(0.975, df) * np.sqrt(va + vb), rel=0.01)


def test_accuracy_of_zeros_and_ones_is_wilsons() -> None:
    rewards = np.repeat([1.0, 0.0], [30, 70])
    assert accuracy_interval(crossed(rewards[None])) == pytest.approx(share_interval(0.3, 100))
    nothing, everything = np.zeros((1, 20)), np.ones((3, 20))
    assert accuracy_interval(crossed(nothing)) == share_interval(0.0, 20)
    assert accuracy_interval(crossed(everything)) == share_interval(1.0, 20)
    same = np.full((1, 20), 0.3)
    assert accuracy_interval(crossed(same)) == pytest.approx(share_interval(0.3, 20))


def test_accuracy_of_fractions_is_as_sure_as_their_variance_says() -> None:
    rewards = np.random.default_rng(7).beta(8, 4, 400)
    low, high = accuracy_interval(crossed(rewards[None]))
    half = 1.959964 * rewards.std() / 20
    assert (high - low) / 2 == pytest.approx(half, rel=0.02)


def test_accuracy_holds_the_seeds() -> None:
    rewards = np.zeros((3, 1000))
    for seed, right in enumerate((500, 600, 700)):
        rewards[seed, :right] = 1
    low, high = accuracy_interval(crossed(rewards))
    assert high - low > 0.4  # t(2) = 4.3 times .1 / √3, both ways

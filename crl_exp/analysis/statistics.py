"""Paired comparison of scores on the same items, over seeds. No accuracy without n and interval.

docs/statistics.md has each formula with its source and its simulated coverage.
Shapes: S seeds, I items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

RESAMPLES = 10_000
# What scipy.stats calls for norm and t, without its import, which takes longer than all of ours.
Z = float(ndtri(0.975))


@dataclass(frozen=True)
class Comparison:
    """Steered against baseline on the same n items.

    delta: difference of the mean rewards. delta_ci95: paired percentile bootstrap over items.
    p_value: McNemar's exact test on the items whose right/wrong changed; where rewards aren't all 0
    or 1, of the mean difference over items (`p_of_items`). fixed, broken: items that
    became right or wrong. ser: side-effect ratio broken / (fixed + broken), null where neither.
    ser_all_changed: broken / all items whose output changed, null where none did.
    """

    n: int
    accuracy_baseline: float
    accuracy_steered: float
    delta: float
    delta_ci95: tuple[float, float]
    p_value: float
    fixed: int
    broken: int
    ser: float | None
    ser_all_changed: float | None


def compare(baseline: np.ndarray, steered: np.ndarray, changed: np.ndarray) -> Comparison:
    """Compare rewards [n] of the same items; `changed` [n] marks outputs that differ."""
    assert len(baseline) == len(steered) == len(changed) > 0
    was, now = baseline >= 0.5, steered >= 0.5
    fixed, broken = int((~was & now).sum()), int((was & ~now).sum())
    flips, n_changed = fixed + broken, int(changed.sum())
    return Comparison(
        n=len(baseline),
        accuracy_baseline=float(baseline.mean()),
        accuracy_steered=float(steered.mean()),
        delta=float((steered - baseline).mean()),
        delta_ci95=bootstrap_interval(steered - baseline),
        p_value=p_of_items(baseline, steered),
        fixed=fixed,
        broken=broken,
        ser=broken / flips if flips else None,
        ser_all_changed=broken / n_changed if n_changed else None,
    )


def all_or_nothing(*rewards: np.ndarray) -> bool:
    """Whether all rewards are 0 or 1."""
    return all(bool(np.isin(some, (0, 1)).all()) for some in rewards)


def p_of_items(baseline: np.ndarray, steered: np.ndarray) -> float:
    """That rewards [n] of the same items differ by nothing: McNemar's exact test where all are 0 or
    1; else one minus the level of the normal interval of Δ that just reaches 0, since McNemar's
    sees only which items cross .5. NaN where a reward isn't finite."""
    if not all_or_nothing(baseline, steered):
        return crossed((steered - baseline)[None]).p_value
    return mcnemar(int((steered > baseline).sum()), int((steered < baseline).sum()))


def mcnemar(fixed: int, broken: int) -> float:
    """McNemar's exact test: were as many items fixed as broken? Two-sided (McNemar 1947)."""
    from scipy.stats import binomtest

    flips = fixed + broken
    return float(binomtest(fixed, flips, 0.5).pvalue) if flips else 1.0


DRAWN_TOGETHER = 10_000_000


def bootstrap_interval(values: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values` [n], over items, seed fixed.

    Equal values are drawn together (a multinomial over the distinct ones), which is the same
    distribution as drawing items one by one and costs nothing for large n with few values; many
    different ones are drawn some resamples at a time, `DRAWN_TOGETHER` numbers of them.
    """
    distinct, counts = np.unique(values, return_counts=True)
    n, draw = len(values), np.random.default_rng(0)
    at_a_time = max(1, DRAWN_TOGETHER // len(distinct))
    sizes = [min(at_a_time, resamples - at) for at in range(0, resamples, at_a_time)]
    means = np.concatenate(
        [draw.multinomial(n, counts / n, size=size) @ distinct / n for size in sizes]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Crossed:
    """A mean over items and seeds, both drawn from many: mean = μ + item + seed + noise.

    v_items: variance of the mean that the items cause, noise included, σ_a²/I + σ_e²/(I·S).
    v_seeds: that the seeds cause beyond it, σ_b²/S; 0 where there is one seed, whose own deviation
    can't be known, so that interval and p-value are then those of this one run.
    df: degrees of freedom of `v_seeds`. n: items.

    half² = (z·√v_items)² + (t·√v_seeds)²: a normal quantile for the items, which are many,
    Student's for the seeds, which are few; variances as in Searle, Casella & McCulloch (1992). That
    of the seeds' means holds the noise too, which `v_items` has already: it is taken off.
    """

    mean: float
    v_items: float
    v_seeds: float
    df: float
    n: int

    def half(self, level: float = 0.95) -> float:
        """Half the width of the interval of this level."""
        z, upper = -ndtri((1 - level) / 2), 1 - (1 - level) / 2
        seeds = stdtrit(self.df, upper) ** 2 * self.v_seeds if self.v_seeds else 0.0
        return float(np.sqrt(z**2 * self.v_items + seeds))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean."""
        half = self.half()
        return self.mean - half, self.mean + half

    @property
    def p_value(self) -> float:
        """Of no difference: one minus the level of the interval that just reaches 0, so that p and
        interval never disagree. Where nothing varies: a sign test's, 2^(1 - n). NaN where the mean
        or a variance isn't finite."""
        if not np.isfinite([self.mean, self.v_items, self.v_seeds]).all():
            return float("nan")
        if self.mean == 0:
            return 1.0
        if self.v_items + self.v_seeds == 0:
            return float(min(1.0, 2.0 ** (1 - self.n)))

        from scipy.optimize import brentq

        def beyond(log_p: float) -> float:
            p = np.exp(log_p)
            z2 = ndtri(p / 2) ** 2 * self.v_items
            t2 = stdtrit(self.df, p / 2) ** 2 * self.v_seeds if self.v_seeds else 0.0
            return float(z2 + t2 - self.mean**2)

        lowest = -300.0  # p = 1e-130; below it t² overflows
        if beyond(lowest) <= 0:
            return 0.0
        log_p: Any = brentq(beyond, lowest, 0.0)
        return float(np.exp(log_p))

    def minus(self, other: Crossed, v_items: float) -> Crossed:
        """The difference of two means with seeds of their own, df after Welch (1947).

        v_items: of the difference, paired by item.
        """
        v_seeds = self.v_seeds + other.v_seeds
        parts = sum(one.v_seeds**2 / one.df for one in (self, other) if one.v_seeds)
        df = v_seeds**2 / parts if parts else 1.0
        return Crossed(self.mean - other.mean, v_items, v_seeds, df, self.n)


def crossed(value_SI: np.ndarray) -> Crossed:
    """Of values of the same items under each seed, [S, I]."""
    n = value_SI.shape[1]
    v_items = float(value_SI.mean(axis=0).var()) / n
    v_of_one = float(value_SI.var(axis=1).mean()) / n
    return crossed_parts(value_SI.mean(axis=1), v_items, v_of_one, n)


def crossed_parts(
    value_S: np.ndarray, v_items: float, v_of_one: float, n: int, taken_off: float = 1.0
) -> Crossed:
    """Of each seed's value over all items, and two variances that the items cause: of the seeds'
    mean, and of one seed's value.

    Where single items aren't known, `v_of_one` for both: somewhat too wide. taken_off: the share of
    the noise that is taken off the variance of the seeds' means.
    """
    n_seeds = len(value_S)
    if n_seeds == 1:
        return Crossed(float(value_S[0]), v_items, 0.0, 1.0, n)
    noise = max(v_of_one - v_items, 0.0) / (n_seeds - 1)  # σ_e²/(I·S)
    v_seeds = max(float(value_S.var(ddof=1)) / n_seeds - taken_off * noise, 0.0)
    return Crossed(float(value_S.mean()), v_items, v_seeds, n_seeds - 1.0, n)


def crossed_difference(a_SI: np.ndarray, b_SI: np.ndarray) -> Crossed:
    """Of values a minus values b of the same items [S, I]; each has its own seeds."""
    d_I = a_SI.mean(axis=0) - b_SI.mean(axis=0)
    return crossed(a_SI).minus(crossed(b_SI), float(d_I.var()) / len(d_I))


def share_interval(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n items: Wilson's score interval (Wilson 1927)."""
    z2 = Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def accuracy_interval(estimate: Crossed) -> tuple[float, float]:
    """95 % interval of a mean reward in [0, 1], over items and seeds.

    Wilson's at the number of items that shares of 0 and 1 would need to be as uncertain (an
    effective sample size, Korn & Graubard 1998): n itself for one seed and rewards of 0 and 1, more
    for rewards between, fewer where seeds differ.
    """
    share = min(max(estimate.mean, 0.0), 1.0)
    half, binomial = estimate.half(), share * (1 - share)
    if half < 1e-9 or binomial == 0:  # all rewards alike: their variance tells nothing
        return share_interval(share, estimate.n)
    return share_interval(share, Z**2 * binomial / half**2)

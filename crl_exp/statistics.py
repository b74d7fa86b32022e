"""Paired comparison of two sets of scores on the same items. No accuracy without n and interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """Steered against baseline on the same n items.

    delta: difference of the mean rewards. delta_ci95: paired percentile bootstrap over items.
    p_value: McNemar's exact test on the items whose right/wrong changed. fixed, broken: items that
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
        p_value=float(binomtest(fixed, flips, 0.5).pvalue) if flips else 1.0,
        fixed=fixed,
        broken=broken,
        ser=broken / flips if flips else None,
        ser_all_changed=broken / n_changed if n_changed else None,
    )


def bootstrap_interval(values: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values` [n], over items, seed fixed.

    Equal values are drawn together (a multinomial over the distinct ones), which is the same
    distribution as drawing items one by one and costs nothing for large n.
    """
    distinct, counts = np.unique(values, return_counts=True)
    n = len(values)
    draws = np.random.default_rng(0).multinomial(n, counts / n, size=resamples)
    means = draws @ distinct / n
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of a few values (seeds), Student's t. Equal ends for one value."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return float(values[0]), float(values[0])
    half = t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)
    return float(values.mean() - half), float(values.mean() + half)


def share_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a mean reward in [0, 1] over n items: Wilson's score interval.

    Exactly that for rewards of 0 and 1 (Wilson 1927); for rewards between, whose variance is
    smaller, it is on the safe side.
    """
    z2 = 1.959963984540054**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))

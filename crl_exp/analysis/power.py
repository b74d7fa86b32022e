"""What a sweep can show: the smallest difference that it finds in four of five cases.

The test is that of `statistics.Crossed`: one is found where its 95 % interval leaves out 0.
docs/statistics.md has the formula and what simulation says of it. Shapes: S seeds, I items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import gammaincinv, ndtr, stdtrit

from crl_exp.analysis.statistics import Z

POWER = 0.8
TARGET = 0.02  # the difference that one would like to find
MOST_ITEMS, MOST_SEEDS = 10**7, 10**4
# Mid-points of equal parts of the distribution that a seed's variance is estimated with.
QUANTILES = (np.arange(400) + 0.5) / 400


@dataclass(frozen=True)
class Spread:
    """Variances of one item's difference under one seed: of the items, σ_a²; of the seeds, σ_b²
    (None where a single one was run: not known); of both together, σ_e².
    """

    items: float
    seeds: float | None = None
    noise: float = 0.0

    @classmethod
    def assumed(cls, change: float, seed_deviation: float) -> Spread:
        """Before anything was run. change: share of the items that come right or go wrong, the same
        ones whatever the seed; seed_deviation: standard deviation of the seeds' differences."""
        return cls(change, seed_deviation**2)

    @classmethod
    def measured(cls, delta_SI: np.ndarray) -> Spread:
        """From the differences of the same items under each seed: a two-way analysis of variance
        without replication (Searle, Casella & McCulloch 1992). What comes out below 0 is 0."""
        n_seeds, n = delta_SI.shape
        if n_seeds == 1:
            return cls(float(delta_SI.var()))
        of_items, of_seeds = delta_SI.mean(axis=0), delta_SI.mean(axis=1)
        rest_SI = delta_SI - of_items - of_seeds[:, None] + delta_SI.mean()
        noise = float((rest_SI**2).sum()) / ((n_seeds - 1) * max(n - 1, 1))
        items = max(float(of_items.var()) - noise / n_seeds, 0.0)
        return cls(items, max(float(of_seeds.var(ddof=1)) - noise / n, 0.0), noise)


def power(delta: float, spread: Spread, n: int, n_seeds: int) -> float:
    """Probability that the interval leaves out 0 where the difference is `delta`.

    Averaged over the χ² distribution of the seeds' estimated variance; items are taken to be many.
    One seed: of that one run's difference.
    """
    noise = spread.noise / (n * n_seeds)
    v_items = spread.items / n + noise
    if n_seeds == 1:
        half, spread_of_mean = Z * np.sqrt(v_items), v_items
    else:
        v_seeds = (spread.seeds or 0.0) / n_seeds
        df = n_seeds - 1
        chi2, t = _quantiles(df)
        estimated = np.maximum((v_seeds + noise) * chi2 / df - noise, 0.0)
        half = np.sqrt(Z**2 * v_items + t**2 * estimated)
        spread_of_mean = v_items + v_seeds
    if spread_of_mean == 0:
        return float(delta != 0)
    sd = np.sqrt(spread_of_mean)
    return float(np.mean(ndtr((delta - half) / sd) + ndtr((-delta - half) / sd)))


@lru_cache(maxsize=1024)
def _quantiles(df: int) -> tuple[np.ndarray, float]:
    """Of χ² at `QUANTILES`, and Student's t at .975."""
    return 2 * gammaincinv(df / 2, QUANTILES), stdtrit(df, 0.975)


def smallest_difference(spread: Spread, n: int, n_seeds: int) -> float:
    """The difference that is found in four of five cases. One seed, differences of 0 and 1 of which
    a share c isn't 0: (1.96 + 0.84)·√(c/n). NaN where a variance isn't finite."""
    if not np.isfinite([spread.items, spread.seeds or 0.0, spread.noise]).all():
        return float("nan")
    if power(1e-12, spread, n, n_seeds) >= POWER:
        return 0.0
    from scipy.optimize import brentq

    top = 0.001
    while power(top, spread, n, n_seeds) < POWER:
        top *= 2
    found: Any = brentq(lambda delta: power(delta, spread, n, n_seeds) - POWER, 0.0, top)
    return float(found)


def items_needed(spread: Spread, n_seeds: int, target: float = TARGET) -> int | None:
    """Items with which these seeds find `target`; None where no number does (the seeds differ too
    much)."""
    return _fewest(lambda n: power(target, spread, n, n_seeds) >= POWER, 1, MOST_ITEMS)


def seeds_needed(spread: Spread, n: int, target: float = TARGET) -> int | None:
    """Seeds, two or more, with which these items find `target`; None where no number does."""
    return _fewest(lambda seeds: power(target, spread, n, seeds) >= POWER, 2, MOST_SEEDS)


def both_needed(spread: Spread, n_seeds: int, target: float = TARGET) -> tuple[int, int] | None:
    """Items and seeds that find `target` together: these seeds, or the fewest more with which no
    more than twice the items are needed that any number of seeds would need."""
    least = items_needed(spread, MOST_SEEDS, target)
    for seeds in range(n_seeds, MOST_SEEDS if least else 0):
        n = items_needed(spread, seeds, target)
        if n is not None and least is not None and n <= 2 * least:
            return n, seeds
    return None


def _fewest(enough: Callable[[int], bool], least: int, most: int) -> int | None:
    """The smallest number that is enough; more of them never are too few."""
    if not enough(most):
        return None
    low, high = least - 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high

"""Choosing on few items: how much better than it is the best of several options will look.

The best of m options that are equally good looks better than it is by E_m·√(v/n) on average: E_m is
the mean of the largest of m standard normal draws, v the variance of an item's reward between
options beyond what they share (the winner's curse; Efron & Tibshirani 1993, chapter 17, on the
optimism of a choice; docs/statistics.md). Shapes: M options, I items.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtri

NOTICEABLE = 0.02  # two points: what one would like to tell apart
MIDPOINTS = (np.arange(20_000) + 0.5) / 20_000


def expected_largest(m: int) -> float:
    """Mean of the largest of m standard normal draws, from its quantile function."""
    return float(ndtri(MIDPOINTS ** (1 / m)).mean())


def winners_curse(reward_MI: np.ndarray) -> float:
    """By how much the best of these options is expected to look better than it is, were all equally
    good; 0 for one option."""
    m, n = reward_MI.shape
    if m < 2 or n == 0:
        return 0.0
    apart_MI = reward_MI - reward_MI.mean(axis=0)
    variance = float(apart_MI.var(axis=1).sum()) / (m - 1)
    return expected_largest(m) * math.sqrt(variance / n)


class Tried:
    """What a run tried on its validation split, and what each item got."""

    def __init__(self) -> None:
        self._rewards: list[np.ndarray] = []

    def add(self, reward_I: np.ndarray) -> None:
        self._rewards.append(reward_I)

    def warning(self) -> str | None:
        """What to say where the split is too small for a choice among so many."""
        if len(self._rewards) < 2:
            return None
        reward_MI = np.stack(self._rewards)
        reward_MI = reward_MI[
            :, np.isfinite(reward_MI).all(axis=0)
        ]  # undefined rewards say nothing
        (m, n), curse = reward_MI.shape, winners_curse(reward_MI)
        if not curse >= NOTICEABLE:  # NaN of undefined rewards, which are warned of, too
            return None
        wanted = math.ceil(n * (curse / NOTICEABLE) ** 2)
        return (
            f"{n} validation items are few to choose among {m} options tried on them: the best of "
            f"{m} that were equally good would look {100 * curse:.1f} points better there than it "
            f"is, by luck (winner's curse). About {wanted} items bring that to "
            f"{100 * NOTICEABLE:.0f} points: task.n_validation={wanted}, and a smaller "
            "task.n_train where both are drawn from one split; or try fewer options"
        )

"""Choosing on few items: how much better than it is the best of several options will look.

Whoever chooses says here what was tried and what each item got (`Workspace.tried`); the result
holds it under `choices`, and warns from two points on. The best of options that are equally good
looks better than it is by E[max_m Z_m]: Z is normal, its covariance that of the items' rewards over
n. So what options share costs nothing, and neighbours (thresholds, a policy after one update more)
cost less than strangers. It is drawn by the multiplier bootstrap (Chernozhukov, Chetverikov & Kato
2013); of independent options it is E_m·√(v/n), E_m being the mean of the largest of m standard
normal draws (the winner's curse; docs/statistics.md). Shapes: M options, I items, X draws.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import ndtri

NOTICEABLE = 0.02  # two points: what one would like to tell apart
MIDPOINTS = (np.arange(20_000) + 0.5) / 20_000
DRAWS = 1000
CLEARLY_WORSE = 2.0
"""Standard errors of the difference. An option that is so far below the best one there was no rival
of it; of equals hardly one that matters is left out (as in Hansen 2005)."""


def expected_largest(m: int) -> float:
    """Mean of the largest of m standard normal draws, from its quantile function."""
    return float(ndtri(MIDPOINTS ** (1 / m)).mean())


def rivals(reward_MI: np.ndarray) -> np.ndarray:
    """Those that aren't clearly worse than the best one, of equal ones one."""
    below_MI = reward_MI[reward_MI.mean(axis=1).argmax()] - reward_MI
    error_M = np.sqrt(below_MI.var(axis=1) / reward_MI.shape[1])
    return np.unique(reward_MI[below_MI.mean(axis=1) <= CLEARLY_WORSE * error_M], axis=0)


def winners_curse(reward_MI: np.ndarray) -> float:
    """By how much the best of these options is expected to look better than it is, were those that
    aren't clearly worse all equally good; 0 for one option."""
    m, n = reward_MI.shape
    if m < 2 or n == 0:
        return 0.0
    apart_MI = rivals(reward_MI)
    apart_MI = apart_MI - apart_MI.mean(axis=1, keepdims=True)
    apart_MI -= apart_MI.mean(axis=0)  # what all share
    normal_IX = np.random.default_rng(0).standard_normal((n, DRAWS))
    return float((apart_MI @ normal_IX).max(axis=0).mean()) / n


class Tried:
    """What a run tried, by what was chosen among, and what each item got."""

    def __init__(self) -> None:
        self._rewards: dict[tuple[str, str], list[np.ndarray]] = {}

    def add(self, reward_I: np.ndarray, among: str = "options", split: str = "validation") -> None:
        """among: what it is one of, for the message. split: whose items they are."""
        self._rewards.setdefault((among, split), []).append(np.asarray(reward_I, dtype=np.float32))

    def choices(self) -> list[dict[str, Any]]:
        """For the result: each choice, among how many candidates on how many items, and by how much
        the best of equals would look better there than it is. Undefined rewards say nothing."""
        found = []
        for (among, split), rewards in self._rewards.items():
            reward_MI = np.stack(rewards)
            reward_MI = reward_MI[:, np.isfinite(reward_MI).all(axis=0)]
            if len(rewards) > 1 and reward_MI.size:
                curse = winners_curse(reward_MI.astype(float))
                found.append({"among": among, "candidates": len(rewards), "split": split,
                              "items": reward_MI.shape[1], "winners_curse": curse})  # fmt: skip
        return found


def warnings(choices: list[dict[str, Any]]) -> list[str]:
    """What to say where a split is too small for a choice among so many."""
    return [_warning(**choice) for choice in choices if choice["winners_curse"] >= NOTICEABLE]


def _warning(among: str, candidates: int, split: str, items: int, winners_curse: float) -> str:
    size = {"validation": "n_validation", "train": "n_train"}[split]
    wanted = math.ceil(items * (winners_curse / NOTICEABLE) ** 2)
    other = {"validation": "n_train", "train": "n_validation"}[split]
    return (
        f"{items} {split} items are few to choose among {candidates} {among} tried on them: the "
        f"best of those that aren't clearly worse, were they equally good, would look "
        f"{100 * winners_curse:.1f} points better there than it is, by luck (winner's curse). "
        f"About {wanted} items bring that to {100 * NOTICEABLE:.0f} points: task.{size}={wanted}, "
        f"and a smaller task.{other} where both are drawn from one split; or try fewer {among}"
    )

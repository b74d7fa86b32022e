"""What runs that differ in their seed say together, from the rewards of their items.

Where a run has no rewards by item (it was made before there was an items.parquet), what single runs
say of themselves stands in; intervals are then somewhat too wide. Reports and MLflow have their
figures from here. Shapes: S seeds, I items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from crl_exp.analysis.statistics import (
    Crossed,
    Z,
    accuracy_interval,
    all_or_nothing,
    compare,
    crossed,
    crossed_parts,
)


def as_float(value: float | None) -> float:
    """A figure of a result; an undefined one, which is null there, is NaN."""
    return np.nan if value is None else float(value)


def ends_of(figures: dict[str, Any]) -> tuple[float, float]:
    """The interval of a result's difference."""
    low, high = map(as_float, figures["delta_ci95"])
    return low, high


@dataclass(frozen=True)
class Samples:
    """Rewards of the same items under each seed. groups: of each item; None: not known."""

    ids: tuple[str, ...]
    baseline_SI: np.ndarray
    steered_SI: np.ndarray
    groups: tuple[str, ...] | None = None

    @property
    def delta_SI(self) -> np.ndarray:
        return self.steered_SI - self.baseline_SI

    def of_group(self, group: str) -> Samples:
        """Those of the items that are in this group. For samples whose groups are known."""
        assert self.groups is not None
        at = [i for i, name in enumerate(self.groups) if name == group]
        ids = tuple(self.ids[i] for i in at)
        return Samples(ids, self.baseline_SI[:, at], self.steered_SI[:, at], (group,) * len(at))


@dataclass(frozen=True)
class Estimates:
    """Of runs that differ in nothing but their seed, on one test set.

    figures: each run's own. samples: None where some run has no rewards by item.
    """

    figures: tuple[dict[str, Any], ...]
    samples: Samples | None

    def values(self, key: str) -> np.ndarray:
        return np.array([figures[key] for figures in self.figures], dtype=float)

    @property
    def alike(self) -> bool:
        """Whether there is one seed, or all got the same: seeds then add no uncertainty."""
        if self.samples is not None:
            delta_SI = self.samples.delta_SI
            return all(np.array_equal(one, delta_SI[0], equal_nan=True) for one in delta_SI)
        return not any(np.ptp(self.values(key)) for key in ("delta", "accuracy_steered"))

    @property
    def n(self) -> int:
        return int(self.figures[0]["n"])

    @property
    def delta(self) -> Crossed:
        """Steered minus unsteered."""
        if self.samples is not None:
            return crossed(self.samples.delta_SI)
        v_items = np.mean([_half(ends_of(figures)) ** 2 for figures in self.figures]) / Z**2
        return crossed_parts(self.values("delta"), float(v_items), float(v_items), self.n)

    @property
    def accuracy(self) -> Crossed:
        """Of the steered answers."""
        if self.samples is not None:
            return crossed(self.samples.steered_SI)
        share_S = self.values("accuracy_steered")
        # The largest variance that a reward in [0, 1] of this mean can have.
        v_items = float((share_S * (1 - share_S)).mean()) / self.n
        return crossed_parts(share_S, v_items, v_items, self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of delta, over items and seeds; for one seed, or where all got the same,
        the run's own paired bootstrap over items."""
        if self.alike:
            return ends_of(self.figures[0])
        return self.delta.interval

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % interval of the steered accuracy, over items and seeds."""
        return accuracy_interval(self.accuracy)

    @property
    def p_value(self) -> float:
        """That the difference is none. One seed, or where all got the same: McNemar's exact test,
        or over items where rewards are fractional; else over items and seeds, as the interval."""
        if not self.alike:
            return self.delta.p_value
        if self.samples is not None and self.fractional:
            return crossed(self.samples.delta_SI[:1]).p_value
        return as_float(self.figures[0]["p_value"])

    @property
    def fractional(self) -> bool:
        """Whether rewards are known not to be all 0 or 1."""
        found = self.samples
        return found is not None and not all_or_nothing(found.baseline_SI, found.steered_SI)

    @property
    def groups(self) -> list[str]:
        """The items' groups, the largest first; empty where they aren't known."""
        if self.samples is None or self.samples.groups is None:
            return []
        count = Counter(self.samples.groups)
        return sorted(count, key=lambda name: (-count[name], name))

    @cached_property
    def by_group(self) -> dict[str, Estimates]:
        """Of each group's items alone, largest group first; empty where groups aren't known.

        Their figures are those of the first seed, which are asked only where seeds are alike.
        """
        found = {}
        for group in self.groups:
            assert self.samples is not None
            part = self.samples.of_group(group)
            was, now = part.baseline_SI[0], part.steered_SI[0]
            found[group] = Estimates((asdict(compare(was, now, was != now)),), part)
        return found


def _half(interval: Sequence[float]) -> float:
    return (interval[1] - interval[0]) / 2

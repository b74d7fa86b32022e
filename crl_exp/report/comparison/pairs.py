"""Two rows of runs against each other, item by item. Shapes: S seeds, I items."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from crl_exp.analysis.estimates import Estimates, Samples
from crl_exp.analysis.statistics import Crossed, all_or_nothing, compare, crossed_difference
from crl_exp.report.comparison.rows import Row, SweepComparison, holm
from crl_exp.runs.items import ItemRewards, aligned

RIGHT = 0.5  # as in `statistics.compare`


@dataclass(frozen=True)
class Difference:
    """Rewards of one side minus those of the other, on the same items.

    interval: 95 %. p_value, test: McNemar's exact test where each side has one seed, or seeds that
    all got the same (over items where rewards aren't all 0 or 1); else over items and seeds, as
    the interval.
    better, worse: items that are right on the one side and wrong on the other, mean over all pairs
    of seeds. paired: False where some run has no rewards by item: the interval is then that of two
    unpaired samples, too wide, and better and worse are unknown.
    """

    value: float
    interval: tuple[float, float]
    p_value: float
    test: str
    better: float | None
    worse: float | None
    n: int
    paired: bool
    n_seeds: tuple[int, int]


def difference(ours: Estimates, theirs: Estimates) -> Difference:
    """Of rows whose items are the same, in one order (`same_items`)."""
    mine, other = ours.samples, theirs.samples
    counts = (len(ours.figures), len(theirs.figures))
    if mine is None or other is None:
        a, b = ours.accuracy, theirs.accuracy
        return _crossed(a.minus(b, a.v_items + b.v_items), counts, paired=False)
    assert mine.ids == other.ids
    a_SI, b_SI = mine.steered_SI, other.steered_SI
    if _alike(a_SI) and _alike(b_SI):
        found = compare(b_SI[0], a_SI[0], a_SI[0] != b_SI[0])
        return Difference(
            found.delta, found.delta_ci95, found.p_value,
            "McNemar" if all_or_nothing(a_SI[0], b_SI[0]) else "items", found.fixed, found.broken,
            found.n, True, counts,
        )  # fmt: skip
    made = _crossed(crossed_difference(a_SI, b_SI), counts, paired=True)
    right_a, right_b = right_shares(mine), right_shares(other)
    better = float((right_a * (1 - right_b)).sum())
    worse = float((right_b * (1 - right_a)).sum())
    return replace(made, better=better, worse=worse)


def _crossed(found: Crossed, counts: tuple[int, int], paired: bool) -> Difference:
    return Difference(
        found.mean, found.interval, found.p_value, "items and seeds", None, None, found.n, paired,
        counts,
    )  # fmt: skip


def _alike(value_SI: np.ndarray) -> bool:
    return all(np.array_equal(one, value_SI[0], equal_nan=True) for one in value_SI)


def right_shares(samples: Samples) -> np.ndarray:
    """Of each item the share of the seeds that got it right [I]."""
    return (samples.steered_SI >= RIGHT).mean(axis=0)


def same_items(ours: Row, theirs: Row, test_set: str | None = None) -> tuple[Estimates, Estimates]:
    """What two rows say, the items of the second in the order of the first.

    Raises `UserError` with counts where they are not the same items.
    """
    mine, other = ours.estimates(test_set), theirs.estimates(test_set)
    if mine.samples is None or other.samples is None or mine.samples.ids == other.samples.ids:
        return mine, other
    at = {item: i for i, item in enumerate(other.samples.ids)}
    ends = [
        (row.runs[0], ItemRewards(found.samples.ids, found.samples.baseline_SI[0],
                                  found.samples.steered_SI[0]))
        for row, found in ((ours, mine), (theirs, other)) if found.samples is not None
    ]  # fmt: skip
    aligned(ends, test_set or "test")  # refuses other items
    order = [at[item] for item in mine.samples.ids]
    samples = Samples(
        mine.samples.ids, other.samples.baseline_SI[:, order], other.samples.steered_SI[:, order]
    )
    return mine, replace(other, samples=samples)


@dataclass(frozen=True)
class Pair:
    """Two rows of a sweep. p_holm: corrected for all pairs of the table."""

    ours: Row
    theirs: Row
    difference: Difference
    p_holm: float


def chosen_rows(sweep: SweepComparison) -> list[Row]:
    """Of each method the row that does best on validation, of all its layers and options."""
    return [
        max(rows, key=lambda row: row.validation)
        for rows in sweep.tried.values()
        if not rows[0].unsteered
    ]


def chosen_pairs(sweep: SweepComparison) -> list[Pair]:
    """Every two methods at what was chosen on validation, but for pairs of two controls; the one
    that does better on validation first."""
    pairs = []
    for a, b in combinations(chosen_rows(sweep), 2):
        if a.control and b.control:
            continue
        ours, theirs = (
            (a, b) if (not a.control, a.validation) >= (not b.control, b.validation) else (b, a)
        )
        pairs.append((ours, theirs, difference(*same_items(ours, theirs))))
    corrected = holm([found.p_value for *_, found in pairs])
    made = [Pair(a, b, d, p) for (a, b, d), p in zip(pairs, corrected, strict=True)]
    values = [pair.difference.value for pair in made]
    order = np.argsort(-np.array(values), kind="stable")  # undefined ones last
    return [made[i] for i in order]

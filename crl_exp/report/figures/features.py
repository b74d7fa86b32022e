"""Figures of the features that a policy chose, beside those that stage 1 found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crl_exp.report.comparison.feature_spread import spread_over_items
from crl_exp.report.comparison.feature_use import LayerUse
from crl_exp.report.comparison.rows import SweepComparison
from crl_exp.report.figures.feature_layout import Axis, Mark, laid_out
from crl_exp.report.figures.style import (
    COLUMN_INCHES,
    PAGE_INCHES,
    legend_below,
    save,
    style,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#999999"


def overlap(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """How far the features that the policy used are those that stage 1 found."""
    return _stacked(sweep, paths, [_distinct_overlap, _additions_overlap])


def diversity(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Distinct features used, the entropy of their use and, where networks vary, critic loss."""
    panels = [_distinct, _entropy]
    if any(key.startswith("policy.") for key in sweep.varied):
        panels.append(_critic_loss)
    return _stacked(sweep, paths, panels)


def correlation(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Correlation with the reward, in stage 1, of the features added beside those found."""
    return _stacked(sweep, paths, [_correlations])


Panel = Callable[["Axes", Axis], str]
"""Draws all places and returns what the values are called."""


def _stacked(sweep: SweepComparison, paths: tuple[Path, ...], panels: list[Panel]) -> bool:
    """Panels below each other; side by side where rows run down."""
    along = laid_out(sweep)
    if along is None:
        return False
    with style():
        figure, axes = _figure(along, len(panels))
        for axis, panel in zip(axes.flat, panels, strict=True):
            along.set_up(axis, panel(axis, along))
        if not along.down:
            axes[-1, 0].set_xlabel("steered layer")
        legend_below(figure, axes, columns=1 if not along.down else 2)
        return save(figure, paths)


def _figure(along: Axis, panels: int) -> tuple[Figure, np.ndarray]:
    import matplotlib.pyplot as plt

    if along.down:
        lines = sum(1 + name.count("\n") for name in along.ticks.values())
        size = (PAGE_INCHES, 0.19 * max(lines, len(along.ticks) * 1.3) + 1.5)
        return plt.subplots(1, panels, figsize=size, sharey=True, squeeze=False)
    names = {place.name for place in along.places}
    lines = sum(1 + wrapped(name).count("\n") for name in names)
    size = (COLUMN_INCHES, 2.0 * panels + (0.6 if panels > 1 else 1.0) + 0.19 * (lines + 2))
    return plt.subplots(panels, 1, figsize=size, sharex=True, squeeze=False)


def _points(axis: Axes, along: Axis, metric: Callable[[LayerUse], float], top: float) -> None:
    """Mean and interval over items and seeds, cut at what is possible (0 to `top`); dashed where
    items aren't in it; seeds as small dots."""
    for place in along.places:
        values = np.array([metric(use) for use in place.uses])
        if np.isnan(values).any():
            continue
        spread, over_items = spread_over_items(place.uses, metric)
        low, high = spread.interval
        ends = [[values.mean() - max(low, 0.0)], [min(high, top) - values.mean()]]
        x, y = along.ordered(place.at, values.mean())
        bars = axis.errorbar(
            x, y, xerr=ends if along.down else None, yerr=None if along.down else ends,
            color=place.colour, marker=place.marker, markersize=5, elinewidth=1.2, capsize=2,
            linestyle="none",
            markerfacecolor="white" if place.hollow else place.colour, zorder=3,
            label="_" if along.down else place.name,
        )  # fmt: skip
        for bar in () if over_items else bars.lines[2]:
            bar.set_linestyle((0, (2, 2)))
        if len(values) > 1:
            beside = np.full(len(values), place.at + _nudge(along))
            axis.plot(*along.ordered(beside, values), "o", color=place.colour, markersize=2.2,
                      markeredgewidth=0)  # fmt: skip
    low, high = axis.get_xlim() if along.down else axis.get_ylim()
    ends = (-5, 105) if top == 100 else (min(low, -0.04 * high), high)
    (axis.set_xlim if along.down else axis.set_ylim)(*ends)


def _nudge(along: Axis) -> float:
    """From a mean to its seeds' dots."""
    if along.down:
        return 0.25
    at = list(along.ticks)
    return 0.025 * (max(at) - min(at))


def _line(axis: Axes, along: Axis, place: Mark, value: float, **look: Any) -> None:
    """A short line across a place."""
    half = 0.35 if along.down else 0.03 * np.ptp(list(along.ticks))
    ends = np.array([place.at - half, place.at + half])
    axis.plot(*along.ordered(ends, np.full(2, value)), color="black", zorder=4, **look)


def _percent(name: str) -> Callable[[LayerUse], float]:
    return lambda use: 100 * use.metrics()[name]


def _distinct_overlap(axis: Axes, along: Axis) -> str:
    _points(axis, along, _percent("used_found"), top=100)
    for place in along.places:
        chance = _mean(place, _percent("chance"))
        _line(axis, along, place, chance, linewidth=1.2, label="if drawn at random")
    return "used features that\nstage 1 found (%)"


def _additions_overlap(axis: Axes, along: Axis) -> str:
    _points(axis, along, _percent("additions_found"), top=100)
    for place in along.places:
        at = along.ordered(place.at, _mean(place, _percent("additions_corrsteer")))
        axis.plot(*at, "x", color="black", markersize=5.5, markeredgewidth=1.3, zorder=4,
                  label="CorrSteer's own feature")  # fmt: skip
    return "additions of features\nthat stage 1 found (%)"


def _mean(place: Mark, metric: Callable[[LayerUse], float]) -> float:
    return float(np.mean([metric(use) for use in place.uses]))


def _distinct(axis: Axes, along: Axis) -> str:
    _points(axis, along, lambda use: len(use.used), top=np.inf)
    return "distinct features"


def _entropy(axis: Axes, along: Axis) -> str:
    _points(axis, along, lambda use: use.metrics()["entropy"], top=np.inf)
    return "entropy of use (nats)"


def _critic_loss(axis: Axes, along: Axis) -> str:
    _points(axis, along, lambda use: use.critic_loss, top=np.inf)
    return "critic loss at the end"


def _correlations(axis: Axes, along: Axis) -> str:
    """Those found as grey lines; beside them those added, as large as their share, and the mean."""
    for place in along.places:
        found = [row["correlation"] for row in place.uses[0].found]
        at = np.full(len(found), place.at - _nudge(along))
        axis.plot(*along.ordered(at, found), "|" if along.down else "_", color=GREY, markersize=6,
                  markeredgewidth=0.8, linestyle="none", label="found by stage 1")  # fmt: skip
        for use in place.uses:
            values = [row["correlation"] for row in use.used]
            at = np.full(len(values), place.at + _nudge(along))
            label = "added; area: share of additions" if along.down else f"added by {place.name}"
            axis.scatter(
                *along.ordered(at, values), s=6 + 70 * use.share, linewidths=0.8, label=label,
                facecolors="none" if place.hollow else place.colour, edgecolors=place.colour,
                alpha=0.6, zorder=3,
            )  # fmt: skip
        mean = _mean(place, lambda use: use.metrics()["r_added"])
        _line(axis, along, place, mean, linewidth=1.6, label="mean of all additions")
    zero = axis.axvline if along.down else axis.axhline
    zero(0, color="black", linewidth=0.6, linestyle=":", zorder=0)
    return "correlation with the reward, r"

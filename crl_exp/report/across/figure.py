"""The figure of several sweeps: what each row gets in each, and the paired difference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crl_exp.report.across.compared import Beside, SweepsCompared
from crl_exp.report.figures.style import (
    COLOURS,
    MARKERS,
    PAGE_INCHES,
    legend_below,
    save,
    style,
    wrapped,
)
from crl_exp.report.tables.cells import row_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 40
CHARACTERS = 34
SPREAD = 0.56
"""Of a row's height: what its sweeps are drawn over."""


def shown(compared: SweepsCompared) -> list[Beside]:
    """The rows that are drawn: those that were tested, in the tables' order; of more than fit those
    with the smallest p."""
    tested = [one for one in compared.together if one.pairs]
    if len(tested) <= MOST_ROWS:
        return tested
    p = np.array([min(p.difference.p_value for p in one.pairs.values()) for one in tested])
    smallest = np.argsort(p, kind="stable")[:MOST_ROWS]  # undefined ones last
    return [tested[i] for i in sorted(smallest)]


def sweeps(compared: SweepsCompared, paths: tuple[Path, ...]) -> bool:
    """Left the accuracy in each sweep, right the difference to the first; False where no two rows
    were tested."""
    rows = shown(compared)
    if not rows:
        return False
    import matplotlib.pyplot as plt

    wheres = {one.where for one in rows}
    labels = [wrapped(_label(one, len(wheres) > 1), CHARACTERS) for one in rows]
    heights = [max(1.0 + label.count("\n"), 0.9 * len(compared.sides)) + 0.4 for label in labels]
    places = np.cumsum(heights) - np.array(heights) / 2
    with style():
        figure, axes = plt.subplots(
            1, 2, figsize=(PAGE_INCHES, 0.19 * sum(heights) + 0.9 + 0.2 * len(compared.sides)),
            sharey=True, squeeze=False,
        )  # fmt: skip
        left, right = axes[0]
        right.axvline(0, color="black", linewidth=0.8)
        for number, side in enumerate(compared.sides):
            shift = SPREAD * ((number + 0.5) / len(compared.sides) - 0.5)
            named = f"{side.letter}: {side.name}"
            for one, y, height in zip(rows, places, heights, strict=True):
                if _point(left, right, one, number, y + shift * height, named):
                    named = ""
        left.set_yticks(places, labels)
        left.set_ylim(sum(heights) + 0.2, -0.2)
        for axis in (left, right):
            axis.grid(axis="y", color="#dddddd", linewidth=0.5)
            axis.set_axisbelow(True)
        n = sorted({int(one.row.mean("n")) for one in rows})
        where = f"{min(wheres)}, " if len(wheres) == 1 else ""
        left.set_title(f"{where}n = {' or '.join(f'{one:,}' for one in n)}")
        left.set_xlabel("accuracy (%)")
        letters = [side.letter for side in compared.sides]
        first = letters[0] if len(letters) < 3 else "the first sweep of the row"
        right.set_xlabel(f"to {first}, paired by item (points)")
        legend_below(figure, axes, columns=1)
        return save(figure, paths)


def _point(left: Axes, right: Axes, one: Beside, number: int, y: float, named: str) -> bool:
    """A sweep's row in both panels; False where it has none of its own. named: in the legend."""
    if number not in one.rows:
        return False
    row = one.rows[number]
    _bar(left, 100 * row.mean("accuracy_steered"), row.accuracy_interval(), y, number,
         row.control, named)  # fmt: skip
    if len(row.runs) > 1:
        seeds = 100 * row.values("accuracy_steered")
        left.plot(seeds, np.full(len(seeds), y + 0.22), "o", color=COLOURS[number], markersize=2.2,
                  markeredgewidth=0)  # fmt: skip
    if (pair := one.pairs.get(number)) is not None:
        found = pair.difference
        _bar(right, 100 * found.value, found.interval, y, number, row.control, "")
    return True


def _bar(
    axis: Axes, mean: float, interval: tuple[float, float], y: float, number: int, hollow: bool,
    named: str,
) -> None:  # fmt: skip
    """mean: in percent or points. interval: of fractions."""
    low, high = (100 * end for end in interval)
    colour = COLOURS[number]
    axis.errorbar(
        mean, y, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], fmt=MARKERS[number],
        color=colour, markersize=5, markerfacecolor="white" if hollow else colour, elinewidth=1.2,
        capsize=2, zorder=3, label=named or None,
    )  # fmt: skip


def _label(one: Beside, several: bool) -> str:
    where = f" ({one.where})" if several else ""
    return f"{one.label} @ {row_layers(one.row)}{where}"

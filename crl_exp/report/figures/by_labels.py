"""A sweep's figure of what labels are worth: difference by number of training items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.figures.style import (
    COLUMN_INCHES,
    PAGE_INCHES,
    delta_name,
    in_points,
    legend_below,
    look_of,
    mean_in_points,
    panel_title,
    save,
    style,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = "task.n_train"
LINES_A_COLUMN = 4
"""With more of them their intervals need the page's width."""


def by_labels(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Difference to the unsteered model by number of training items, a line for each method and a
    panel for each test set. Not drawn where no method was given several numbers of them."""
    lines = label_lines(sweep)
    if not any(len(line) > 1 for line in lines.values()):
        return False
    import matplotlib.pyplot as plt

    sets: list[str | None] = [None, *sweep.test_sets]
    columns = 1 if len(lines) <= LINES_A_COLUMN else 2
    legend = sum(1 + wrapped(name).count("\n") for name in lines) / columns
    with style():
        figure, axes = plt.subplots(
            len(sets), 1, sharex=True, sharey=True, squeeze=False,
            figsize=(COLUMN_INCHES if columns == 1 else PAGE_INCHES,
                     2.5 * len(sets) + 0.7 + 0.19 * legend),
        )  # fmt: skip
        for axis, name in zip(axes[:, 0], sets, strict=True):
            _panel(axis, lines, name)
            axis.set_title(panel_title(sweep, name))
            axis.set_ylabel(delta_name(sweep))
        axes[-1, 0].set_xlabel("labelled training items")
        legend_below(figure, axes, columns=columns)
        return save(figure, paths)


def label_lines(sweep: SweepComparison) -> dict[str, dict[int, Row]]:
    """By what a method and its options are called, but for the number of training items, the row
    of each number of them: of several layers the one that did best on validation."""
    lines: dict[str, dict[int, Row]] = {}
    for row in sweep.rows:
        if row.unsteered:
            continue
        line = lines.setdefault(_line(row), {})
        before = line.get(n_labels(row))
        if before is None or row.validation > before.validation:
            line[n_labels(row)] = row
    return lines


def n_labels(row: Row) -> int:
    return int(row.runs[0].config["task"]["n_train"])


def _line(row: Row) -> str:
    said = [f"{key}={value}" for key, value in row.label.said if key != LABELS]
    return " ".join([row.label.name, *said])


def _panel(axis: Axes, lines: dict[str, dict[int, Row]], name: str | None) -> None:
    ticks = sorted({n for line in lines.values() for n in line})
    looks = look_of((row for line in lines.values() for row in line.values()), _line)
    # Points of one number stand side by side, within a third of the way to the next.
    nearest = min(np.diff(np.log(ticks)), default=1.0)
    step = min(0.07, nearest / 3 / len(lines))
    axis.axhline(0, color="black", linewidth=0.8)
    for i, (label, line) in enumerate(lines.items()):
        rows = [line[n] for n in sorted(line)]
        x = np.array(sorted(line)) * np.exp(step * (i - (len(lines) - 1) / 2))
        mean = np.array([mean_in_points(row, name) for row in rows])
        ends = np.array([in_points(row.interval(name), name) for row in rows])
        colour, marker = looks[label]
        axis.errorbar(
            x, mean, yerr=[np.maximum(mean - ends[:, 0], 0), np.maximum(ends[:, 1] - mean, 0)],
            color=colour, marker=marker, markersize=4.5, linewidth=1.0, elinewidth=0.9, capsize=2,
            markerfacecolor="white" if rows[0].shuffled else colour, label=label, zorder=3,
            linestyle="--" if rows[0].control else "-",
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.minorticks_off()

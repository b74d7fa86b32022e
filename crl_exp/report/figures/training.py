"""A sweep's training curves: reward by update of the policy, a panel for each steered layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.figures.style import (
    COLOURS,
    COLUMN_INCHES,
    PAGE_INCHES,
    legend_below,
    look,
    save,
    style,
    wrapped,
)
from crl_exp.report.tables.cells import row_layers
from crl_exp.runs.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE_CHARACTERS = {1: 42, 2: 40, 3: 28}

# More families than this in one panel can't be told apart; then each has a panel.
FAMILIES_A_PANEL = 4
Curve = tuple[Row, str, str]
"""A row, its colour and its name in the legend."""


def training(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Reward by update, a panel for each layer set, or for each family where there are many.

    Returns whether there was any journal.
    """
    rows = [row for row in sweep.rows if any(run.journal for run in row.runs)]
    if not rows:
        return False
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = _panels(sweep, rows)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    width = PAGE_INCHES if columns == 3 else COLUMN_INCHES * columns
    with style():
        figure, axes = plt.subplots(
            lines, columns, figsize=(width, 1.9 * lines + 0.9), sharex=True, sharey=True,
            squeeze=False,
        )  # fmt: skip
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
            for curve in curves:
                _curves(axis, *curve)
            floors(axis, curves)
            axis.set_title(wrapped(title, TITLE_CHARACTERS[columns], indent=""))
            axis.tick_params(labelbottom=True, labelleft=True)
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        for axis in axes[:, 0]:
            axis.set_ylabel("mean reward × 100")
        for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
            axis.set_xlabel("update of the policy")
        legend_below(figure, axes, columns=min(2, columns))
        return save(figure, paths)


def floors(axis: Axes, curves: list[Curve]) -> None:
    """What the unsteered model gets: one line, and others where labels differ (shuffled ones)."""
    found: dict[float, str] = {}
    for row, _, name in curves:
        mean = float(row.values("accuracy_baseline", "validation").mean())
        found.setdefault(round(100 * mean, 2), name)
    for height, name in found.items():
        first = height == next(iter(found))
        axis.axhline(
            height, color="black", linewidth=0.8, linestyle=":" if first else "-.",
            label="unsteered, validation" + ("" if first else f": {name}"),
        )  # fmt: skip


def _panels(sweep: SweepComparison, rows: list[Row]) -> dict[str, list[Curve]]:
    """By the panel's title, what is drawn in it."""
    looks, panels = look(sweep), {}
    by_layers = sorted(rows, key=lambda row: (len(row.layers), row.layers))
    layer_sets = list(dict.fromkeys(map(_layers, by_layers)))
    if len({row.family for row in rows}) <= FAMILIES_A_PANEL:
        for layers in layer_sets:
            here = [row for row in rows if _layers(row) == layers]
            panels[layers] = [(row, looks[row.family][0], row.family) for row in here]
        return panels
    colours = {layers: COLOURS[i % len(COLOURS)] for i, layers in enumerate(layer_sets)}
    for row in rows:
        curve = (row, colours[_layers(row)], _layers(row))
        panels.setdefault(row.family, []).append(curve)
    return panels


def _layers(row: Row) -> str:
    plural = "" if row.single or row.alternatives else "s"
    return f"layer{plural} {row_layers(row)}"


def _curves(axis: Axes, row: Row, colour: str, name: str) -> None:
    """Validation, mean and range over seeds; the rollouts' reward, mean over seeds, pale."""
    hollow, dash = ("white", "--") if row.shuffled else (colour, "-")
    step, reward = _series(row.runs, "reward")
    axis.plot(step, reward.mean(0), color=colour, alpha=0.35, linewidth=0.8, linestyle=dash,
              label=f"{name}, rollouts")  # fmt: skip
    step, reward = _series(row.runs, "validation_reward")
    if not len(step):
        return
    axis.fill_between(step, reward.min(0), reward.max(0), color=colour, alpha=0.2, linewidth=0)
    axis.plot(step, reward.mean(0), color=colour, marker="o", markersize=3, markerfacecolor=hollow,
              linestyle=dash, label=f"{name}, validation")  # fmt: skip


def _series(runs: tuple[Record, ...], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A metric's steps [T] that all seeds have, and its values × 100 [S, T]."""
    found = [
        {line["step"]: line["metrics"][name] for line in run.journal if name in line["metrics"]}
        for run in runs
        if run.journal
    ]
    steps = sorted(set.intersection(*[set(values) for values in found]))
    return np.array(steps), 100 * np.array([[v[s] for s in steps] for v in found])

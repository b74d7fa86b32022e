"""A sweep's training curves: reward by update of the policy, a panel for each steered layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crl_exp.comparison import Row, SweepComparison
from crl_exp.figure_style import (
    COLUMN_INCHES,
    PAGE_INCHES,
    legend_below,
    look,
    save,
    style,
)
from crl_exp.records import Record
from crl_exp.table_cells import layers_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def training(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Reward by update, a panel for each layer set. Returns whether there was any journal."""
    rows = [row for row in sweep.rows if any(run.journal for run in row.runs)]
    if not rows:
        return False
    import matplotlib.pyplot as plt

    panels = sorted({row.layers for row in rows}, key=lambda la: (len(la), la))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    width = PAGE_INCHES if columns == 3 else COLUMN_INCHES * columns
    looks = look(sweep)
    with style():
        figure, axes = plt.subplots(
            lines, columns, figsize=(width, 1.9 * lines + 0.9), sharex=True, sharey=True,
            squeeze=False,
        )  # fmt: skip
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, layers in zip(axes.flat, panels, strict=False):
            here = [row for row in rows if row.layers == layers]
            for row in here:
                _curves(axis, row, looks[row.family][0])
            floor = 100 * float(here[0].values("accuracy_baseline", "validation").mean())
            axis.axhline(
                floor, color="black", linewidth=0.8, linestyle=":", label="unsteered, validation"
            )
            axis.set_title(f"layer{'s' if len(layers) > 1 else ''} {layers_text(layers)}")
            axis.tick_params(labelbottom=True, labelleft=True)
        for axis in axes[:, 0]:
            axis.set_ylabel("mean reward × 100")
        for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
            axis.set_xlabel("update of the policy")
        legend_below(figure, axes, columns=2)
        return save(figure, paths)


def _curves(axis: Axes, row: Row, colour: str) -> None:
    """Validation, mean and range over seeds; the rollouts' reward, mean over seeds, pale."""
    hollow, dash = ("white", "--") if row.shuffled else (colour, "-")
    step, reward = _series(row.runs, "reward")
    axis.plot(step, reward.mean(0), color=colour, alpha=0.35, linewidth=0.8, linestyle=dash,
              label=f"{row.family}, rollouts")  # fmt: skip
    step, reward = _series(row.runs, "validation_reward")
    if not len(step):
        return
    axis.fill_between(step, reward.min(0), reward.max(0), color=colour, alpha=0.2, linewidth=0)
    axis.plot(step, reward.mean(0), color=colour, marker="o", markersize=3, markerfacecolor=hollow,
              linestyle=dash, label=f"{row.family}, validation")  # fmt: skip


def _series(runs: tuple[Record, ...], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A metric's steps [T] that all seeds have, and its values × 100 [S, T]."""
    found = [
        {line["step"]: line["metrics"][name] for line in run.journal if name in line["metrics"]}
        for run in runs
        if run.journal
    ]
    steps = sorted(set.intersection(*[set(values) for values in found]))
    return np.array(steps), 100 * np.array([[v[s] for s in steps] for v in found])

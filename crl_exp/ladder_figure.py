"""A ladder's figure: what each rung gains, the one below it a change away."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crl_exp.comparison import SweepComparison
from crl_exp.figure_style import COLOURS, PAGE_INCHES, save, style, wrapped
from crl_exp.ladder import Step, ladders
from crl_exp.table_ladder import layers_of

CHARACTERS = 52


def ladder(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Difference to the unsteered model by rung, a panel for each ladder; False without one."""
    found = ladders(sweep)
    if not found:
        return False
    import matplotlib.pyplot as plt

    result = sweep.first.result
    assert result is not None
    labels = [[wrapped(_label(step), CHARACTERS) for step in steps] for steps in found]
    lines = [sum(1 + label.count("\n") for label in of) for of in labels]
    with style():
        figure, axes = plt.subplots(
            len(found), 1, figsize=(PAGE_INCHES, 0.2 * sum(lines) + 0.9 * len(found)), sharex=True,
            squeeze=False, height_ratios=lines,
        )  # fmt: skip
        for axis, steps, texts in zip(axes[:, 0], found, labels, strict=True):
            axis.axvline(0, color="black", linewidth=0.8)
            means = [100 * step.row.mean("delta") for step in steps]
            axis.plot(means, range(len(steps)), "-", color="#bbbbbb", linewidth=0.8, zorder=1)
            for y, (step, mean) in enumerate(zip(steps, means, strict=True)):
                low, high = (100 * end for end in step.row.interval())
                axis.errorbar(
                    mean, y, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], fmt="o",
                    color=COLOURS[0], markersize=5, elinewidth=1.2, capsize=2, zorder=3,
                )  # fmt: skip
                if len(step.row.runs) > 1:
                    seeds = 100 * step.row.values("delta")
                    axis.plot(seeds, np.full(len(seeds), y + 0.3), "o", color=COLOURS[0],
                              markersize=2.2, markeredgewidth=0)  # fmt: skip
            axis.set_yticks(range(len(steps)), texts)
            axis.set_ylim(len(steps) - 0.4, -0.6)
            axis.grid(axis="y", color="#dddddd", linewidth=0.5)
            axis.set_axisbelow(True)
            axis.set_title(
                f"{result['task']}, {result['model']}, n = {result['n']:,}, {layers_of(steps)}"
            )
        axes[-1, 0].set_xlabel("Δ accuracy to the unsteered model (points)")
        return save(figure, paths)


def _label(step: Step) -> str:
    """The change; of the first rung the method."""
    changed = [change for change in step.changes if not change.startswith("method=")]
    if len(changed) == len(step.changes) and changed:
        return ", ".join(changed)
    return f"{step.row.label.name}: {', '.join(changed)}" if changed else step.row.label.name

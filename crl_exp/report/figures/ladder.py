"""A ladder's figure: what each rung gains, the one below it a change away."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crl_exp.report.comparison.ladder import Step, ladders
from crl_exp.report.comparison.rows import SweepComparison
from crl_exp.report.figures.style import COLOURS, PAGE_INCHES, save, style, wrapped
from crl_exp.report.tables.ladder import layers_of

CHARACTERS = 52
NAMED = 4
"""Changes of a step that its label names; the table has all."""
LEAST_LINES = 2.0
"""Height of a rung, in lines of text."""


def ladder(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Difference to the unsteered model by rung, a panel for each ladder; False without one."""
    found = ladders(sweep)
    if not found:
        return False
    import matplotlib.pyplot as plt

    result = sweep.first.result
    assert result is not None
    labels = [[wrapped(_label(step), CHARACTERS) for step in steps] for steps in found]
    heights = [[max(LEAST_LINES, 1.5 + label.count("\n")) for label in of] for of in labels]
    lines = [sum(of) for of in heights]
    with style():
        figure, axes = plt.subplots(
            len(found), 1, figsize=(PAGE_INCHES, 0.16 * sum(lines) + 0.9 * len(found)), sharex=True,
            squeeze=False, height_ratios=lines,
        )  # fmt: skip
        for axis, steps, texts, high_as in zip(axes[:, 0], found, labels, heights, strict=True):
            places = np.cumsum(high_as) - np.array(high_as) / 2
            axis.axvline(0, color="black", linewidth=0.8)
            means = [100 * step.row.mean("delta") for step in steps]
            axis.plot(means, places, "-", color="#bbbbbb", linewidth=0.8, zorder=1)
            for y, step, mean in zip(places, steps, means, strict=True):
                low, high = (100 * end for end in step.row.interval())
                axis.errorbar(
                    mean, y, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], fmt="o",
                    color=COLOURS[0], markersize=5, elinewidth=1.2, capsize=2, zorder=3,
                )  # fmt: skip
                if len(step.row.runs) > 1:
                    seeds = 100 * step.row.values("delta")
                    axis.plot(seeds, np.full(len(seeds), y + 0.6), "o", color=COLOURS[0],
                              markersize=2.2, markeredgewidth=0)  # fmt: skip
            axis.set_yticks(places, texts)
            axis.set_ylim(sum(high_as) + 0.3, -0.3)
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
    same_method = len(changed) == len(step.changes)
    if len(changed) > NAMED:
        changed = [*changed[: NAMED - 1], f"and {len(changed) - NAMED + 1} more"]
    if same_method and changed:
        return ", ".join(changed)
    return f"{step.row.label.name}: {', '.join(changed)}" if changed else step.row.label.name

"""A sweep's figures of what steering gains: by layer, and by option."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crl_exp.comparison import Row, SweepComparison, split
from crl_exp.figure_style import (
    COLOURS,
    COLUMN_INCHES,
    DASHES,
    legend_below,
    look,
    save,
    style,
    wrapped,
)
from crl_exp.table_cells import row_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def by_layer(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Difference to the unsteered model by steered layer, a panel for each test set.

    Not drawn where nothing is steered, nor for many options at one layer (`by_option` is).
    """
    sets: list[str | None] = [None, *sweep.test_sets]
    steered = [row for row in sweep.rows if row.method != "none"]
    layers = {row.layers for row in steered if row.single}
    if not steered or (len(layers) < 2 and len(sweep.families) > len(COLOURS)):
        return False
    import matplotlib.pyplot as plt

    with style():
        labels = [row.family for row in steered if not row.single]
        labels += {row.family for row in steered if row.single}
        lines = sum(1 + wrapped(label).count("\n") for label in labels)
        height = (2.5 if len(sets) == 1 else 2.0) * len(sets) + 0.8 + 0.19 * lines
        figure, axes = plt.subplots(
            len(sets), 1, figsize=(COLUMN_INCHES, height), sharex=True, sharey=True,
            squeeze=False,
        )  # fmt: skip
        for axis, name in zip(axes[:, 0], sets, strict=True):
            _layer_panel(axis, sweep, name)
            axis.set_title(_panel_title(sweep, name))
        axes[-1, 0].set_xlabel("steered layer")
        legend_below(figure, axes, columns=1)
        return save(figure, paths)


def _panel_title(sweep: SweepComparison, name: str | None) -> str:
    result = sweep.first.result
    assert result is not None
    n = split(sweep.first, name)["n"]
    what = f"{result['task']}, {result['model']}" if name is None else f"{name} prompts"
    return f"{what}, n = {n:,}"


def _layer_panel(axis: Axes, sweep: SweepComparison, name: str | None) -> None:
    from matplotlib.ticker import MaxNLocator

    shown = [row for row in sweep.rows if row.method != "none"]
    layers = sorted({row.layers[0] for row in shown if row.single})
    together = [row for row in shown if not row.single]
    gap = min(np.diff(layers), default=1)
    families = list(dict.fromkeys(row.family for row in shown if row.single))
    looks = look(sweep)
    axis.axhline(0, color="black", linewidth=0.8)
    for i, family in enumerate(families):
        shift = gap * 0.13 * (i - (len(families) - 1) / 2)
        rows = [row for row in shown if row.family == family and row.single]
        _layer_points(axis, rows, name, shift, looks[family])
        for row in sweep.chosen.intersection(rows):
            axis.plot(
                row.layers[0] + shift, _mean(row, name), "o", color="black", markersize=9.5,
                markerfacecolor="none", markeredgewidth=0.9, label="chosen on validation",
            )  # fmt: skip
    ticks = {float(layer): str(layer) for layer in layers}
    if together:
        end = (layers[-1] if layers else 0) + 1.3 * gap
        ticks[end] = "several" if len({row.layers for row in together}) > 1 else "all"
        _together(axis, together, name, (end, gap * 0.22), looks)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.margins(x=0.06)
    axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    refusal = "benign" in sweep.test_sets
    axis.set_ylabel("Δ refused (points)" if refusal else "Δ accuracy (points)")


def _together(
    axis: Axes,
    rows: list[Row],
    name: str | None,
    place: tuple[float, float],
    looks: dict[str, tuple[str, str]],
) -> None:
    """Rows that steer several layers at once: a point with its interval at the right-hand end, and
    a line through the panel to compare single layers with. place: x and the step between rows."""
    end, step = place
    alike = len({row.layers for row in rows}) == 1
    for i, row in enumerate(rows):
        x = end + step * (i - (len(rows) - 1) / 2)
        colour, marker = looks[row.family]
        plural = "" if row.alternatives else "s"
        which = f"layer{plural} {row_layers(row)}"
        which = f"all {len(row.layers)} layers" if alike and plural else which
        mean, (low, high) = _mean(row, name), _in_points(row.interval(name), name)
        axis.axhline(mean, color=colour, linestyle=DASHES[i % len(DASHES)], linewidth=0.8)
        axis.errorbar(
            x, mean, yerr=[[max(mean - low, 0)], [max(high - mean, 0)]], color=colour,
            marker=marker, markersize=5, linestyle=DASHES[i % len(DASHES)], linewidth=0.8,
            elinewidth=1.2, capsize=2, label=f"{row.family}, {which}",
            markerfacecolor="white" if row.shuffled else colour, zorder=3,
        )  # fmt: skip


def _layer_points(
    axis: Axes, rows: list[Row], name: str | None, shift: float, look_of: tuple[str, str]
) -> None:
    """One family: means with intervals, and every seed as a small dot."""
    colour, marker = look_of
    x = np.array([row.layers[0] for row in rows]) + shift
    mean = np.array([_mean(row, name) for row in rows])
    ends = np.array([_in_points(row.interval(name), name) for row in rows])
    hollow = rows[0].shuffled
    axis.errorbar(
        x, mean, yerr=[np.maximum(mean - ends[:, 0], 0), np.maximum(ends[:, 1] - mean, 0)],
        color=colour, marker=marker, markersize=5, markerfacecolor="white" if hollow else colour,
        linestyle="none" if rows[0].control else "-", linewidth=0.8, elinewidth=1.2, capsize=2,
        label=rows[0].family, zorder=3,
    )  # fmt: skip
    for at, row in zip(x, rows, strict=True):
        if len(row.runs) > 1:
            seeds = _sign(name) * 100 * row.values("delta", name)
            beside = np.full(len(seeds), at + 0.02 * np.ptp(axis.get_xlim()))
            axis.plot(beside, seeds, "o", color=colour, markersize=2.2, markeredgewidth=0)


def _sign(name: str | None) -> int:
    """A benign prompt is scored 1 where it was answered; refusals are shown."""
    return -1 if name == "benign" else 1


def _mean(row: Row, name: str | None) -> float:
    return _sign(name) * 100 * row.mean("delta", name)


def _in_points(interval: tuple[float, float], name: str | None) -> tuple[float, float]:
    low, high = sorted(_sign(name) * 100 * end for end in interval)
    return low, high

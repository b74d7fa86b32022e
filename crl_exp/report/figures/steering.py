"""A sweep's figures of what steering gains: by layer, and by option."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.figures.style import (
    COLOURS,
    COLUMN_INCHES,
    DASHES,
    MANY,
    PAGE_INCHES,
    delta_name,
    in_points,
    legend_below,
    look,
    look_of,
    mean_in_points,
    panel_title,
    save,
    sign_of,
    style,
    wrapped,
)
from crl_exp.report.parts import SweepParts, best_rows
from crl_exp.report.tables.cells import row_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def by_layer(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Difference to the unsteered model by steered layer, a panel for each test set.

    Not drawn where nothing is steered, nor for many options at one layer (`by_option` is).
    """
    sets: list[str | None] = [None, *sweep.test_sets]
    steered = [row for row in sweep.rows if not row.unsteered]
    layers = {row.layers for row in steered if row.single}
    if not steered or (len(layers) < 2 and len(sweep.families) > len(COLOURS)):
        return False
    import matplotlib.pyplot as plt

    with style():
        labels = [row.family for row in steered if not row.single]
        labels += {row.family for row in steered if row.single}
        wide = len(labels) > MANY
        lines = sum(1 + wrapped(label).count("\n") for label in labels) / (1 + wide)
        height = (2.5 if len(sets) == 1 else 2.0) * len(sets) + 0.8 + 0.19 * lines
        figure, axes = plt.subplots(
            len(sets), 1, figsize=(PAGE_INCHES if wide else COLUMN_INCHES, height), sharex=True,
            sharey=True, squeeze=False,
        )  # fmt: skip
        for axis, name in zip(axes[:, 0], sets, strict=True):
            _layer_panel(axis, sweep, name)
            axis.set_title(panel_title(sweep, name))
        axes[-1, 0].set_xlabel("steered layer")
        legend_below(figure, axes, columns=1 + wide)
        return save(figure, paths)


def _layer_panel(axis: Axes, sweep: SweepComparison, name: str | None) -> None:
    from matplotlib.ticker import MaxNLocator

    shown = [row for row in sweep.rows if not row.unsteered]
    layers = sorted({row.layers[0] for row in shown if row.single})
    together = [row for row in shown if not row.single]
    gap = min(np.diff(layers), default=1)
    families = list(dict.fromkeys(row.family for row in shown if row.single))
    looks = look(sweep)
    axis.axhline(0, color="black", linewidth=0.8)
    for i, family in enumerate(families):
        # However many there are, a point is nearer to its own layer than to another.
        apart = gap * min(0.13, 0.7 / max(len(families) - 1, 1))
        shift = apart * (i - (len(families) - 1) / 2)
        rows = [row for row in shown if row.family == family and row.single]
        _layer_points(axis, rows, name, shift, looks[family])
        for row in sweep.chosen.intersection(rows):
            axis.plot(
                row.layers[0] + shift, mean_in_points(row, name), "o", color="black",
                markersize=9.5, markerfacecolor="none", markeredgewidth=0.9,
                label="chosen on validation",
            )  # fmt: skip
    ticks = {float(layer): str(layer) for layer in layers}
    if together:
        end = (layers[-1] if layers else 0) + 1.3 * gap
        sets = {row.layers for row in together if row.layers}
        ticks[end] = "several" if len(sets) > 1 else "all" if sets else "none"
        _together(axis, together, name, (end, gap * 0.22), looks)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.margins(x=0.06)
    axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_ylabel(delta_name(sweep))


def _together(
    axis: Axes,
    rows: list[Row],
    name: str | None,
    place: tuple[float, float],
    looks: dict[str, tuple[str, str]],
) -> None:
    """Rows of several layers at once, or of none: a point with its interval at the right-hand end,
    and a line through the panel to compare single layers with. place: x and the step between them.
    """
    end, step = place
    alike = len({row.layers for row in rows if row.layers}) == 1
    for i, row in enumerate(rows):
        x = end + step * (i - (len(rows) - 1) / 2)
        colour, marker = looks[row.family]
        plural = "" if row.alternatives else "s"
        which = f"layer{plural} {row_layers(row)}"
        which = f"all {len(row.layers)} layers" if alike and plural else which
        label = f"{row.family}, {which}" if row.layers else row.family
        mean, (low, high) = mean_in_points(row, name), in_points(row.interval(name), name)
        axis.axhline(mean, color=colour, linestyle=DASHES[i % len(DASHES)], linewidth=0.8)
        axis.errorbar(
            x, mean, yerr=[[max(mean - low, 0)], [max(high - mean, 0)]], color=colour,
            marker=marker, markersize=5, linestyle=DASHES[i % len(DASHES)], linewidth=0.8,
            elinewidth=1.2, capsize=2, label=label,
            markerfacecolor="white" if row.shuffled else colour, zorder=3,
        )  # fmt: skip


def _layer_points(
    axis: Axes, rows: list[Row], name: str | None, shift: float, looks: tuple[str, str]
) -> None:
    """One family: means with intervals, and every seed as a small dot."""
    from matplotlib.transforms import ScaledTranslation

    colour, marker = looks
    # As far beside their mean in every figure, whatever the axis spans.
    beside = axis.transData + ScaledTranslation(4.5 / 72, 0, axis.figure.dpi_scale_trans)
    x = np.array([row.layers[0] for row in rows]) + shift
    mean = np.array([mean_in_points(row, name) for row in rows])
    ends = np.array([in_points(row.interval(name), name) for row in rows])
    hollow = rows[0].shuffled
    axis.errorbar(
        x, mean, yerr=[np.maximum(mean - ends[:, 0], 0), np.maximum(ends[:, 1] - mean, 0)],
        color=colour, marker=marker, markersize=5, markerfacecolor="white" if hollow else colour,
        linestyle="none" if rows[0].control else "-", linewidth=0.8, elinewidth=1.2, capsize=2,
        label=rows[0].family, zorder=3,
    )  # fmt: skip
    for at, row in zip(x, rows, strict=True):
        if len(row.runs) > 1:
            seeds = sign_of(name) * 100 * row.values("delta", name)
            axis.plot(
                np.full(len(seeds), at), seeds, "o", color=colour, markersize=2.2,
                markeredgewidth=0, transform=beside,
            )  # fmt: skip


def by_option(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Difference by method and option, best layer on validation; not drawn where none varies."""
    rows = [row for row in best_rows(sweep).values() if not row.unsteered]
    if not any(row.label.said for row in rows):
        return False
    import matplotlib.pyplot as plt

    sets: list[str | None] = [None, *sweep.test_sets]
    labels = [wrapped(_option_label(row, rows)) for row in rows]
    lines = sum(1 + label.count("\n") for label in labels)
    looks = look(sweep)
    with style():
        figure, axes = plt.subplots(
            1, len(sets), figsize=(PAGE_INCHES, 0.19 * lines + 0.9), sharey=True, sharex=True,
            squeeze=False,
        )  # fmt: skip
        for axis, name in zip(axes[0], sets, strict=True):
            axis.axvline(0, color="black", linewidth=0.8)
            for y, row in enumerate(rows):
                _option_point(axis, row, name, y, looks[row.family])
            axis.set_xlabel(delta_name(sweep))
            axis.set_title(panel_title(sweep, name))
            axis.grid(axis="y", color="#dddddd", linewidth=0.5)
            axis.set_axisbelow(True)
        axes[0, 0].set_yticks(range(len(rows)), labels)
        axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)
        return save(figure, paths)


def _option_label(row: Row, rows: list[Row]) -> str:
    """The family; with the layer, where not all have the same."""
    if len({other.layers for other in rows}) == 1:
        return row.family
    return f"{row.family} @ {row_layers(row)}" if row.layers else row.family


def _option_point(
    axis: Axes, row: Row, name: str | None, y: float, looks: tuple[str, str], label: str = "_"
) -> None:
    """label: in the legend; seeds are drawn only without one, as else there is no room."""
    colour, marker = looks
    mean, (low, high) = mean_in_points(row, name), in_points(row.interval(name), name)
    axis.errorbar(
        mean, y, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], color=colour, marker=marker,
        markersize=5, elinewidth=1.2, capsize=2, zorder=3, linestyle="none", label=label,
        markerfacecolor="white" if row.shuffled else colour,
    )  # fmt: skip
    if len(row.runs) > 1 and label == "_":
        seeds = sign_of(name) * 100 * row.values("delta", name)
        axis.plot(seeds, np.full(len(seeds), y + 0.28), "o", color=colour, markersize=2.2,
                  markeredgewidth=0)  # fmt: skip


def overview(parts: SweepParts, paths: tuple[Path, ...]) -> bool:
    """Difference by part and method, at the layer that did best on validation."""
    import matplotlib.pyplot as plt

    looks = look_of(row for part in parts.parts for row in part.sweep.rows)
    steered = {row.family for part in parts.parts for row in part.sweep.rows if not row.unsteered}
    families = [name for name in parts.families if name in steered]
    height = 0.16 * len(families) * len(parts.parts) + 0.25 * (len(families) // 2 + 1) + 0.9
    with style():
        figure, axes = plt.subplots(figsize=(PAGE_INCHES, height), squeeze=False)
        axis = axes[0, 0]
        axis.axvline(0, color="black", linewidth=0.8)
        for i, part in enumerate(parts.parts):
            rows = best_rows(part.sweep)
            for j, family in enumerate(families):
                if family in rows:
                    y = i + 0.8 * ((j + 0.5) / len(families) - 0.5)
                    _option_point(axis, rows[family], None, y, looks[family], family)
            axis.axhline(i + 0.5, color="#dddddd", linewidth=0.6)
        axis.set_yticks(range(len(parts.parts)), [wrapped(part.title) for part in parts.parts])
        axis.set_ylim(len(parts.parts) - 0.5, -0.5)
        axis.set_xlabel("Δ accuracy (points)")
        legend_below(figure, axes, columns=2)
        return save(figure, paths)

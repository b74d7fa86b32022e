"""By layer, one panel for each metric: what analyses found, and methods' accuracy beside it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crl_exp.config.display import undefined
from crl_exp.report.comparison.rows import Analysis, Row, SweepComparison
from crl_exp.report.figures.style import (
    COLOURS,
    COLUMN_INCHES,
    MANY,
    MARKERS,
    PAGE_INCHES,
    legend_below,
    look,
    panel_title,
    save,
    style,
    wrapped,
)
from crl_exp.report.labels import Label
from crl_exp.runs.result import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCURACY = "accuracy"
"""The metric that methods have too."""
LINES = ("-", "--", ":", "-.")
UNITS = {"share": "", "": ""}


def analyses(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Not drawn where no analysis has a series over layers."""
    shown = [(one, series) for one in sweep.analyses for series in one.result.series]
    metrics = list(dict.fromkeys(series.metric for _, series in shown))
    if not metrics:
        return False
    import matplotlib.pyplot as plt

    with style():
        named = {series.name for _, series in shown} | set(sweep.families)
        wide = len(named) > MANY
        lines = sum(1 + wrapped(name).count("\n") for name in named) / (1 + wide)
        width, height = (PAGE_INCHES if wide else COLUMN_INCHES), 1.9 * len(metrics) + 0.6
        figure, axes = plt.subplots(
            len(metrics), 1, figsize=(width, height + 0.17 * lines), sharex=True, squeeze=False
        )
        several = _seeds_differ(sweep)
        shown = [(replace(one, label=several.get(one.run.key, one.label)), s) for one, s in shown]
        looks = _looks(shown)
        for axis, metric in zip(axes[:, 0], metrics, strict=True):
            those = [(one, series) for one, series in shown if series.metric == metric]
            _panel(axis, those, metric, looks)
            if metric == ACCURACY:
                _methods(axis, sweep)
        axes[0, 0].set_title(panel_title(sweep, None))
        axes[-1, 0].set_xlabel("layer (−1: the input of layer 0)")
        legend_below(figure, axes, columns=1 + wide)
        return save(figure, paths)


def _seeds_differ(sweep: SweepComparison) -> dict[str, Label]:
    """By run key, of analyses that are called alike: a label that names the seed."""
    called = Counter(one.label.text for one in sweep.analyses)
    return {
        one.run.key: replace(
            one.label, said=(*one.label.said, ("seed", str(one.run.config["seed"])))
        )
        for one in sweep.analyses
        if called[one.label.text] > 1
    }


def _looks(shown: list[tuple[Analysis, Series]]) -> dict[str, tuple[str, str]]:
    """Colour and line of each name; the same name in two panels looks the same."""
    names = dict.fromkeys(_called(one, series) for one, series in shown)
    pairs = cycle([(colour, line) for line in LINES for colour in COLOURS])
    return dict(zip(names, pairs, strict=False))


def _called(analysis: Analysis, series: Series) -> str:
    """The series' name, with what sets its analysis apart."""
    name = series.name.replace("_", " ")
    options = analysis.label.options
    return f"{name} ({options})" if options else name


def _panel(
    axis: Axes,
    shown: list[tuple[Analysis, Series]],
    metric: str,
    looks: dict[str, tuple[str, str]],
) -> None:
    for analysis, series in shown:
        there = {la: f for la, f in series.by_layer.items() if not undefined(f.value)}
        x = np.array(list(there))
        value = np.array([figure.value for figure in there.values()], dtype=float)
        colour, line = looks[_called(analysis, series)]
        axis.plot(
            x, value, linestyle=line, color=colour, marker=".", markersize=4,
            label=_called(analysis, series),
        )  # fmt: skip
        ends = [(f.low, f.high) for f in there.values()]
        if all(low is not None and high is not None for low, high in ends) and ends:
            low, high = np.array(ends, dtype=float).T
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    told = {(s.reference_name, s.reference) for _, s in shown if s.reference is not None}
    for name, value in sorted(told, key=str):
        axis.axhline(value, color="black", linewidth=0.8, linestyle=(0, (1, 1.5)), label=name)
    units = {UNITS.get(series.unit, f" ({series.unit})") for _, series in shown}
    axis.set_ylabel(f"{metric.replace('_', ' ')}{next(iter(units)) if len(units) == 1 else ''}")


def _methods(axis: Axes, sweep: SweepComparison) -> None:
    """Methods' accuracy at single layers with its interval; of the unsteered model a line."""
    looks = look(sweep)
    for family, rows in sweep.families.items():
        single = [row for row in rows if row.single and not row.unsteered]
        if single:
            _points(axis, single, family, looks[family])
    if sweep.rows:
        axis.axhline(
            sweep.rows[0].mean("accuracy_baseline"), color="black", linewidth=0.8,
            label="unsteered",
        )  # fmt: skip


def _points(axis: Axes, rows: list[Row], family: str, look: tuple[str, str]) -> None:
    colour, marker = look
    x = [row.layers[0] for row in rows]
    mean = np.array([row.mean("accuracy_steered") for row in rows])
    low, high = np.array([row.accuracy_interval() for row in rows], dtype=float).T
    assert marker in MARKERS
    axis.errorbar(
        x, mean, yerr=[np.maximum(mean - low, 0), np.maximum(high - mean, 0)], color=colour,
        marker=marker, markersize=4.5, linestyle="none", elinewidth=1.0, capsize=2, label=family,
        markerfacecolor="white" if rows[0].control else colour,
    )  # fmt: skip

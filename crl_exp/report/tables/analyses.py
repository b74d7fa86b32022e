"""What analyses found: their figures, cell by cell, their sentences, and a line for each layer."""

from __future__ import annotations

from typing import Any

from crl_exp.config.display import UNDEFINED, undefined
from crl_exp.report.comparison.rows import Analysis, SweepComparison
from crl_exp.report.tables.cells import FurtherTable, layers_text
from crl_exp.runs.result import Figure

TITLE = "Analyses"
COLUMNS = ("analysis", "figure", "layers", "seed", "value [95 %]", "n")
CSV = (
    "sweep", "run_key", "analysis", "name", "metric", "unit", "better", "layer", "split", "n",
    "seed", "data_digest", "value", "low", "high", "interval", "reference", "reference_name",
)  # fmt: skip


def analysis_tables(sweep: SweepComparison) -> list[FurtherTable]:
    """A line for each figure of each analysis; below it what they say in words."""
    if not sweep.analyses:
        return []
    lines = [
        [
            one.label.text, name, layers_text(one.run.layers or ()), str(one.run.config["seed"]),
            shown(figure), _n(figure),
        ]
        for one in sweep.analyses
        for name, figure in one.result.figures.items()
    ]  # fmt: skip
    return [FurtherTable(TITLE, "analyses", COLUMNS, lines, _said(sweep))]


def _said(sweep: SweepComparison) -> list[str]:
    several = len(sweep.analyses) > 1
    found = []
    for one in sweep.analyses:
        who = f"{one.label.text}, seed {one.run.config['seed']}: " if several else ""
        found += [f"{who}{line}." for line in one.result.said]
    return found


def shown(figure: Figure) -> str:
    """`0.861 [0.843, 0.878]`; a whole number, a layer say, without places."""
    if figure.value is None or undefined(figure.value):
        return UNDEFINED
    value = _number(figure.value)
    if figure.low is None or figure.high is None:
        return value
    return f"{value} [{_number(figure.low)}, {_number(figure.high)}]"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _n(figure: Figure) -> str:
    return "" if figure.n is None else f"{figure.n:,}"


def layer_lines(sweep: SweepComparison) -> list[list[Any]]:
    """For analyses.csv: a line for each figure of each layer, in its own unit."""
    return [line for one in sweep.analyses for line in _lines(one)]


def _lines(analysis: Analysis) -> list[list[Any]]:
    run = analysis.run
    assert run.result is not None
    digest, seed = run.result["data_digest"], run.config["seed"]
    return [
        [
            run.sweep, run.key, analysis.label.text, series.name, series.metric, series.unit,
            series.better, layer, series.split, figure.n, seed, digest, figure.value, figure.low,
            figure.high, series.interval, series.reference, series.reference_name,
        ]
        for series in analysis.result.series
        for layer, figure in series.by_layer.items()
    ]  # fmt: skip

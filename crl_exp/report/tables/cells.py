"""What a sweep's tables say, cell by cell; `terminal`, `latex`, `report.page` lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crl_exp.analysis.estimates import as_float
from crl_exp.config.display import UNDEFINED, number, undefined
from crl_exp.report.comparison.estimates import delta_of, split
from crl_exp.report.comparison.feature_credit import FeatureCredit
from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.parts import SweepParts, best_rows
from crl_exp.runs.records import Record

COLUMNS = (
    "method", "layers", "seeds", "n", "unsteered → steered %", "Δ points [95 %]", "p Holm",
    "fixed/ broken", "SER", "features",
)  # fmt: skip
RUN_COLUMNS = ("method", "layers", "seed", "steered %", "Δ points [95 %]", "p", "run")
CHOSEN = "◀"
LAYERS_SHOWN = 2


@dataclass(frozen=True)
class FurtherTable:
    """A table below the main one. slug: in a LaTeX label. n_left: columns of text."""

    title: str
    slug: str
    columns: tuple[str, ...]
    lines: list[list[str]]
    notes: list[str]
    n_left: int = 2


def layers_text(layers: Sequence[int], between: str = ", ") -> str:
    """`18`, `8, 12` or, for more, `8…22 (5)`; `–` for none."""
    if len(layers) <= LAYERS_SHOWN:
        return between.join(map(str, layers)) or "–"
    return f"{layers[0]}…{layers[-1]} ({len(layers)})"


def row_layers(row: Row) -> str:
    """A row's layers; `12 or 18` where each seed chose its own."""
    if row.unsteered:
        return "–"
    return layers_text(row.layers, " or " if row.alternatives else ", ")


def points(value: float, interval: Sequence[float]) -> str:
    """A difference of shares in percentage points, `+9.1 [7.0, 11.2]`."""
    middle, low, high = (round(100 * number, 1) + 0.0 for number in (value, *interval))
    if undefined(middle):
        return UNDEFINED
    return f"{middle:+.1f} [{number(low, '.1f')}, {number(high, '.1f')}]"


def share(value: float, interval: Sequence[float]) -> str:
    """A share in percent, `84.6 [82.1, 87.0]`."""
    middle, low, high = (100 * number for number in (value, *interval))
    if undefined(middle):
        return UNDEFINED
    return f"{middle:.1f} [{number(low, '.1f')}, {number(high, '.1f')}]"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else number(p, ".3f")


def main_cells(sweep: SweepComparison, row: Row) -> list[str]:
    ser = "–" if row.ser is None else f"{row.ser:.2f}"
    mark = f" {CHOSEN}" if row in sweep.chosen else ""
    return [
        row.family,
        row_layers(row) + mark,
        str(len(row.runs)),
        f"{row.mean('n'):.0f}",
        f"{percent(row.mean('accuracy_baseline'))} → {percent(row.mean('accuracy_steered'))}",
        points(row.mean("delta"), row.interval()),
        p_text(sweep.p_holm[row]),
        f"{number(row.mean('fixed'), '.0f')}/{number(row.mean('broken'), '.0f')}",
        ser,
        number(row.mean("unique_features"), ".0f"),
    ]


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share, ".1f")


def set_columns(sweep: SweepComparison) -> list[str]:
    sets = [
        f"{_set_name(sweep, name)}, n = {split(sweep.first, name)['n']}" for name in _sets(sweep)
    ]
    return ["method", "layers", *sets]


def set_cells(sweep: SweepComparison, row: Row) -> list[str]:
    """The test sets side by side. Where one is benign, all are shares of refused prompts."""
    cells = [row.family, row_layers(row)]
    for name in _sets(sweep):
        delta, (low, high) = row.mean("delta", name), row.interval(name)
        was, now = row.mean("accuracy_baseline", name), row.mean("accuracy_steered", name)
        if name == "benign":  # it is scored 1 where the prompt was answered
            was, now, delta, low, high = 1 - was, 1 - now, -delta, -high, -low
        cells.append(f"{percent(was)} → {percent(now)}\n{points(delta, (low, high))}")
    return cells


def _sets(sweep: SweepComparison) -> list[str | None]:
    return [None, *sweep.test_sets]


def _set_name(sweep: SweepComparison, name: str | None) -> str:
    if name == "benign":
        return "benign (over-refusal)"
    return name or sweep.first.config["task"]["name"]


def run_cells(row: Row, run: Record) -> list[str]:
    figures = split(run, None)
    return [
        row.family, layers_text(run.layers or ()), str(run.config["seed"]),
        percent(figures["accuracy_steered"]),
        points(*delta_of(run, None)), p_text(as_float(figures["p_value"])), run.key,
    ]  # fmt: skip


def set_title(sweep: SweepComparison) -> str:
    what = "Refused" if "benign" in sweep.test_sets else "Right"
    return f"{what} prompts by test set, unsteered → steered %, Δ points [95 %]"


def title(sweep: SweepComparison) -> str:
    result = sweep.first.result
    assert result is not None
    return f"{sweep.first.sweep}: {result['task']}, {result['model']}, n = {result['n']:,}"


def unfinished(runs: Sequence[Record]) -> list[str]:
    """Runs without a result, with their state and error."""
    lines = []
    for run in runs:
        error = str(run.status.get("error") or "").strip().split("\n")[0]
        lines.append(f"{run.key} {run.state}{': ' + error if error else ''}")
    return lines


# --- several tasks, models or SAE releases side by side ---

OVERVIEW_COLUMNS = (
    "method", "layers", "seeds", "n", "accuracy % [95 %]", "Δ points [95 %]", "p Holm",
)  # fmt: skip
OVERVIEW_NOTE = (
    "Where a method was tried at several layers: the one that did best on validation, for "
    "controls too. Intervals are over items and, where there are several, seeds; that of "
    "the accuracy is Wilson's."
)


def overview_columns(parts: SweepParts) -> list[str]:
    return [*parts.keys, *OVERVIEW_COLUMNS]


def overview_cells(parts: SweepParts) -> list[list[str]]:
    """A line for each part and method."""
    lines = []
    for part in parts.parts:
        for row in best_rows(part.sweep).values():
            accuracy = share(row.mean("accuracy_steered"), row.accuracy_interval())
            delta = points(row.mean("delta"), row.interval()) if not row.unsteered else "–"
            p = p_text(part.sweep.p_holm[row]) if not row.unsteered else "–"
            which = [value for _, value in part.names]
            lines.append(
                [*which, row.family, row_layers(row), str(len(row.runs)), f"{row.mean('n'):.0f}",
                 accuracy, delta, p]
            )  # fmt: skip
    return lines


def _n_of(sweep: SweepComparison) -> int:
    assert sweep.first.result is not None
    return int(sweep.first.result["n"])


def matrix(parts: SweepParts) -> tuple[list[str], list[list[str]]]:
    """Methods by parts: head and lines; a cell has accuracy and, below it, the difference."""
    best = [best_rows(part.sweep) for part in parts.parts]
    ns = [f"{part.title}, n = {_n_of(part.sweep):,}" for part in parts.parts]
    lines = []
    for family in parts.families:
        line = [family]
        for rows in best:
            row = rows.get(family)
            if row is None:
                line.append("–")
                continue
            accuracy = share(row.mean("accuracy_steered"), row.accuracy_interval())
            delta = points(row.mean("delta"), row.interval()) if not row.unsteered else ""
            line.append(f"{accuracy}\n{delta}".rstrip())
        lines.append(line)
    return ["method", *ns], lines


# --- features ---

FEATURE_COLUMNS = (
    "method", "layers", "feature", "additions", "coefficient", "r", "rank in stage 1", "items",
    "changed", "fixed", "broken",
)  # fmt: skip
FEATURE_NOTE = (
    "Over all seeds, on the test items. Items: those that had the feature added at some token; "
    "fixed and broken: how many of them came right or went wrong. An item with several features "
    "counts for each of them. r: correlation in stage 1 with the reward, or with what "
    "warmup.contrast names."
)


def feature_cells(credit: FeatureCredit) -> list[str]:
    counts = (credit.rank, credit.items, credit.changed, credit.fixed, credit.broken)
    return [
        credit.row.family, row_layers(credit.row), _named(credit),
        f"{credit.tokens:,}", number(credit.coefficient, ".1f"),
        number(credit.correlation, "+.3f"),
        *["–" if count is None else f"{count:,}" for count in counts],
    ]  # fmt: skip


def _named(credit: FeatureCredit) -> str:
    """`18/3290`, with its label where one is known."""
    named = f"{credit.layer}/{credit.feature}"
    return f"{named} {credit.label}" if credit.label else named

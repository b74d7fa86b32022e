"""What a sweep's tables say, cell by cell; `tables`, `table_latex`, `report_page` lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crl_exp.comparison import Row, SweepComparison
from crl_exp.estimates import as_float, delta_of, split
from crl_exp.feature_credit import FeatureCredit
from crl_exp.pairs import difference, same_items
from crl_exp.records import Record
from crl_exp.report_parts import SweepParts, best_rows
from crl_exp.shown import UNDEFINED, number, undefined

COLUMNS = (
    "method", "layers", "seeds", "n", "unsteered → steered %", "Δ points [95 %]", "p Holm",
    "fixed/ broken", "SER", "features",
)  # fmt: skip
RUN_COLUMNS = ("method", "layers", "seed", "steered %", "Δ points [95 %]", "p", "run")
CHOSEN = "◀"
LAYERS_SHOWN = 2


@dataclass(frozen=True)
class FurtherTable:
    """A table below the main one. slug: in a LaTeX label."""

    title: str
    slug: str
    columns: tuple[str, ...]
    lines: list[list[str]]
    notes: list[str]


def layers_text(layers: Sequence[int], between: str = ", ") -> str:
    """`18`, `8, 12` or, for more, `8…22 (5)`; `–` for none."""
    if len(layers) <= LAYERS_SHOWN:
        return between.join(map(str, layers)) or "–"
    return f"{layers[0]}…{layers[-1]} ({len(layers)})"


def row_layers(row: Row) -> str:
    """A row's layers; `12 or 18` where each seed chose its own."""
    if row.method == "none":
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
        f"{_percent(row.mean('accuracy_baseline'))} → {_percent(row.mean('accuracy_steered'))}",
        points(row.mean("delta"), row.interval()),
        p_text(sweep.p_holm[row]),
        f"{number(row.mean('fixed'), '.0f')}/{number(row.mean('broken'), '.0f')}",
        ser,
        number(row.mean("unique_features"), ".0f"),
    ]


def _percent(share: float | None) -> str:
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
        cells.append(f"{_percent(was)} → {_percent(now)}\n{points(delta, (low, high))}")
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
        _percent(figures["accuracy_steered"]),
        points(*delta_of(run, None)), p_text(as_float(figures["p_value"])), run.key,
    ]  # fmt: skip


def notes(sweep: SweepComparison) -> list[str]:
    """What one must know to read the table."""
    found = []
    if any(row.over_seeds for row in sweep.rows):
        found.append(
            "Several seeds: means; interval and p-value are over items and seeds. One seed, or all "
            "alike: the interval is the paired bootstrap over items, p McNemar's exact test; what "
            "another seed would give isn't in them."
        )
        if any(row.over_seeds and row.estimates().samples is None for row in sweep.rows):
            found.append(
                "Some runs have no items.parquet (they were made before there was one): intervals "
                "over their seeds take the items' part from single runs and are somewhat too wide."
            )
    else:
        found.append("Intervals: paired bootstrap over items. p: McNemar's exact test.")
    if any(row.estimates().fractional for row in sweep.rows):
        found.append(
            "Rewards aren't all 0 or 1: in place of McNemar's test, which sees only which items "
            "cross .5, p is of the mean difference over items (normal)."
        )
    if any(len(row.train_seeds) > 1 for row in sweep.rows):
        found.append(
            "Runs that differ only in task.train_seed or seed are put together: each is a draw "
            "(of training items, of a seed), and their number stands under seeds."
        )
    found.append(f"{holm_note(sweep)} SER: broken / (fixed + broken).")
    if sweep.chosen:
        found.append(f"{CHOSEN} the layers that did best on validation; test was not looked at.")
    found += harmful(sweep)
    found += undefined_lines(sweep)
    baselines = [row.mean("accuracy_baseline") for row in sweep.rows]
    baselines = [share for share in baselines if np.isfinite(share)]
    if baselines and np.ptp(baselines) > 1e-9:
        found.append(
            f"The unsteered model is not the same in all runs ({min(baselines):.4f} to "
            f"{max(baselines):.4f}): they ran on different hardware or library versions."
        )
    return found


def harmful(sweep: SweepComparison) -> list[str]:
    """The methods that do worse than nothing where their choices were made, controls aside."""
    worse = []
    for row in sweep.rows:
        was = row.mean("accuracy_baseline", "validation")
        now = row.mean("accuracy_steered", "validation")
        if not row.control and now < was - 1e-9:  # never where one of them is undefined
            where = f"{row.family}, {row_layers(row)}" if row.layers else row.family
            worse.append(f"{where} ({100 * was:.1f} → {100 * now:.1f} %)")
    if not worse:
        return []
    return [f"Worse than the unsteered model on validation, and steered all the same: "
            f"{'; '.join(worse)}."]  # fmt: skip


def holm_note(sweep: SweepComparison) -> str:
    """What p-values are corrected for."""
    tried = [
        f"{name} {len(rows)}" for name, rows in sweep.tried.items() if rows[0].method != "none"
    ]
    return (
        "p Holm: corrected for every row of the same method, all its layers and options "
        f"({', '.join(tried)})."
    )


def undefined_lines(sweep: SweepComparison) -> list[str]:
    """Which figures are a dash, of how many runs, and why."""
    runs: dict[str, int] = {}
    for run in (run for row in sweep.rows for run in row.runs):
        assert run.result is not None
        for name, what in run.result.get("undefined", {}).items():
            line = f"{name}: {what}"
            runs[line] = runs.get(line, 0) + 1
    if not runs:
        return []
    told = "; ".join(f"{line} (runs: {n})" for line, n in runs.items())
    return [f"{UNDEFINED}: undefined in result.json, whose `warnings` may say why: {told}."]


def headline(sweep: SweepComparison) -> str | None:
    """CRL at its best on validation, of all its variants, against the rival that does best there,
    baselines included, and against the best CorrSteer where that is another."""
    able = [row for row in sweep.rows if not row.control and row.method != "none"]
    learned = [row for row in able if _is_crl(row)]
    rivals = [row for row in able if not _is_crl(row)]
    if not learned or not rivals:
        return None
    best = max(learned, key=lambda row: row.validation)
    rival = max(rivals, key=lambda row: row.validation)
    told = [f"Best on validation, measured on test: {_named(best)}; against the best of all other "
            f"methods, baselines included: {_against(best, rival)}."]  # fmt: skip
    fixed = [row for row in rivals if row.method.startswith("corrsteer")]
    if fixed and not rival.method.startswith("corrsteer"):
        corrsteer = max(fixed, key=lambda row: row.validation)
        told.append(f"Against the best CorrSteer: {_against(best, corrsteer)}.")
    return " ".join(told)


def _is_crl(row: Row) -> bool:
    """Whether a row's method is CRL or a variant of it, such as `crl_published`."""
    return row.method.startswith("crl")


def _against(best: Row, rival: Row) -> str:
    found = difference(*same_items(best, rival))
    seeds = " and ".join(map(str, found.n_seeds))
    paired = "paired by item" if found.paired else "not paired by item, so too wide"
    return (
        f"{_named(rival)}; difference {points(found.value, found.interval)} points ({paired}; "
        f"seeds: {seeds}, n = {found.n})"
    )


def _named(row: Row) -> str:
    word = "layer" if row.single or row.alternatives else "layers"
    where = f", {word} {row_layers(row)}" if row.layers else ""
    return f"{row.family}{where}: {_percent(row.mean('accuracy_steered'))} %"


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
            delta = points(row.mean("delta"), row.interval()) if row.method != "none" else "–"
            p = p_text(part.sweep.p_holm[row]) if row.method != "none" else "–"
            which = [value for _, value in part.names]
            lines.append(
                [*which, row.family, row_layers(row), str(len(row.runs)), f"{row.mean('n'):.0f}",
                 accuracy, delta, p]
            )  # fmt: skip
    return lines


def matrix(parts: SweepParts) -> tuple[list[str], list[list[str]]]:
    """Methods by parts: head and lines; a cell has accuracy and, below it, the difference."""
    best = [best_rows(part.sweep) for part in parts.parts]
    ns = [f"{part.title}, n = {part.sweep.rows[0].mean('n'):,.0f}" for part in parts.parts]
    lines = []
    for family in parts.families:
        line = [family]
        for rows in best:
            row = rows.get(family)
            if row is None:
                line.append("–")
                continue
            accuracy = share(row.mean("accuracy_steered"), row.accuracy_interval())
            delta = points(row.mean("delta"), row.interval()) if row.method != "none" else ""
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
    "counts for each of them. r: correlation in stage 1 with the reward, or with the prompt being "
    "harmful (warmup.contrast=benign)."
)


def feature_cells(credit: FeatureCredit) -> list[str]:
    counts = (credit.rank, credit.items, credit.changed, credit.fixed, credit.broken)
    return [
        credit.row.family, row_layers(credit.row), f"{credit.layer}/{credit.feature}",
        f"{credit.tokens:,}", number(credit.coefficient, ".1f"),
        number(credit.correlation, "+.3f"),
        *["–" if count is None else f"{count:,}" for count in counts],
    ]  # fmt: skip

"""A sweep's rows as text: in the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from crl_exp.comparison import Row, SweepComparison, split
from crl_exp.records import Record
from crl_exp.statistics import mean_interval

COLUMNS = (
    "method", "layers", "seeds", "n", "unsteered → steered %", "Δ points [95 %]", "p Holm",
    "fixed/ broken", "SER", "features",
)  # fmt: skip
RUN_COLUMNS = ("method", "layers", "seed", "steered %", "Δ points [95 %]", "p", "run")
# A terminal narrower than this is shown fewer columns.
FULL_WIDTH = 112
LEFT_OUT = ("n", "fixed/ broken", "features")
CHOSEN = "◀"
LAYERS_SHOWN = 2


def layers_text(layers: Sequence[int]) -> str:
    """`18`, `8, 12` or, for more, `8…22 (5)`."""
    if len(layers) <= LAYERS_SHOWN:
        return ", ".join(map(str, layers))
    return f"{layers[0]}…{layers[-1]} ({len(layers)})"


def points(value: float, interval: Sequence[float]) -> str:
    """A difference of shares in percentage points, `+9.1 [7.0, 11.2]`."""
    middle, low, high = (round(100 * number, 1) + 0.0 for number in (value, *interval))
    return f"{middle:+.1f} [{low:.1f}, {high:.1f}]"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def main_cells(sweep: SweepComparison, row: Row) -> list[str]:
    ser = "–" if row.ser is None else f"{row.ser:.2f}"
    mark = f" {CHOSEN}" if row in sweep.chosen else ""
    return [
        row.family,
        "–" if row.method == "none" else layers_text(row.layers) + mark,
        str(len(row.runs)),
        f"{row.mean('n'):.0f}",
        f"{100 * row.mean('accuracy_baseline'):.1f} → {100 * row.mean('accuracy_steered'):.1f}",
        points(row.mean("delta"), row.interval()),
        p_text(sweep.p_holm[row]),
        f"{row.mean('fixed'):.0f}/{row.mean('broken'):.0f}",
        ser,
        f"{row.mean('unique_features'):.0f}",
    ]


def set_columns(sweep: SweepComparison) -> list[str]:
    sets = [
        f"{_set_name(sweep, name)}, n = {split(sweep.first, name)['n']}" for name in _sets(sweep)
    ]
    return ["method", "layers", *sets]


def set_cells(sweep: SweepComparison, row: Row) -> list[str]:
    """The test sets side by side. Where one is benign, all are shares of refused prompts."""
    cells = [row.family, layers_text(row.layers)]
    for name in _sets(sweep):
        delta, (low, high) = row.mean("delta", name), row.interval(name)
        was, now = row.mean("accuracy_baseline", name), row.mean("accuracy_steered", name)
        if name == "benign":  # it is scored 1 where the prompt was answered
            was, now, delta, low, high = 1 - was, 1 - now, -delta, -high, -low
        cells.append(f"{100 * was:.1f} → {100 * now:.1f}\n{points(delta, (low, high))}")
    return cells


def _sets(sweep: SweepComparison) -> list[str | None]:
    return [None, *sweep.test_sets]


def _set_name(sweep: SweepComparison, name: str | None) -> str:
    return name or sweep.first.config["task"]["name"]


def run_cells(row: Row, run: Record) -> list[str]:
    figures = split(run, None)
    return [
        row.family, layers_text(row.layers), str(run.config["seed"]),
        f"{100 * figures['accuracy_steered']:.1f}",
        points(figures["delta"], figures["delta_ci95"]), p_text(figures["p_value"]), run.key,
    ]  # fmt: skip


def notes(sweep: SweepComparison) -> list[str]:
    """What one must know to read the table."""
    found = []
    if any(row.over_seeds for row in sweep.rows):
        found.append(
            "Several seeds: means; the interval is Student's t over seeds (how much training "
            "varies), the p-value the largest of the seeds. One seed, or all alike: the interval "
            "is the paired bootstrap over items."
        )
    found.append(
        "p: McNemar's exact test, Holm-corrected for the layers that a method was tried at. SER: "
        "broken / (fixed + broken)."
    )
    if sweep.chosen:
        found.append(f"{CHOSEN} the layers that did best on validation; test was not looked at.")
    baselines = {row.mean("accuracy_baseline") for row in sweep.rows}
    if np.ptp(list(baselines)) > 1e-9:
        found.append(
            f"The unsteered model is not the same in all runs ({min(baselines):.4f} to "
            f"{max(baselines):.4f}): they ran on different hardware or library versions."
        )
    return found


def headline(sweep: SweepComparison) -> str | None:
    """CRL at its chosen layer against the CorrSteer that does best on validation."""
    learned = [row for row in sweep.rows if row.method == "crl" and not row.control]
    fixed = [r for r in sweep.rows if r.method.startswith("corrsteer") and not r.control]
    if not learned or not fixed:
        return None
    best = max(learned, key=lambda row: row.validation)
    rival = max(fixed, key=lambda row: row.validation)
    gains = best.values("accuracy_steered") - rival.mean("accuracy_steered")
    interval = points(float(gains.mean()), mean_interval(gains))
    if len(gains) < 2:
        interval = f"{100 * gains.mean():+.1f}"
    return (
        f"Best on validation, measured on test: {_named(best)}; {_named(rival)}; difference "
        f"{interval} points (seeds: {len(gains)}, n = {best.mean('n'):.0f})."
    )


def _named(row: Row) -> str:
    word = "layer" if len(row.layers) == 1 else "layers"
    share = 100 * row.mean("accuracy_steered")
    return f"{row.family}, {word} {layers_text(row.layers)}: {share:.1f} %"


def set_title(sweep: SweepComparison) -> str:
    what = "Refused" if "benign" in sweep.test_sets else "Right"
    return f"{what} prompts by test set, unsteered → steered %, Δ points [95 %]"


def markdown(sweep: SweepComparison) -> str:
    """The report as Markdown: the table, its notes, test sets, single runs, unfinished runs."""
    rows = [main_cells(sweep, row) for row in sweep.rows]
    parts = [f"# {title(sweep)}", _markdown_table(COLUMNS, rows)]
    best = headline(sweep)
    parts += ([best] if best else []) + notes(sweep)
    if sweep.test_sets:
        cells = [set_cells(sweep, row) for row in sweep.rows]
        parts += [f"## {set_title(sweep)}", _markdown_table(set_columns(sweep), cells)]
    runs = [run_cells(row, run) for row in sweep.rows for run in row.runs]
    parts += [
        "## Runs",
        "Intervals are paired bootstraps over items.",
        _markdown_table(RUN_COLUMNS, runs),
    ]
    if sweep.unfinished:
        parts += ["## Not finished", "\n".join(f"- {line}" for line in unfinished(sweep))]
    return "\n\n".join(parts) + "\n"


def title(sweep: SweepComparison) -> str:
    result = sweep.first.result
    assert result is not None
    return f"{sweep.first.sweep}: {result['task']}, {result['model']}, n = {result['n']:,}"


def unfinished(sweep: SweepComparison) -> list[str]:
    """Runs without a result, with their state and error."""
    lines = []
    for run in sweep.unfinished:
        error = str(run.status.get("error") or "").strip().split("\n")[0]
        lines.append(f"{run.key} {run.state}{': ' + error if error else ''}")
    return lines


def _markdown_table(columns: Sequence[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    safe = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in safe)


def print_report(sweep: SweepComparison, console: Console) -> None:
    left_out = () if console.width >= FULL_WIDTH else LEFT_OUT
    kept = [i for i, column in enumerate(COLUMNS) if column not in left_out]
    cells = [[main_cells(sweep, row)[i] for i in kept] for row in sweep.rows]
    _print_table(console, title(sweep), [COLUMNS[i] for i in kept], cells)
    if left_out:
        console.print("A wider terminal, and table.md, show more columns.", style="dim")
    best = headline(sweep)
    for line in ([best] if best else []) + notes(sweep):
        console.print(line, highlight=False)
    if sweep.test_sets:
        cells = [set_cells(sweep, row) for row in sweep.rows]
        _print_table(console, set_title(sweep), set_columns(sweep), cells)
    for line in unfinished(sweep):
        console.print(f"not finished: {line}", style="yellow", highlight=False)


def _print_table(
    console: Console, name: str, columns: Sequence[str], rows: list[list[str]]
) -> None:
    """Numbers are never wrapped; a method is named once."""
    table = Table(title=name, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
                  show_edge=False)  # fmt: skip
    for i, column in enumerate(columns):
        header = column
        for at, new in ((" → ", "\n→ "), ("/ ", "/\n"), (" [", "\n["), (", ", "\n")):
            header = header.replace(at, new)
        table.add_column(header, justify="left" if i < 2 else "right", no_wrap=i > 0,
                         min_width=12 if i == 0 else None)  # fmt: skip
    before = None
    for row in rows:
        if before is not None and row[0] != before:
            table.add_section()
        table.add_row(row[0] if row[0] != before else "", *row[1:])
        before = row[0]
    console.print(table)

"""A sweep's tables in the terminal and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crl_exp.config.display import plain
from crl_exp.report.comparison.feature_credit import FeatureCredit
from crl_exp.report.comparison.rows import SweepComparison
from crl_exp.report.parts import SweepParts
from crl_exp.report.tables.cells import (
    COLUMNS,
    FEATURE_COLUMNS,
    FEATURE_NOTE,
    OVERVIEW_NOTE,
    RUN_COLUMNS,
    FurtherTable,
    feature_cells,
    main_cells,
    matrix,
    overview_cells,
    overview_columns,
    run_cells,
    set_cells,
    set_columns,
    set_title,
    title,
    unfinished,
)
from crl_exp.report.tables.further import further_tables
from crl_exp.report.tables.notes import headline, notes
from crl_exp.runs.records import Record

# A terminal narrower than this is shown fewer columns.
FULL_WIDTH = 112
FEATURES_SHOWN = 20
LEFT_OUT = ("n", "fixed/ broken", "features")


def markdown(sweep: SweepComparison, level: int = 1) -> str:
    """The report as Markdown: the table, its notes, test sets, single runs, unfinished runs."""
    head = "#" * level
    rows = [main_cells(sweep, row) for row in sweep.rows]
    parts = [f"{head} {as_text(title(sweep))}"]
    parts += [_markdown_table(COLUMNS, rows)] if rows else []
    best = headline(sweep)
    parts += ([best] if best else []) + notes(sweep)
    if sweep.test_sets:
        cells = [set_cells(sweep, row) for row in sweep.rows]
        parts += [f"{head}# {set_title(sweep)}", _markdown_table(set_columns(sweep), cells)]
    parts += further_markdown(further_tables(sweep), level + 1)
    runs = [run_cells(row, run) for row in sweep.rows for run in row.runs]
    if runs:
        parts += [
            f"{head}# Runs",
            "Intervals are paired bootstraps over items.",
            _markdown_table(RUN_COLUMNS, runs),
        ]
    return "\n\n".join(parts + _not_finished(sweep.unfinished, level + 1)) + "\n"


def further_markdown(tables: Sequence[FurtherTable], level: int) -> list[str]:
    found = []
    for more in tables:
        found += [f"{'#' * level} {more.title}", _markdown_table(more.columns, more.lines)]
        found += more.notes
    return found


def markdown_of_parts(parts: SweepParts) -> str:
    """Methods by part first, then a section for each part."""
    head, lines = matrix(parts)
    found = [
        f"# {parts.name}",
        "Accuracy in % [95 %]; below it the difference to the unsteered model in points [95 %].",
        _markdown_table(head, lines),
        OVERVIEW_NOTE,
        _markdown_table(overview_columns(parts), overview_cells(parts)),
        *[markdown(part.sweep, level=2).rstrip() for part in parts.parts],
        *_not_finished(parts.unfinished, 2),
    ]
    return "\n\n".join(found) + "\n"


def feature_section(credits: Sequence[FeatureCredit]) -> str:
    """The features with the most items that flipped; features.csv has all."""
    if not credits:
        return ""
    shown = credits[:FEATURES_SHOWN]
    what = f"## Features, the {len(shown)} with the most items fixed or broken"
    lines = [_linked(credit) for credit in shown]
    return "\n" + "\n\n".join([what, FEATURE_NOTE, _markdown_table(FEATURE_COLUMNS, lines)]) + "\n"


def _linked(credit: FeatureCredit) -> list[str]:
    cells = feature_cells(credit)
    at = FEATURE_COLUMNS.index("feature")
    if credit.link:
        name, space, label = cells[at].partition(" ")
        cells[at] = f"[{name}]({credit.link}){space}{label}"
    return cells


def _not_finished(runs: Sequence[Record], level: int) -> list[str]:
    lines = "\n".join(f"- {as_text(line)}" for line in unfinished(runs))
    return [f"{'#' * level} Not finished", lines] if runs else []


def _markdown_table(columns: Sequence[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    safe = [[_markdown_cell(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in safe)


def as_text(text: str) -> str:
    """For Markdown: what begins as an HTML tag is shown, not rendered."""
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", text)


def _markdown_cell(text: str) -> str:
    return as_text(text).replace("|", "\\|").replace("\n", "<br>")


def print_parts(parts: SweepParts, console: Console) -> None:
    """Where there are several parts, methods by part first; then each part."""
    if parts.several:
        print_table(console, parts.name, overview_columns(parts), overview_cells(parts))
        console.print(OVERVIEW_NOTE, highlight=False, markup=False)
    for part in parts.parts:
        if parts.several:
            console.print()
        print_report(part.sweep, console)
    for line in unfinished(parts.unfinished):
        console.print(f"not finished: {plain(line)}", style="yellow", highlight=False, markup=False)


def print_report(sweep: SweepComparison, console: Console) -> None:
    left_out = () if console.width >= FULL_WIDTH else LEFT_OUT
    kept = [i for i, column in enumerate(COLUMNS) if column not in left_out]
    cells = [[cells[i] for i in kept] for cells in (main_cells(sweep, row) for row in sweep.rows)]
    if cells:
        print_table(console, title(sweep), [COLUMNS[i] for i in kept], cells)
    else:
        console.print(plain(title(sweep)), highlight=False, markup=False)
    if left_out:
        console.print("A wider terminal, and table.md, show more columns.", style="dim")
    best = headline(sweep)
    for line in ([best] if best else []) + notes(sweep):
        console.print(plain(line), highlight=False, markup=False)
    if sweep.test_sets:
        cells = [set_cells(sweep, row) for row in sweep.rows]
        print_table(console, set_title(sweep), set_columns(sweep), cells)
    for more in further_tables(sweep):
        console.print()
        print_table(console, more.title, more.columns, more.lines)
        for line in more.notes:
            console.print(plain(line), highlight=False, markup=False)
    for line in unfinished(sweep.unfinished):
        console.print(f"not finished: {plain(line)}", style="yellow", highlight=False, markup=False)


def print_table(console: Console, name: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    """Numbers are never wrapped; a method is named once. Names may hold what looks like markup."""
    table = Table(title=escape(plain(name)), title_justify="left", box=SIMPLE_HEAD,
                  padding=(0, 1, 0, 0), show_edge=False)  # fmt: skip
    for i, column in enumerate(columns):
        header = column
        for at, new in ((" → ", "\n→ "), ("/ ", "/\n"), (" [", "\n["), (", ", "\n")):
            header = header.replace(at, new)
        table.add_column(escape(header), justify="left" if i < 2 else "right", no_wrap=i > 0,
                         min_width=12 if i == 0 else None)  # fmt: skip
    before = None
    for row in rows:
        if before is not None and row[0] != before:
            table.add_section()
        cells = [row[0] if row[0] != before else "", *row[1:]]
        table.add_row(*[escape(plain(cell)) for cell in cells])
        before = row[0]
    console.print(table)

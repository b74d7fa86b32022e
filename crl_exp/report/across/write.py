"""The files of a comparison of sweeps, and what is printed of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console

from crl_exp.config.display import UNDEFINED, plain
from crl_exp.config.files import content_key
from crl_exp.config.paths import COMPARISONS, LONGEST
from crl_exp.report.across import figure
from crl_exp.report.across.compared import SweepsCompared, compare_sweeps
from crl_exp.report.across.matching import Side
from crl_exp.report.across.tables import (
    alone_lines,
    csv_of,
    key_lines,
    legend,
    notes_of,
    tables_of,
    together_tables,
)
from crl_exp.report.console.terminal import as_text, further_markdown, print_table
from crl_exp.report.drawn import Drawn
from crl_exp.report.files import Files
from crl_exp.report.page import document, further, made_by
from crl_exp.report.page import figure as figure_element
from crl_exp.report.parts import ReportPart, SweepParts
from crl_exp.report.tables.cells import FurtherTable
from crl_exp.report.tables.latex import latex_of_tables
from crl_exp.runs.records import find_sweep

LINES_SHOWN = 40
JOIN = "+"
WIDE = 100
"""A terminal narrower than this isn't shown n and seeds."""


def report_sweeps(
    names: Sequence[str], output_dir: Path, by: tuple[str, ...], console: Console
) -> int:
    """`python -m crl_exp report A B …`. Returns the exit code."""
    compared = compare_sweeps([find_sweep(name, output_dir) for name in names], by)
    folder = output_dir / COMPARISONS / folder_name(compared.sides, output_dir)
    command = command_of(names, output_dir, by)
    written = write_comparison(compared, folder, command)
    print_comparison(compared, console)
    console.print("\nwritten:")
    for path in written:
        console.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def folder_name(sides: Sequence[Side], output_dir: Path) -> str:
    """`A+B`; with a digest where other sweeps could be called so too."""
    names = [side.folder.absolute().name for side in sides]
    made = JOIN.join(names)
    places = [side.folder.resolve() for side in sides]
    known = all(place.parent == output_dir.resolve() for place in places)
    if known and not any(JOIN in name for name in names) and len(made.encode()) < LONGEST:
        return made
    cut = made.encode()[: LONGEST // 2].decode(errors="ignore").strip(" .") or COMPARISONS
    return f"{cut}-{content_key([str(place) for place in places])[:6]}"


def command_of(names: Sequence[str], output_dir: Path, by: tuple[str, ...]) -> str:
    """What was typed, to be typed again."""
    typed = ["python -m crl_exp report", *map(shlex.quote, names)]
    typed += [f"--by {shlex.quote(key)}" for key in by]
    if output_dir != Path("outputs"):
        typed.append(f"--output-dir {shlex.quote(str(output_dir))}")
    return plain(" ".join(typed))


def write_comparison(compared: SweepsCompared, folder: Path, command: str) -> list[Path]:
    """Write tables, figure and page into `folder`; returns what was written."""
    drawn = Drawn(folder, _all_parts(compared), home=folder)
    files = Files(folder, drawn)
    made_of = content_key([drawn.of_all, [[s.name, len(s.runs)] for s in compared.sides]])
    png = files.figure("sweeps", figure.sweeps, compared, made_of)
    tables, notes = tables_of(compared), [*notes_of(compared), *_figure_note(compared)]
    files.text("table.csv", csv_of(compared))
    files.text("table.md", _markdown(compared, command))
    files.text("table.tex", latex_of_tables(tables, JOIN.join(s.name for s in compared.sides)))
    body = [
        f"<h1>{escape(compared.name)}</h1>",
        *[f'<p class="about">{escape(line)}</p>' for line in legend(compared)],
        f'<p class="about">Made by <code>{escape(command)}</code></p>',
        *[line for s in compared.sides for line in made_by(s.parts, f"{s.letter}: ")],
        *further(tables[: len(together_tables(compared))]),
        *[f"<p class=note>{escape(line)}</p>" for line in notes],
        *(['<div class="figures">', figure_element(png), "</div>"] if png else []),
        *further(tables[len(together_tables(compared)) :]),
    ]
    files.text("report.html", document(compared.name, body))
    files.remove_others()
    drawn.save()
    return files.written


def _all_parts(compared: SweepsCompared) -> SweepParts:
    parts = [
        ReportPart((("sweep", side.name), *part.names), part.sweep)
        for side in compared.sides
        for part in side.parts.parts
    ]
    return SweepParts(compared.name, tuple(parts), ())


def _figure_note(compared: SweepsCompared) -> list[str]:
    n_tested = sum(bool(one.pairs) for one in compared.together)
    if n_tested <= figure.MOST_ROWS:
        return []
    return [f"The figure has the {figure.MOST_ROWS} of {n_tested} rows with the smallest p."]


def _markdown(compared: SweepsCompared, command: str) -> str:
    tables, n_together = tables_of(compared), len(together_tables(compared))
    lines = [
        f"# {as_text(compared.name)}",
        "\n".join(f"- {as_text(line)}" for line in legend(compared)),
        f"Made by `{command}`",
        *further_markdown(tables[:n_together], 2),
        *map(as_text, [*notes_of(compared), *_figure_note(compared)]),
        *further_markdown(tables[n_together:], 2),
    ]
    return "\n\n".join(lines) + "\n"


def print_comparison(compared: SweepsCompared, console: Console) -> None:
    """The rows side by side, and all else in lines; of many the first, as the files have all."""
    for line in legend(compared):
        console.print(plain(line), highlight=False, markup=False)
    for line in _first(key_lines(compared), "table.md has all of the keys that differ"):
        console.print(f"  differs: {plain(line)}", highlight=False, markup=False)
    for table in together_tables(compared):
        for number in range(1, len(compared.sides)):
            _print_against(compared, table, number, console)
    if console.width < WIDE:
        console.print("A wider terminal, and table.md, show more columns.", style="dim")
    for line in notes_of(compared):
        console.print(plain(line), highlight=False, markup=False)
    for line in _first(alone_lines(compared), "table.md has all rows that stand alone"):
        console.print(plain(line), highlight=False, markup=False)


def _print_against(
    compared: SweepsCompared, table: FurtherTable, number: int, console: Console
) -> None:
    """A sweep beside the first one. Columns of all wouldn't fit a terminal, which cuts them off."""
    n_sweeps, first = len(compared.sides), len(table.columns) - 2 * len(compared.sides) + 1
    own, against = first + number, first + n_sweeps + number - 1
    before = range(first) if console.width >= WIDE else range(table.n_left)
    kept = [*before, first, own, against]
    lines = [line for line in table.lines if line[own] != UNDEFINED]
    if not lines:
        return
    cells = [[line[i] for i in kept] for line in lines[:LINES_SHOWN]]
    console.print()
    print_table(console, table.title, [table.columns[i] for i in kept], cells)
    if len(lines) > LINES_SHOWN:
        more = len(lines) - LINES_SHOWN
        console.print(f"and {more} more rows: table.md and table.csv have them")


def _first(lines: list[str], rest: str) -> list[str]:
    more = len(lines) - LINES_SHOWN
    return [*lines[:LINES_SHOWN], f"and {more} more: {rest}"] if more > 0 else lines

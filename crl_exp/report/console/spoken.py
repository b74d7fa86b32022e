"""What a finished run or sweep says of itself where it was started, and what one may type next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from crl_exp.config.display import number, plain, undefined
from crl_exp.config.errors import UserError
from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.console.terminal import print_table
from crl_exp.report.examples import read_row
from crl_exp.report.labels import labels
from crl_exp.report.parts import compare_parts
from crl_exp.report.row_names import address
from crl_exp.report.tables.cells import layers_text, percent, points, row_layers
from crl_exp.runs.answers import has_answers
from crl_exp.runs.records import Record
from crl_exp.runs.result import Figure, Result

COMPARED = ("accuracy", "accuracy_unsteered", "delta")
"""Figures of a run that was held against the unsteered model."""
COLUMNS = ("method", "layers", "seeds", "n", "figure", "Δ points [95 %]")
WIDTH = 110
"""Columns where there is no terminal."""


def result_line(result: Result) -> str:
    """The figure that counts, the difference with its interval, to what, and n.

    Where the run was held against nothing: its primary figure, and the sentences that it says.
    """
    if not set(COMPARED) <= result.figures.keys():
        return "; ".join([_primary(result), *result.said])
    now, was, delta = (result.figures[name] for name in COMPARED)
    return (
        f"accuracy {percent(now.value)} %, {_difference(delta)} points against the unsteered "
        f"model's {percent(was.value)} %, n = {now.n:,} test items"
    )


def _primary(result: Result) -> str:
    figure = result.figures[result.primary]
    told = f"{result.primary} {number(figure.value, '.3f')}"
    if not (undefined(figure.low) or undefined(figure.high)):
        told += f" [{number(figure.low, '.3f')}, {number(figure.high, '.3f')}]"
    return told if figure.n is None else f"{told}, n = {figure.n:,}"


def _difference(delta: Figure) -> str:
    """A run may have no interval, where its difference is undefined."""
    ends = [float("nan") if end is None else end for end in (delta.low, delta.high)]
    return points(float("nan") if delta.value is None else delta.value, ends)


def said_of(run: Record) -> str:
    """A finished run in one line: what it is, and `result_line`."""
    assert run.result is not None
    where = f", layer{'s' * (len(run.layers) != 1)} {layers_text(run.layers)}" if run.layers else ""
    what = f"{labels([run])[run.key].text}{where}, seed {run.config['seed']}"
    return f"{what}: {result_line(Result.read(run.result))}"


def run_lines(run: Record) -> list[str]:
    """What a finished run says: its result, its folder, what to type next."""
    folder, sweep = (shlex.quote(_short(path)) for path in (run.path, run.path.parent))
    next_ = {f"report {sweep}": f"tables and figures of all runs in {_short(run.path.parent)}"}
    if has_answers(run):
        next_ = {
            f"show {folder} --fixed": "answers that came right, beside the unsteered ones",
            f"show {folder} --broken": "answers that went wrong",
            **next_,
        }
    return ["", said_of(run), f"  in {_short(run.path)}", *_to_type(next_)]


def _to_type(lines: dict[str, str]) -> list[str]:
    width = max(map(len, lines))
    return ["to type next:"] + [
        f"  python -m crl_exp {typed:<{width}}  # {why}" for typed, why in lines.items()
    ]


def _short(path: Path) -> str:
    """From where one stands, if the path lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def print_sweep(runs: Sequence[Record]) -> None:
    """The table of a sweep's finished runs, and what to type next.

    Where they can't be put side by side, it is said why.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    folder = runs[0].path.parent
    best: Row | None = None
    try:
        parts = compare_parts(list(runs))
    except UserError as error:
        print(plain(f"no table: {error}"))
    else:
        for part in parts.parts:
            name = f"{folder.name}: {part.title}" if part.title else folder.name
            print_table(console, name, COLUMNS, sweep_cells(part.sweep))
        first = parts.parts[0]
        best = read_row(first.sweep)
    sweep = shlex.quote(folder.name if folder.parent == Path("outputs").absolute() else str(folder))
    next_ = {
        f"report {sweep}": "all tables, figures and a page",
        f"status {sweep}": "its runs, and those that aren't finished",
    }
    if best is not None and has_answers(best.runs[0]):
        named = shlex.quote(f"{_short(folder) if '/' in sweep else folder.name}:"
                            f"{address(first, best)}")  # fmt: skip
        next_[f"show {named} --fixed"] = "answers that came right"
    for line in _to_type(next_):
        print(plain(line))


def sweep_cells(sweep: SweepComparison) -> list[list[str]]:
    """A line for each row, and for each analysis its primary figure."""
    lines = [
        [row.family, row_layers(row), str(len(row.runs)), f"{row.mean('n'):.0f}",
         f"{percent(row.mean('accuracy_baseline'))} → {percent(row.mean('accuracy_steered'))} %",
         points(row.mean("delta"), row.interval())]
        for row in sweep.rows
    ]  # fmt: skip
    for one in sweep.analyses:
        found = one.result.figures[one.result.primary]
        lines.append(
            [one.label.text, layers_text(one.run.layers or ()), "1", number(found.n, "d"),
             _primary(one.result).partition(", n =")[0], "–"]
        )  # fmt: skip
    return lines

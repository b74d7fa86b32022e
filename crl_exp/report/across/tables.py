"""What the tables of several sweeps say, cell by cell."""

from __future__ import annotations

from typing import Any

from crl_exp.report.across.compared import (
    Beside,
    SweepsCompared,
    baselines_differ,
    reasons,
)
from crl_exp.report.comparison.pairs import Pair
from crl_exp.report.comparison.rows import Row
from crl_exp.report.tables import csv as table_csv
from crl_exp.report.tables.cells import FurtherTable, p_text, points, row_layers, share
from crl_exp.report.tables.ladder import SAME
from crl_exp.report.tables.pairs import better_worse, pair_notes

KEYS_TITLE = "What the sweeps differ in"
ALONE_TITLE = "Rows of one sweep, which none of another stands beside"
VALUE_CHARACTERS = 80
RUNS_NAMED = 5


def tables_of(compared: SweepsCompared) -> list[FurtherTable]:
    """Those that have a line: rows side by side, by what was asked; keys; rows that stand alone."""
    found = [*together_tables(compared), _keys(compared), _alone(compared)]
    return [table for table in found if table.lines]


def together_tables(compared: SweepsCompared) -> list[FurtherTable]:
    """One for each task, model and the like."""
    by_where: dict[str, list[Beside]] = {}
    for one in compared.together:
        by_where.setdefault(one.where, []).append(one)
    letters = [side.letter for side in compared.sides]
    columns = (
        "method", "layers", "n", "seeds",
        *[f"{letter}: % and Δ [95 %]" for letter in letters],
        *[f"{letter} − {letters[0]} [95 %], p Holm" for letter in letters[1:]],
    )  # fmt: skip
    return [
        FurtherTable(
            f"{compared.name}: {where}", f"together-{i}" if i else "together", columns,
            [together_cells(compared, one) for one in rows], [],
        )
        for i, (where, rows) in enumerate(by_where.items())
    ]  # fmt: skip


def together_cells(compared: SweepsCompared, one: Beside) -> list[str]:
    numbers = range(len(compared.sides))
    seeds = [str(len(one.rows[n].runs)) if n in one.rows else "–" for n in numbers]
    return [
        one.label, row_layers(one.row), f"{one.row.mean('n'):.0f}", " / ".join(seeds),
        *[_figures(compared, one, number) for number in numbers],
        *[_against(compared, one, number) for number in numbers[1:]],
    ]  # fmt: skip


def _figures(compared: SweepsCompared, one: Beside, number: int) -> str:
    if number in one.rows:
        return _accuracy(one.rows[number])
    return f"the runs of {compared.sides[one.first].letter}" if number in one.same else "–"


def _accuracy(row: Row) -> str:
    """A row's accuracy; below it Δ to the unsteered model."""
    told = share(row.mean("accuracy_steered"), row.accuracy_interval())
    return told if row.unsteered else f"{told}\n{points(row.mean('delta'), row.interval())}"


def _against(compared: SweepsCompared, one: Beside, number: int) -> str:
    pair = one.pairs.get(number)
    if pair is None:
        return "–"
    found, to = pair.difference, compared.sides[one.first].letter
    told = f"{compared.sides[number].letter} − {to}: " if one.first else ""
    if found.better == found.worse == 0 and found.value == 0:
        return f"{told}{SAME}"
    return (
        f"{told}{points(found.value, found.interval)}\np {p_text(pair.p_holm)}, "
        f"{better_worse(found)}"
    )


def _keys(compared: SweepsCompared) -> FurtherTable:
    lines = [
        [key.key, ", ".join(key.methods), *[_values(values) for values in key.values],
         "yes" if key.apart else "no"]
        for key in compared.keys
    ]  # fmt: skip
    heads = [f"{side.letter}: {side.name}" for side in compared.sides]
    note = (
        "Of methods that are in several sweeps. Rows are paired across a key (yes) where each "
        "sweep holds it at one value; where a sweep has several values, only rows of the same "
        "value are."
    )
    return FurtherTable(KEYS_TITLE, "keys", ("key", "methods", *heads, "paired across"), lines,
                        [note], n_left=3 + len(heads))  # fmt: skip


def _values(values: tuple[str, ...]) -> str:
    text = " | ".join(" ".join(value.split()) for value in values) or "–"
    return text if len(text) <= VALUE_CHARACTERS else text[: VALUE_CHARACTERS - 1].rstrip() + "…"


def _alone(compared: SweepsCompared) -> FurtherTable:
    lines = [
        [one.label, row_layers(one.row), one.where, compared.sides[one.first].name,
         "\n".join(reasons(compared, one)), str(len(one.row.runs)), f"{one.row.mean('n'):.0f}",
         _accuracy(one.row)]
        for one in compared.alone
    ]  # fmt: skip
    columns = ("method", "layers", "what was asked", "only in", "why", "seeds", "n",
               "% and Δ [95 %]")  # fmt: skip
    return FurtherTable(ALONE_TITLE, "alone", columns, lines, [], n_left=5)


def key_lines(compared: SweepsCompared) -> list[str]:
    """What the sweeps differ in, a line each, for the terminal."""
    letters = [side.letter for side in compared.sides]
    return [
        f"{key.key}: "
        + "; ".join(f"{a} {_values(v)}" for a, v in zip(letters, key.values, strict=True))
        + f" ({', '.join(key.methods)}{'' if key.apart else '; not paired across it'})"
        for key in compared.keys
    ]


def alone_lines(compared: SweepsCompared) -> list[str]:
    """Rows that stand alone, a line each, for the terminal."""
    return [
        f"only in {compared.sides[one.first].letter}: {one.label} @ {row_layers(one.row)}, "
        f"{one.where} ({'; '.join(reasons(compared, one))})"
        for one in compared.alone
    ]


def legend(compared: SweepsCompared) -> list[str]:
    """Which letter is which sweep, with its runs."""
    found = []
    for side in compared.sides:
        analyses = {one.run.path for part in side.parts.parts for one in part.sweep.analyses}
        waiting = {run.path for part in side.parts.parts for run in part.sweep.unfinished}
        waiting |= {run.path for run in side.parts.unfinished}
        told = f"{side.letter}: {side.name}, {len(side.runs)} finished runs"
        if waiting:
            told += f"; {len(waiting)} are not finished, and in no row"
        if analyses:
            told += f"; {len(analyses)} analyses answer no item, and are left aside"
        found.append(told)
    return found


def notes_of(compared: SweepsCompared) -> list[str]:
    """What one must know to read the tables."""
    a = compared.sides[0].letter
    pairs = compared.pairs
    found = [
        f"Rows stand side by side that agree in method, layers, task, model and options, but for "
        f"what the sweeps differ in. Differences are to {a}, or to the first sweep that has the "
        "row; accuracies are in %, all differences in points."
    ]
    found += pair_notes(pairs) if pairs else ["No two rows had to be tested: all runs are shared."]
    if pairs:
        found.append(
            f"The family of Holm's correction: these {len(pairs)}, every row that two of the "
            "sweeps have, all layers and options; what either sweep tried by itself is in its own "
            "report."
        )
    if compared.twice:
        keys = list(compared.twice)
        more = f" and {len(keys) - RUNS_NAMED} more" if len(keys) > RUNS_NAMED else ""
        found.append(
            f"{len(keys)} runs are in several sweeps (the same run key) and counted once, in the "
            f"first: {', '.join(keys[:RUNS_NAMED])}{more}. A row of nothing else isn't tested."
        )
    if otherwise := compared.ended_otherwise:
        found.append(
            f"Of these {len(otherwise)} did not end alike in each sweep "
            f"({', '.join(otherwise[:RUNS_NAMED])}): another machine, or another version. "
            "`python -m crl_exp compare SWEEP/RUN_KEY OTHER/RUN_KEY` sets two against each other."
        )
    if any(baselines_differ(one) for one in compared.together):
        found.append(
            "The unsteered model is not the same in all sweeps (another model, other hardware or "
            "library versions): the difference of two accuracies isn't that of their Δ."
        )
    return found


CSV = (
    "sweep", "asked", "method", "layers", "seeds", "n", "accuracy", "accuracy_low",
    "accuracy_high", "delta", "delta_low", "delta_high", "against", "against_seeds", "difference",
    "difference_low", "difference_high", "test", "p_value", "p_holm", "p_holm_of", "better",
    "worse", "paired", "alone_because",
)  # fmt: skip


def csv_of(compared: SweepsCompared) -> str:
    """A line for each row of each sweep; shares as fractions."""
    lines = []
    for one in compared.beside:
        for number, row in one.rows.items():
            pair = one.pairs.get(number)
            figures = [row.mean("accuracy_steered"), *row.accuracy_interval(), row.mean("delta"),
                       *row.interval()]  # fmt: skip
            against = [""] * 12 if pair is None else _pair_cells(compared, one, pair)
            why = "; ".join(reasons(compared, one)) if one.alone else ""
            lines.append(
                [compared.sides[number].name, one.where, one.label,
                 " ".join(map(str, row.layers)), " ".join(map(str, row.seeds)),
                 int(row.mean("n")), *figures, *against, why]
            )  # fmt: skip
    return table_csv.as_csv(CSV, lines)


def _pair_cells(compared: SweepsCompared, one: Beside, pair: Pair) -> list[Any]:
    found = pair.difference
    counts = ["" if count is None else count for count in (found.better, found.worse)]
    return [
        compared.sides[one.first].name, " ".join(map(str, one.row.seeds)), found.value,
        *found.interval, found.test, found.p_value, pair.p_holm, len(compared.pairs), *counts,
        found.paired,
    ]  # fmt: skip

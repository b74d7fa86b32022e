"""Rows of several sweeps set against each other, item by item."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from crl_exp.config.errors import UserError
from crl_exp.report.across.matching import KeyValues, Matched, Matching, Side
from crl_exp.report.comparison.comparable import differences
from crl_exp.report.comparison.pairs import Difference, Pair, difference, same_items
from crl_exp.report.comparison.rows import Row, holm
from crl_exp.report.parts import compare_parts
from crl_exp.runs.records import Record, find_records

MOST = 7
"""Sweeps that the figure has a colour and a marker for."""
ALLOWED = ("model.", "weights:")
"""What may differ between rows that answered the same items: which model did is said."""
FAULTS_SHOWN = 3


@dataclass(frozen=True)
class Beside:
    """Rows that stand side by side, by the number of their sweep.

    pairs: each later row against the first of them, on the same items. same: sweeps that have no
    other runs of it than an earlier one. why: what keeps it from a row that it would belong to, and
    that was asked something else.
    """

    label: str
    where: str
    rows: dict[int, Row]
    same: tuple[int, ...]
    pairs: dict[int, Pair]
    why: tuple[str, ...]

    @property
    def first(self) -> int:
        return min(self.rows)

    @property
    def row(self) -> Row:
        return self.rows[self.first]

    @property
    def alone(self) -> bool:
        """Whether one sweep has it and no other."""
        return len(self.rows) == 1 and not self.same


@dataclass(frozen=True)
class SweepsCompared:
    sides: tuple[Side, ...]
    beside: tuple[Beside, ...]
    keys: tuple[KeyValues, ...]
    matching: Matching

    @property
    def name(self) -> str:
        return " + ".join(side.name for side in self.sides)

    @cached_property
    def together(self) -> list[Beside]:
        return [one for one in self.beside if not one.alone]

    @cached_property
    def alone(self) -> list[Beside]:
        return [one for one in self.beside if one.alone]

    @property
    def pairs(self) -> list[Pair]:
        """All that p-values are corrected for."""
        return [pair for one in self.beside for pair in one.pairs.values()]

    @cached_property
    def twice(self) -> dict[str, list[Record]]:
        """Finished runs that are in several sweeps, by key."""
        found: dict[str, dict[int, Record]] = {}
        for number, side in enumerate(self.sides):
            for run in side.runs:
                found.setdefault(run.key, {}).setdefault(number, run)
        return {key: list(runs.values()) for key, runs in found.items() if len(runs) > 1}

    @property
    def ended_otherwise(self) -> list[str]:
        """Keys of those of them whose results aren't the same."""
        return [key for key, runs in self.twice.items() if len({_ended(run) for run in runs}) > 1]


def _ended(run: Record) -> str:
    assert run.result is not None
    return repr([run.result[key] for key in ("n", "accuracy_baseline", "accuracy_steered")])


def compare_sweeps(folders: Sequence[Path], by: tuple[str, ...] = ()) -> SweepsCompared:
    """Set the sweeps in two folders or more side by side. by: as of `compare_parts`.

    Raises `UserError` where a sweep is given twice, where there are too many, where one has no
    finished run that steers, or where no row of one has a counterpart in another.
    """
    _refuse_folders(folders)
    names = [folder.absolute().name for folder in folders]
    sides = []
    for letter, name, folder in zip(ascii_uppercase, names, folders, strict=False):
        parts = compare_parts(find_records(folder), by)
        called = name if names.count(name) == 1 else str(folder)
        side = Side(letter, called, folder, parts)
        if not side.rows:
            raise UserError(
                f"{called}: its finished runs are analyses, which answer no item, so that they "
                f"can't be paired; `python -m crl_exp report {folder}` has them"
            )
        sides.append(side)
    matching = Matching(sides)
    found = [one for group in matching.matched() for one in _asked_alike(group)]
    tested = {
        (i, number): _difference(one.rows[number], one.row)
        for i, one in enumerate(found)
        for number in one.rows if number != one.first
    }  # fmt: skip
    corrected = holm([one.p_value for one in tested.values()])
    for ((i, number), made), p in zip(tested.items(), corrected, strict=True):
        found[i].pairs[number] = Pair(found[i].rows[number], found[i].row, made, p)
    compared = SweepsCompared(tuple(sides), tuple(found), tuple(matching.keys()), matching)
    if not compared.together:
        raise UserError(_nothing_in_common(compared))
    return compared


def _refuse_folders(folders: Sequence[Path]) -> None:
    if len(folders) > MOST:
        raise UserError(
            f"{len(folders)} sweeps: {MOST} at most can be told apart in one table and figure; "
            "compare fewer at a time"
        )
    seen: dict[Path, Path] = {}
    for folder in folders:
        before = seen.setdefault(folder.resolve(), folder)
        if before is not folder:
            raise UserError(
                f"{folder} is given twice{'' if folder == before else f', also as {before}'}: a "
                "sweep is compared with another one"
            )


def _asked_alike(group: Matched) -> list[Beside]:
    """A group as it is or, where some rows were asked something else, in several."""
    found, rows = [], dict(group.rows)
    same, why = group.same, ()
    while rows:
        first = min(rows)
        faults = {n: _otherwise(row, rows[first]) for n, row in rows.items() if n != first}
        alike = {n: row for n, row in rows.items() if not faults.get(n)}
        found.append(Beside(group.label, group.where, alike, same, {}, tuple(why)))
        rows = {n: row for n, row in rows.items() if n not in alike}
        same, why = (), next((text for text in faults.values() if text), ())
    return found


def _otherwise(row: Row, first: Row) -> tuple[str, ...]:
    """What keeps two rows from being paired: they weren't asked the same items in the same words.
    None: nothing does."""
    told = [line.strip() for line in differences([*row.runs, *first.runs])]
    # The runs that say so are those of the row and of the other one.
    faults = [re.sub(r" in \d+ \([^()]*\)", "", one) for one in told if not one.startswith(ALLOWED)]
    if faults:
        more = len(faults) - FAULTS_SHOWN
        return (*faults[:FAULTS_SHOWN], *([f"and {more} more"] if more > 0 else []))
    for one in (row, first):
        one.estimates()  # of damaged files it is said here
    try:
        same_items(row, first)
    except UserError as error:
        return (str(error),)
    return ()


def _difference(row: Row, first: Row) -> Difference:
    return difference(*same_items(row, first))


def _nothing_in_common(compared: SweepsCompared) -> str:
    lines = [
        f"  {one.label} @ {','.join(map(str, one.row.layers)) or '–'} of "
        f"{compared.sides[one.first].name}: {'; '.join(reasons(compared, one))}"
        for one in compared.beside[:10]
    ]
    rest = len(compared.beside) - len(lines)
    lines += [f"  and {rest} more"] if rest else []
    a, b = (side.name for side in compared.sides[:2])
    return (
        f"no row of {compared.name} is in two of them, so that nothing can be paired:\n"
        + "\n".join(lines)
        + f"\n`python -m crl_exp compare '{a}:METHOD@LAYERS' '{b}:METHOD@LAYERS'` pairs any two "
        "rows that answered the same items"
    )


def reasons(compared: SweepsCompared, one: Beside) -> list[str]:
    """Why a row that stands alone does, a line for each other sweep that has none beside it."""
    if one.why:
        return [f"asked something else: {text}" for text in one.why]
    found = []
    for number, side in enumerate(compared.sides):
        if number in one.rows:
            continue
        asked = [
            other.why[0] for other in compared.beside
            if other.why and number in other.rows
            and (other.label, other.row.layers) == (one.label, one.row.layers)
        ]  # fmt: skip
        why = f"asked something else there: {asked[0]}" if asked else (
            compared.matching.missing(number, one.row))  # fmt: skip
        found.append(f"{side.letter}: {why}")
    return found


def baselines_differ(one: Beside) -> bool:
    """Whether the unsteered model isn't the same in the rows side by side."""
    found = [row.mean("accuracy_baseline") for row in one.rows.values()]
    return bool(np.ptp(found) > 1e-9)

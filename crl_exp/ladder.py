"""A ladder from one method to another: what each step is worth.

Runs that say their `rung` stand on it, in the order of the numbers; each is set against the one
before it, item by item, with the keys in which the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from crl_exp.comparison import Row, SweepComparison, holm
from crl_exp.errors import UserError
from crl_exp.labels import options_of
from crl_exp.option_names import typed
from crl_exp.pairs import Difference, difference, same_items
from crl_exp.records import Record


@dataclass(frozen=True)
class Step:
    """A rung and what it differs from the one before it in, `fusion=multiply`.

    difference: this row minus the one before, on the same items. p_holm: corrected for the ladder's
    steps. Both None for the first rung, which changes nothing.
    """

    rung: int
    row: Row
    changes: tuple[str, ...]
    difference: Difference | None
    p_holm: float | None


def rung_of(record: Record) -> int | None:
    rung: int | None = record.config.get("rung")
    return rung


def ladders(sweep: SweepComparison) -> list[list[Step]]:
    """A ladder for each set of layers that has two rungs or more; rows that steer none are on each.

    Raises `UserError` where two rows of a ladder have the same rung.
    """
    rungs = {row: rung for row in sweep.rows if (rung := _rung(row)) is not None}
    steering = [row for row in rungs if row.method != "none"]
    sets = list(dict.fromkeys(row.layers for row in steering if row.layers)) or [()]
    found = []
    for layers in sets:
        rows = [row for row in rungs if row.layers in ((), layers) or row.method == "none"]
        if len(rows) > 1:
            found.append(_steps({row: rungs[row] for row in sorted(rows, key=rungs.__getitem__)}))
    return found


def _rung(row: Row) -> int | None:
    """The lowest that its runs say."""
    return min((rung for run in row.runs if (rung := rung_of(run)) is not None), default=None)


def _steps(of: dict[Row, int]) -> list[Step]:
    """of: each row's rung, in order."""
    rows, rungs = list(of), list(of.values())
    if twice := sorted({rung for rung in rungs if rungs.count(rung) > 1}):
        names = "; ".join(row.family for row, rung in of.items() if rung in twice)
        raise UserError(
            f"rung={twice[0]} is that of several rows ({names}): give each a number of its own, "
            "in the order in which they are to be set side by side"
        )
    options = options_of([row.runs[0] for row in rows], leave_out=())
    made = [
        (changes(options[a.runs[0].key], options[b.runs[0].key]), difference(*same_items(b, a)))
        for a, b in pairwise(rows)
    ]
    corrected = holm([step.p_value for _, step in made])
    first = Step(rungs[0], rows[0], (), None, None)
    return [first] + [
        Step(rung, row, changed, step, p)
        for rung, row, (changed, step), p in zip(rungs[1:], rows[1:], made, corrected, strict=True)
    ]


def changes(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
    """`key=value` of what two runs' options differ in, as the later one has it.

    Keys that only the later one's method or part has follow from its name, and aren't said.
    """
    named = {name for name in after if "." not in name and before.get(name) != after[name]}
    return tuple(
        f"{name}={typed(value)}"
        for name, value in after.items()
        if name in named
        or (name in before and before[name] != value)
        or (name not in before and name.partition(".")[0] not in named)
    )

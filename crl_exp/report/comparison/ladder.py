"""A ladder from one method to another: what each step is worth.

Runs that say their `rung` stand on it, in the order of the numbers; each is set against the one
before it, item by item, with the keys in which the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from crl_exp.config.option_names import typed
from crl_exp.report.comparison.pairs import Difference, difference, same_items
from crl_exp.report.comparison.rows import Row, SweepComparison, holm
from crl_exp.report.labels import options_of
from crl_exp.runs.records import Record


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

    None where two rows have the same rung: see `doubled`.
    """
    if doubled(sweep):
        return []
    return [_steps(of) for of in _sets(sweep)]


def doubled(sweep: SweepComparison) -> str:
    """Why there is no ladder though runs have rungs: two rows have the same one, such as a rung at
    two options, or runs of before and after a fault was mended. "": there is no such."""
    for of in _sets(sweep):
        rungs = list(of.values())
        if twice := sorted({rung for rung in rungs if rungs.count(rung) > 1}):
            names = "; ".join(row.family for row, rung in of.items() if rung in twice)
            return (
                f"No ladder: rung={twice[0]} is that of several rows ({names}). Give each a number "
                "of its own, in the order in which they are to be set side by side, or report "
                "those of one option (another sweep_name)."
            )
    return ""


def _sets(sweep: SweepComparison) -> list[dict[Row, int]]:
    """For each set of layers with two rungs or more, its rows and their rungs, in order."""
    rungs = {row: rung for row in sweep.rows if (rung := _rung(row)) is not None}
    steering = [row for row in rungs if not row.unsteered]
    sets = list(dict.fromkeys(row.layers for row in steering if row.layers)) or [()]
    found = []
    for layers in sets:
        rows = [row for row in rungs if row.layers in ((), layers) or row.unsteered]
        if len(rows) > 1:
            found.append({row: rungs[row] for row in sorted(rows, key=rungs.__getitem__)})
    return found


def _rung(row: Row) -> int | None:
    """The lowest that its runs say."""
    return min((rung for run in row.runs if (rung := rung_of(run)) is not None), default=None)


def _steps(of: dict[Row, int]) -> list[Step]:
    """of: each row's rung, in order."""
    rows, rungs = list(of), list(of.values())
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
    unread = _unread(after)
    return tuple(
        f"{name}={typed(value)}"
        for name, value in after.items()
        if name not in unread
        and (
            name in named
            or (name in before and before[name] != value)
            or (name not in before and name.partition(".")[0] not in named)
        )
    )


def _unread(options: dict[str, Any]) -> set[str]:
    """Keys of a run's options that it never reads, whatever they say."""
    found = set()
    if options.get("method.features") == "free":
        found |= {"method.multipliers", "method.n_candidates"}
    if options.get("policy.policy_depth") == options.get("policy.critic_depth") == 0:
        found |= {"policy.hidden", "policy.nonlinearity", "policy.first_weights"}
    return found

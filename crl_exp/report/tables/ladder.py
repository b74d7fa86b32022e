"""What the table of a ladder says, cell by cell."""

from __future__ import annotations

from typing import Any

from crl_exp.report.comparison.ladder import Step, ladders
from crl_exp.report.comparison.rows import SweepComparison
from crl_exp.report.tables.cells import FurtherTable, p_text, points, row_layers, share
from crl_exp.report.tables.pairs import better_worse

TITLE = "Step by step"
COLUMNS = (
    "rung", "method", "what changes", "seeds", "steered % [95 %]", "Δ to unsteered [95 %]",
    "this step, points [95 %]", "p Holm", "better/ worse",
)  # fmt: skip
CSV = (
    "layers", "rung", "method", "changes", "seeds", "n", "accuracy", "accuracy_low",
    "accuracy_high", "delta", "delta_low", "delta_high", "step", "step_low", "step_high", "test",
    "p_value", "p_holm", "better", "worse",
)  # fmt: skip
SAME = "nothing, on any item"


def ladder_tables(sweep: SweepComparison) -> list[FurtherTable]:
    """One for each set of layers with rungs."""
    found = ladders(sweep)
    return [
        FurtherTable(
            f"{TITLE}, {layers_of(steps)}", f"ladder-{number}" if number else "ladder", COLUMNS,
            [_cells(step) for step in steps], [_note(steps)],
        )
        for number, steps in enumerate(found)
    ]  # fmt: skip


def layers_of(steps: list[Step]) -> str:
    """`layer 18`: what the ladder's last rung steers."""
    row = steps[-1].row
    return f"layer{'s' if len(row.layers) > 1 else ''} {row_layers(row)}"


def _note(steps: list[Step]) -> str:
    return (
        "Each row is set against the one above it, from which it differs in what is named: paired "
        "item by item on test, intervals and p over items and the seeds of both (McNemar's exact "
        f"test where neither's seeds differ), Holm-corrected for these {len(steps) - 1} steps."
    )


def _cells(step: Step) -> list[str]:
    row, found = step.row, step.difference
    alike = found is not None and found.better == found.worse == 0
    return [
        str(step.rung), row.label.name, "\n".join(step.changes) or "–", str(len(row.runs)),
        share(row.mean("accuracy_steered"), row.accuracy_interval()),
        points(row.mean("delta"), row.interval()),
        "–" if found is None else SAME if alike else points(found.value, found.interval),
        "–" if step.p_holm is None or alike else p_text(step.p_holm),
        "–" if found is None else better_worse(found),
    ]  # fmt: skip


def ladder_lines(sweep: SweepComparison) -> list[list[Any]]:
    """Lines of ladder.csv; shares as fractions."""
    return [_line(step, layers_of(steps)) for steps in ladders(sweep) for step in steps]


def _line(step: Step, where: str) -> list[Any]:
    row, found = step.row, step.difference
    before = [where, step.rung, row.label.name, " ".join(step.changes)]
    before += [" ".join(map(str, row.seeds)), int(row.mean("n")), row.mean("accuracy_steered")]
    before += [*row.accuracy_interval(), row.mean("delta"), *row.interval()]
    if found is None:
        return before + [""] * (len(CSV) - len(before))
    counts = ["" if count is None else count for count in (found.better, found.worse)]
    return [
        *before, found.value, *found.interval, found.test, found.p_value, step.p_holm, *counts,
    ]  # fmt: skip

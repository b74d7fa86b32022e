"""What the table of the null action says: how often a policy leaves a token as it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from crl_exp.config.display import number
from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.tables.cells import FurtherTable, points, row_layers
from crl_exp.runs.records import Record

KEY = "left_alone"
TITLE = "Tokens left alone: how often the policy takes the null action"
COLUMNS = (
    "method", "layers", "seeds", "rollouts, first → last update %", "test %", "seeds from … to %",
    "Δ points [95 %]",
)  # fmt: skip
NOTE = (
    "Share of tokens (of all steered layers) at which nothing is added because the policy chose "
    "so, mean over seeds. Rollouts sample, and begin near policy.null_start; on test the null "
    "action is taken where it has more than half of the probability. At 100 % the answers are the "
    "unsteered model's."
)


def left_alone_of(row: Row) -> np.ndarray | None:
    """The share on test, of each seed [S]; None where a run's policy has no null action."""
    found = [(run.result or {}).get(KEY) for run in row.runs]
    return None if any(one is None for one in found) else np.array(found, dtype=float)


def in_rollouts(run: Record) -> tuple[float, float]:
    """The share in the first and the last update's rollout, mean over layers."""
    by_update = [
        float(np.mean(shares))
        for line in run.journal
        if (shares := [v for name, v in line["metrics"].items() if name.endswith(f"/{KEY}")])
    ]
    return (by_update[0], by_update[-1]) if by_update else (np.nan, np.nan)


def left_alone_tables(sweep: SweepComparison) -> list[FurtherTable]:
    lines = []
    for row in sweep.rows:
        found = left_alone_of(row)
        if found is None:
            continue
        first, last = np.mean([in_rollouts(run) for run in row.runs], axis=0)
        lines.append(
            [row.family, row_layers(row), str(len(row.runs)),
             f"{_percent(first)} → {_percent(last)}", _percent(found.mean()),
             f"{_percent(found.min())} … {_percent(found.max())}" if len(found) > 1 else "–",
             points(row.mean("delta"), row.interval())]
        )  # fmt: skip
    return [FurtherTable(TITLE, "left_alone", COLUMNS, lines, [NOTE])] if lines else []


def left_alone_csv(row: Row) -> list[Any]:
    """The cell of table.csv, empty where there is no null action."""
    found = left_alone_of(row)
    return ["" if found is None else float(found.mean())]


def _percent(share: float) -> str:
    return number(100 * float(share), ".1f")

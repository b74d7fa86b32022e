"""A sweep's rows as CSV, for other programs: figures as fractions, an option a column."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from crl_exp.config.display import csv_cell
from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.parts import SweepParts, best_rows
from crl_exp.report.tables.left_alone import KEY as LEFT_ALONE
from crl_exp.report.tables.left_alone import left_alone_csv
from crl_exp.report.tables.quality import CSV_COLUMNS as QUALITY_COLUMNS
from crl_exp.report.tables.quality import quality_csv

COLUMNS = (
    "method", "layers", "seeds", "test_set", "chosen_on_validation", "validation", "n",
    "accuracy_baseline", "accuracy_steered", "accuracy_low", "accuracy_high", "delta", "delta_low",
    "delta_high", "interval_over", "p_value", "p_holm", "p_holm_of", "fixed", "broken", "ser",
    "invalid_baseline", "invalid_steered", "unique_features", *QUALITY_COLUMNS,
    LEFT_ALONE,
)  # fmt: skip


def rows_csv(parts: SweepParts) -> str:
    """One line for each part, row and test set (`test`, then further ones).

    What sets parts apart and the options that vary come first, a column each; an option's is empty
    for a method that didn't vary it.
    """
    options = list(dict.fromkeys(key for part in parts.parts for key in part.sweep.varied))
    head = [*parts.keys, *COLUMNS[:1], *options, *COLUMNS[1:]]
    lines = []
    for part in parts.parts:
        for row in part.sweep.rows:
            settings = dict(row.label.settings)
            for name in (None, *part.sweep.test_sets):
                method, *rest = _line(part.sweep, row, name)
                chosen = [settings.get(key, "") for key in options]
                lines.append([*[v for _, v in part.names], method, *chosen, *rest])
    return as_csv(head, lines)


def _line(sweep: SweepComparison, row: Row, name: str | None) -> list[Any]:
    means = [row.mean(key, name) for key in ("n", "accuracy_baseline", "accuracy_steered")]
    estimates = row.estimates(name)
    over = "items" if estimates.alike else "items and seeds"
    flips = [row.mean(key, name) for key in ("fixed", "broken")]
    invalid = [row.mean(key, name) for key in ("invalid_baseline", "invalid_steered")]
    ser = "" if sum(flips) == 0 else flips[1] / sum(flips)
    return [
        row.family, " ".join(map(str, row.layers)), " ".join(map(str, row.seeds)), name or "test",
        row in sweep.chosen, row.validation, *means, *row.accuracy_interval(name),
        row.mean("delta", name), *row.interval(name), over,
        estimates.p_value, sweep.p_holm[row] if name is None else "",
        len(sweep.tried[row.label.name]) if name is None else "",
        *flips, ser, *invalid, row.mean("unique_features"),
        *quality_csv(row, name), *(left_alone_csv(row) if name is None else [""]),
    ]  # fmt: skip


def overview_csv(parts: SweepParts) -> str:
    """One line for each part and method, as in the overview: the layers chosen on validation."""
    head = [*parts.keys, "method", "layers", "seeds", "n", "accuracy", "accuracy_low",
            "accuracy_high", "delta", "delta_low", "delta_high", "p_holm"]  # fmt: skip
    lines = []
    for part in parts.parts:
        for row in best_rows(part.sweep).values():
            lines.append(
                [*[value for _, value in part.names], row.family, " ".join(map(str, row.layers)),
                 " ".join(map(str, row.seeds)), int(row.mean("n")), row.mean("accuracy_steered"),
                 *row.accuracy_interval(), row.mean("delta"), *row.interval(),
                 part.sweep.p_holm[row]]
            )  # fmt: skip
    return as_csv(head, lines)


def as_csv(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([csv_cell(cell) for cell in line] for line in lines)
    return text.getvalue()

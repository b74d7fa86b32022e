"""What the table of quality says: reward and log-likelihood side by side, for free text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from crl_exp.analysis.statistics import Crossed, Z, crossed, crossed_parts
from crl_exp.report.comparison.estimates import split
from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.tables.cells import FurtherTable, points, row_layers
from crl_exp.runs.items import NoItemsError, likelihood_of_seeds

KEYS = ("log_likelihood_baseline", "log_likelihood_steered", "log_likelihood_delta")
TITLE = "Reward against quality: log-likelihood of the answers under the unsteered model"
COLUMNS = (
    "method", "layers", "seeds", "Δ points [95 %]", "unsteered → steered, nats a token",
    "Δ nats a token [95 %]",
)  # fmt: skip
NOTE = (
    "Mean over items of each answer's mean log-probability a token, its end included, read by the "
    "unsteered model behind the item's own prompt. Below 0 in the last column: the answers are "
    "less like what the model itself would write. Its own greedy answers are likely by "
    "construction, so a small loss is no damage yet; read some. 95 % over items and seeds."
)


@dataclass(frozen=True)
class Quality:
    """In nats a token; means over seeds. interval: 95 %, of delta."""

    baseline: float
    steered: float
    delta: float
    interval: tuple[float, float]

    @property
    def values(self) -> list[float]:
        return [self.baseline, self.steered, self.delta, *self.interval]


def quality_of(row: Row, test_set: str | None = None) -> Quality | None:
    """None where a run has no such figures: the output is restricted, or it ran before there were
    any."""
    runs = [split(run, test_set) for run in row.runs]
    if any(figures.get(key) is None for figures in runs for key in KEYS):
        return None
    baseline, steered, delta = (float(np.mean([one[key] for one in runs])) for key in KEYS)
    delta_SI = _by_item(row, test_set)
    if delta_SI is None or len(runs) == 1:
        delta_S = np.array([figures[KEYS[2]] for figures in runs])
        ends_S2 = np.array([figures["log_likelihood_delta_ci95"] for figures in runs])
        interval = of_runs(delta_S, ends_S2, int(runs[0]["n"])).interval
    else:
        interval = crossed(delta_SI).interval
    return Quality(baseline, steered, delta, interval)


def _by_item(row: Row, test_set: str | None) -> np.ndarray | None:
    try:
        return likelihood_of_seeds(row.runs, test_set or "test")
    except NoItemsError:
        return None


def of_runs(delta_S: np.ndarray, ends_S2: np.ndarray, n: int) -> Crossed:
    """The mean of what single runs say with an interval each, for runs of before items' values were
    kept: somewhat too wide. n: items."""
    v_items = float((((ends_S2[:, 1] - ends_S2[:, 0]) / 2) ** 2).mean()) / Z**2
    return crossed_parts(delta_S, v_items, v_items, n)


def quality_cells(row: Row, found: Quality) -> list[str]:
    low, high = found.interval
    return [
        row.family, row_layers(row), str(len(row.runs)),
        points(row.mean("delta"), row.interval()),
        f"{found.baseline:.2f} → {found.steered:.2f}",
        f"{found.delta + 0.0:+.2f} [{low:.2f}, {high:.2f}]",
    ]  # fmt: skip


def quality_tables(sweep: SweepComparison) -> list[FurtherTable]:
    """Reward against quality, for free text."""
    pairs = [(row, quality_of(row)) for row in sweep.rows]
    lines = [quality_cells(row, found) for row, found in pairs if found is not None]
    return [FurtherTable(TITLE, "quality", COLUMNS, lines, [NOTE])] if lines else []


CSV_COLUMNS = (*KEYS, "log_likelihood_delta_low", "log_likelihood_delta_high")


def quality_csv(row: Row, test_set: str | None) -> list[Any]:
    """Cells of table.csv, empty where there is nothing."""
    found = quality_of(row, test_set)
    return [""] * len(CSV_COLUMNS) if found is None else found.values

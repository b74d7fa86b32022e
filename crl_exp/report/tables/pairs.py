"""What the tables of pairs, and of what a sweep can show, say cell by cell."""

from __future__ import annotations

from typing import Any

import numpy as np

from crl_exp.analysis.power import (
    TARGET,
    Spread,
    both_needed,
    items_needed,
    seeds_needed,
    smallest_difference,
)
from crl_exp.config.display import number
from crl_exp.report.comparison.pairs import Difference, Pair, chosen_pairs, chosen_rows
from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.tables.cells import FurtherTable, p_text, points, row_layers

PAIR_TITLE = "Methods against each other, at what was chosen on validation"
PAIR_COLUMNS = ("method", "against", "seeds", "Δ points [95 %]", "p Holm", "better/ worse")


def pair_cells(pair: Pair) -> list[str]:
    found = pair.difference
    return [
        _named(pair.ours), _named(pair.theirs), " / ".join(map(str, found.n_seeds)),
        points(found.value, found.interval), p_text(pair.p_holm), better_worse(found),
    ]  # fmt: skip


def better_worse(found: Difference) -> str:
    if found.better is None or found.worse is None:
        return "–"
    return f"{found.better:.0f}/{found.worse:.0f}"


def _named(row: Row) -> str:
    return f"{row.family} @ {row_layers(row)}"


def pair_notes(pairs: list[Pair]) -> list[str]:
    """What one must know to read the table of pairs."""
    told = [
        "Paired item by item on test; intervals and p over items and the seeds of both, McNemar's "
        "exact test where neither's seeds differ (over items where rewards aren't all 0 or 1). "
        f"Holm-corrected for these {len(pairs)} pairs. "
        "Better/worse: items right in the one and wrong in the other, mean over pairs of seeds."
    ]
    if not all(pair.difference.paired for pair in pairs):
        told.append(
            "–: not paired, since a run has no items.parquet (it was made before there was one; "
            "resume=force runs it again). Its interval is that of two separate samples, too wide."
        )
    return told


PAIR_CSV = (
    "method", "layers", "against", "against_layers", "seeds", "against_seeds", "n", "delta",
    "delta_low", "delta_high", "test", "p_value", "p_holm", "better", "worse", "paired",
)  # fmt: skip


def pair_line(pair: Pair) -> list[Any]:
    """A line of pairs.csv."""
    found, both = pair.difference, (pair.ours, pair.theirs)
    names = [cell for row in both for cell in (row.family, " ".join(map(str, row.layers)))]
    seeds = [" ".join(map(str, row.seeds)) for row in both]
    counts = ["" if count is None else count for count in (found.better, found.worse)]
    return [
        *names, *seeds, found.n, found.value, *found.interval, found.test, found.p_value,
        pair.p_holm, *counts, found.paired,
    ]  # fmt: skip


SHOWS_TITLE = "What this sweep can show"
SHOWS_COLUMNS = (
    "method", "layers", "seeds", "n", "items changed %", "seeds deviate by, points",
    "finds, points", "2 points: items", "2 points: seeds", "2 points: items × seeds",
)  # fmt: skip
SHOWS_NOTE = (
    "Finds: the smallest difference to the unsteered model that these items and seeds find in "
    "four of five cases (95 %, not corrected for what was tried). "
    f"{100 * TARGET:.0f} points: items that would find these with the present seeds; seeds that "
    "would with the present items; both together. –: no number does; or, of one seed, not known "
    "how far seeds deviate: its figures are of that run alone."
)


def shows_rows(sweep: SweepComparison) -> list[Row]:
    """The chosen row of each method whose items are known and have a reward each."""
    known = [(row, row.estimates().samples) for row in chosen_rows(sweep)]
    return [row for row, of in known if of is not None and np.isfinite(of.delta_SI).all()]


def shows_cells(row: Row) -> list[str]:
    samples = row.estimates().samples
    assert samples is not None
    delta_SI = samples.delta_SI[:1] if row.estimates().alike else samples.delta_SI
    spread, (n_seeds, n) = Spread.measured(delta_SI), delta_SI.shape
    both = both_needed(spread, n_seeds) if spread.seeds is not None else None
    changed = (delta_SI != 0).mean() if np.isfinite(delta_SI).all() else None
    return [
        row.family, row_layers(row), str(len(row.runs)), str(n),
        number(None if changed is None else 100 * changed, ".1f"),
        number(None if spread.seeds is None else 100 * spread.seeds**0.5, ".1f"),
        number(100 * smallest_difference(spread, n, n_seeds), ".1f"),
        _count(items_needed(spread, n_seeds)),
        _count(None if spread.seeds is None else seeds_needed(spread, n)),
        f"{both[0]:,} × {both[1]}" if both else "–",
    ]  # fmt: skip


def pair_tables(sweep: SweepComparison) -> list[FurtherTable]:
    """Methods against each other, and what the sweep can show; those that have a line."""
    pairs, rows = chosen_pairs(sweep), shows_rows(sweep)
    lines, shown = [pair_cells(pair) for pair in pairs], [shows_cells(row) for row in rows]
    found = [
        FurtherTable(PAIR_TITLE, "pairs", PAIR_COLUMNS, lines, pair_notes(pairs)),
        FurtherTable(SHOWS_TITLE, "shows", SHOWS_COLUMNS, shown, [SHOWS_NOTE]),
    ]
    return [table for table in found if table.lines]


def _count(found: int | None) -> str:
    return "–" if found is None else f"{found:,}"

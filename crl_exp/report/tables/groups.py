"""Where a gain comes from: the difference by group of items (subject, subset, category).

Groups are those of the items (`Item.group`), as items.parquet has them; a test set whose items are
all of one group has no table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crl_exp.analysis.estimates import Estimates, Samples
from crl_exp.config.display import number
from crl_exp.report.comparison.rows import Row, SweepComparison, holm
from crl_exp.report.tables.cells import FurtherTable, p_text, points, row_layers

FEWEST = 5  # items; of fewer an interval says nothing
GROUPS_SHOWN = 15  # of each row
LINES_SHOWN = 60  # of a test set
NO_GROUP = "(none)"
COLUMNS = (
    "method", "group", "n", "unsteered → steered %", "Δ points [95 %]", "p Holm",
)  # fmt: skip


@dataclass(frozen=True)
class GroupEffect:
    """What steering did to one group's items. p_holm: corrected for the groups of the row."""

    row: Row
    group: str
    found: Estimates
    samples: Samples
    p_holm: float

    @property
    def n(self) -> int:
        return len(self.samples.ids)

    @property
    def baseline(self) -> float:
        return float(self.samples.baseline_SI.mean())

    @property
    def steered(self) -> float:
        return float(self.samples.steered_SI.mean())

    @property
    def delta(self) -> float:
        return float(self.samples.delta_SI.mean())


def group_effects(row: Row, test_set: str | None = None) -> list[GroupEffect]:
    """Of every group of a test set that has `FEWEST` items or more, the largest group first.

    Intervals and p-values are those of the main table, over items and, where they differ, seeds
    (`Estimates`); p-values are Holm-corrected for the groups of this row. Empty where all items are
    of one group, or the run was made before groups were written.
    """
    whole = row.estimates(test_set)
    if len(whole.groups) < 2:
        return []
    parts = [
        (group, found, found.samples)
        for group, found in whole.by_group.items()
        if found.samples is not None and len(found.samples.ids) >= FEWEST
    ]
    corrected = holm([found.p_value for _, found, _ in parts])
    return [
        GroupEffect(row, group, found, samples, p)
        for (group, found, samples), p in zip(parts, corrected, strict=True)
    ]


def group_tables(sweep: SweepComparison) -> list[FurtherTable]:
    """One for each test set whose items are of several groups."""
    found = [_table(sweep, name) for name in (None, *sweep.test_sets)]
    return [table for table in found if table is not None]


def _table(sweep: SweepComparison, test_set: str | None) -> FurtherTable | None:
    rows = _steered(sweep)
    every = [effects for row in rows if (effects := group_effects(row, test_set))]
    if not every:
        return None
    shown = [_shown(effects) for effects in every]
    few_rows = sum(map(len, shown)) > LINES_SHOWN
    if few_rows:
        shown = _best_of_each_method(shown)
    lines = [_cells(effect) for effects in shown for effect in effects]
    name = test_set or sweep.first.config["task"]["name"]
    title = f"Where the difference comes from: groups of {name}"
    slug = f"groups-{test_set or 'test'}"
    notes = _notes(every[0], test_set, few_rows)
    without = [row for row in rows if not row.estimates(test_set).groups]
    if without:
        notes.append(
            f"{len(without)} of the rows aren't here: they were run before items.parquet had "
            "groups; resume=force runs them again."
        )
    return FurtherTable(title, slug, COLUMNS, lines, notes)


def _steered(sweep: SweepComparison) -> list[Row]:
    """All rows but the unsteered model's, which differs from itself nowhere."""
    return [row for row in sweep.rows if not row.unsteered]


def _best_of_each_method(found: Sequence[list[GroupEffect]]) -> list[list[GroupEffect]]:
    """Of rows' effects those of the row that does best on validation, for each method."""
    best: dict[str, list[GroupEffect]] = {}
    for effects in found:
        row = effects[0].row
        other = best.setdefault(row.label.name, effects)[0].row
        if row.validation > other.validation:
            best[row.label.name] = effects
    return list(best.values())


def _shown(effects: Sequence[GroupEffect]) -> list[GroupEffect]:
    """All of a row, or those with the smallest p-values, in the order of all."""
    if len(effects) <= GROUPS_SHOWN:
        return list(effects)
    p_values = [effect.found.p_value for effect in effects]
    first = np.argsort(p_values, kind="stable")[:GROUPS_SHOWN]
    return [effects[i] for i in sorted(first)]


def _cells(effect: GroupEffect) -> list[str]:
    row, was, now = effect.row, effect.baseline, effect.steered
    return [
        f"{row.family} @ {row_layers(row)}", effect.group or NO_GROUP, f"{effect.n:,}",
        f"{number(100 * was, '.1f')} → {number(100 * now, '.1f')}",
        points(effect.delta, effect.found.interval), p_text(effect.p_holm),
    ]  # fmt: skip


def _notes(effects: Sequence[GroupEffect], test_set: str | None, few_rows: bool) -> list[str]:
    """What one must know to read the table. effects: of one row; all have the same items."""
    by_group = effects[0].row.estimates(test_set).by_group
    small = [
        f"{group or NO_GROUP} ({found.n})" for group, found in by_group.items() if found.n < FEWEST
    ]
    told = (
        "Paired by item within each group; intervals and p as in the main table. p Holm: "
        f"corrected for the {len(effects)} groups of a row, not for the other rows of its method. "
        "An interval without 0 in one group and with it in another doesn't show that the two "
        "groups differ."
    )
    if small:
        told += f" Left out, with fewer than {FEWEST} items: {', '.join(small)}."
    notes = [told]
    if len(effects) > GROUPS_SHOWN:
        notes.append(
            f"Of each row the {GROUPS_SHOWN} groups with the smallest p; groups.csv has all "
            f"{len(effects)}."
        )
    if few_rows:
        notes.append(
            "Of each method the row that does best on validation; groups.csv has all rows."
        )
    return notes


GROUP_CSV = (
    "method", "layers", "seeds", "test_set", "group", "n", "accuracy_baseline", "accuracy_steered",
    "delta", "delta_low", "delta_high", "interval_over", "p_value", "p_holm", "p_holm_of",
)  # fmt: skip


def group_lines(sweep: SweepComparison) -> list[list[Any]]:
    """The lines of groups.csv: every row, test set and group with enough items."""
    lines = []
    for row in _steered(sweep):
        for name in (None, *sweep.test_sets):
            effects = group_effects(row, name)
            layers, seeds = (" ".join(map(str, of)) for of in (row.layers, row.seeds))
            lines += [
                [row.family, layers, seeds, name or "test", e.group, e.n, e.baseline, e.steered,
                 e.delta, *e.found.interval, "items" if e.found.alike else "items and seeds",
                 e.found.p_value, e.p_holm, len(effects)]
                for e in effects
            ]  # fmt: skip
    return lines

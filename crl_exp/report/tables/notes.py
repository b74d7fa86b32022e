"""What a report says in sentences: what one must know to read the table, and its first line."""

from __future__ import annotations

import numpy as np

from crl_exp.analysis.winners_curse import warnings
from crl_exp.config.display import UNDEFINED
from crl_exp.report.comparison.ladder import doubled
from crl_exp.report.comparison.pairs import difference, same_items
from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.tables.cells import CHOSEN, percent, points, row_layers

FEW_FLIPS = 5
"""Of fewer items the bootstrap of one seed is too narrow: docs/statistics.md."""


def notes(sweep: SweepComparison) -> list[str]:
    """What one must know to read the table."""
    if not sweep.rows:
        return []
    found = []
    if any(row.over_seeds for row in sweep.rows):
        found.append(
            "Several seeds: means; interval and p-value are over items and seeds. One seed, or all "
            "alike: the interval is the paired bootstrap over items, p McNemar's exact test; what "
            "another seed would give isn't in them."
        )
        if any(row.over_seeds and row.estimates().samples is None for row in sweep.rows):
            found.append(
                "Some runs have no items.parquet (they were made before there was one): intervals "
                "over their seeds take the items' part from single runs and are somewhat too wide."
            )
    else:
        found.append("Intervals: paired bootstrap over items. p: McNemar's exact test.")
    if any(row.estimates().fractional for row in sweep.rows):
        found.append(
            "Rewards aren't all 0 or 1: in place of McNemar's test, which sees only which items "
            "cross .5, p is of the mean difference over items (normal)."
        )
    if any(len(row.train_seeds) > 1 for row in sweep.rows):
        found.append(
            "Runs that differ only in task.train_seed or seed are put together: each is a draw "
            "(of training items, of a seed), and their number stands under seeds. Where draws of "
            "training items have several seeds each, intervals take each draw's mean as one."
        )
    found.append(f"{holm_note(sweep)} SER: broken / (fixed + broken).")
    if sweep.chosen:
        found.append(f"{CHOSEN} the layers that did best on validation; test was not looked at.")
    found += few_flips(sweep)
    found += warnings(sweep.choices)
    found += harmful(sweep)
    found += [text for text in (doubled(sweep),) if text]
    found += undefined_lines(sweep)
    baselines = [row.mean("accuracy_baseline") for row in sweep.rows]
    baselines = [share for share in baselines if np.isfinite(share)]
    if baselines and np.ptp(baselines) > 1e-9:
        found.append(
            f"The unsteered model is not the same in all runs ({min(baselines):.4f} to "
            f"{max(baselines):.4f}): they ran on different hardware or library versions."
        )
    return found


def few_flips(sweep: SweepComparison) -> list[str]:
    """Rows whose interval rests on hardly an item."""
    few = []
    for row in sweep.rows:
        flips = row.mean("fixed") + row.mean("broken")
        if not row.over_seeds and 0 < flips < FEW_FLIPS:  # never where one is undefined
            where = f"{row.family}, {row_layers(row)}" if row.layers else row.family
            few.append(f"{where} ({flips:g})")
    if not few:
        return []
    return [f"Hardly an answer came right or wrong: {'; '.join(few)}. The bootstrap over items is "
            "too narrow there; go by p."]  # fmt: skip


def harmful(sweep: SweepComparison) -> list[str]:
    """The methods that do worse than nothing where their choices were made, and the controls."""
    worse: dict[bool, list[str]] = {False: [], True: []}
    for row in sweep.rows:
        was = row.mean("accuracy_baseline", "validation")
        now = row.mean("accuracy_steered", "validation")
        if now < was - 1e-9:  # never where one of them is undefined
            where = f"{row.family}, {row_layers(row)}" if row.layers else row.family
            worse[row.control].append(f"{where} ({100 * was:.1f} → {100 * now:.1f} %)")
    said = [text for text in ("; ".join(worse[False]), "; ".join(worse[True])) if text]
    if worse[True]:
        said[-1] = f"of the controls {said[-1]}"
    if not said:
        return []
    return [f"Worse than the unsteered model on validation, and used all the same: "
            f"{'; '.join(said)}."]  # fmt: skip


def holm_note(sweep: SweepComparison) -> str:
    """What p-values are corrected for."""
    tried = [f"{name} {len(rows)}" for name, rows in sweep.tried.items() if not rows[0].unsteered]
    return (
        "p Holm: corrected for every row of the same method, all its layers and options "
        f"({', '.join(tried)})."
    )


def undefined_lines(sweep: SweepComparison) -> list[str]:
    """Which figures are a dash, of how many runs, and why."""
    runs: dict[str, int] = {}
    for run in (run for row in sweep.rows for run in row.runs):
        assert run.result is not None
        for name, what in run.result.get("undefined", {}).items():
            line = f"{name}: {what}"
            runs[line] = runs.get(line, 0) + 1
    if not runs:
        return []
    told = "; ".join(f"{line} (runs: {n})" for line, n in runs.items())
    return [f"{UNDEFINED}: undefined in result.json, whose `warnings` may say why: {told}."]


def headline(sweep: SweepComparison) -> str | None:
    """CRL at its best on validation, of all its variants, against the rival that does best there,
    baselines included, and against the best CorrSteer where that is another."""
    best, rivals = headline_row(sweep), [row for row in _able(sweep) if row.variant_of != "crl"]
    if best is None or not rivals:
        return None
    rival = max(rivals, key=lambda row: row.validation)
    told = [f"Best on validation, measured on test: {_named(best)}; against the best of all other "
            f"methods, baselines included: {_against(best, rival)}."]  # fmt: skip
    fixed = [row for row in rivals if row.variant_of == "corrsteer"]
    if fixed and rival not in fixed:
        corrsteer = max(fixed, key=lambda row: row.validation)
        told.append(f"Against the best CorrSteer: {_against(best, corrsteer)}.")
    return " ".join(told)


def headline_row(sweep: SweepComparison) -> Row | None:
    """CRL at its best on validation, of all its variants; None where there is no CRL."""
    learned = [row for row in _able(sweep) if row.variant_of == "crl"]
    return max(learned, key=lambda row: row.validation, default=None)


def _able(sweep: SweepComparison) -> list[Row]:
    return [row for row in sweep.rows if not row.control and not row.unsteered]


def _against(best: Row, rival: Row) -> str:
    found = difference(*same_items(best, rival))
    seeds = " and ".join(map(str, found.n_seeds))
    paired = "paired by item" if found.paired else "not paired by item, so too wide"
    return (
        f"{_named(rival)}; difference {points(found.value, found.interval)} points ({paired}; "
        f"seeds: {seeds}, n = {found.n})"
    )


def _named(row: Row) -> str:
    word = "layer" if row.single or row.alternatives else "layers"
    where = f", {word} {row_layers(row)}" if row.layers else ""
    return f"{row.family}{where}: {percent(row.mean('accuracy_steered'))} %"

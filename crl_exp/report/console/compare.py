"""`python -m crl_exp compare A B`: two finished runs, or rows of a report, item by item.

A side is a run (`outputs/SWEEP/RUN_KEY`, `SWEEP/RUN_KEY` or `RUN_KEY`) or a row of a report,
`SWEEP:METHOD@LAYERS`, as the report's tables name both.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crl_exp.analysis.estimates import Samples
from crl_exp.config.errors import UserError
from crl_exp.report.comparison.comparable import differences
from crl_exp.report.comparison.pairs import Difference, difference, right_shares, same_items
from crl_exp.report.comparison.rows import Row
from crl_exp.report.row_names import find_rows
from crl_exp.report.tables.cells import p_text, points
from crl_exp.report.tables.same_features import shared_features
from crl_exp.report.wordings import FORMS, TEXTS
from crl_exp.runs.items import item_rewards
from crl_exp.runs.records import Record

ITEMS_SHOWN = 10
WORDING = tuple(f"{key}:" for key in (*TEXTS, *FORMS))
"""How lines on what differs begin that are about how the items were put."""


@dataclass(frozen=True)
class Item:
    """An item that the two sides answer differently: of each the share of its seeds that got it
    right."""

    item_id: str
    ours: float
    theirs: float


def compared(ours: Row, theirs: Row, test_set: str | None) -> tuple[Difference, list[Item]]:
    """The difference and the items that differ, those that differ most first.

    Raises `UserError` where the two weren't asked the same items, naming what differs.
    """
    for row in (ours, theirs):
        for run in row.runs:
            _has_set(run, test_set)
    told = differences([*ours.runs, *theirs.runs])
    # Another model may answer the same items, and they may be put in other words: both are told,
    # and items are paired by id. The items themselves must be the same, as `same_items` checks.
    allowed = ("model.", "weights:", "fed.", *WORDING)
    other = [line for line in told if not line.strip().startswith(allowed)]
    if _names(told) & set(WORDING):  # the digest holds the prompts
        other = [line for line in other if not line.strip().startswith("data_digest:")]
    if other:
        raise UserError(
            "they weren't asked the same, so they can't be paired:\n" + "\n".join(other)
        )
    for row in (ours, theirs):
        if row.estimates(test_set).samples is None:
            for run in row.runs:
                item_rewards(run, test_set or "test")  # says what is missing
    mine, their = same_items(ours, theirs, test_set)
    assert mine.samples is not None and their.samples is not None
    return difference(mine, their), _differing(mine.samples, their.samples)


def _names(lines: list[str]) -> set[str]:
    return {f"{line.strip().partition(':')[0]}:" for line in lines}


def _has_set(run: Record, test_set: str | None) -> None:
    assert run.result is not None
    if "delta" not in run.result:
        kind = run.result.get("kind")
        raise UserError(
            f"{run.sweep}/{run.key} is an analysis (experiment={kind}) that answers no item, so "
            "that it can't be paired; its figures are in its result.json and in a report"
        )
    there = ["validation", *run.result["test_sets"]]
    if test_set is not None and test_set not in there:
        raise UserError(f"--split {test_set}: {run.key} has test, {', '.join(there)}")


def _differing(mine: Samples, their: Samples) -> list[Item]:
    a, b = right_shares(mine), right_shares(their)
    order = np.argsort(-np.abs(a - b), kind="stable")
    return [Item(mine.ids[i], float(a[i]), float(b[i])) for i in order if a[i] != b[i]]


def text(
    names: tuple[str, str], rows: tuple[Row, Row], test_set: str | None, n_items: int
) -> list[str]:
    """What the command prints."""
    found, items = compared(*rows, test_set)
    lines = []
    for letter, name, row in zip("AB", names, rows, strict=True):
        share = 100 * row.mean("accuracy_steered", test_set)
        seeds = " ".join(map(str, row.seeds))
        lines.append(f"{letter}  {name} (seed {seeds}): {share:.1f} %")
    lines += [line.strip() for line in differences([run for row in rows for run in row.runs])]
    lines += [
        f"A − B on {test_set or 'test'}: {points(found.value, found.interval)} points, "
        f"n = {found.n:,}, p = {p_text(found.p_value)} ({_test(found)})",
        f"right in A and wrong in B: {found.better:.1f}; wrong in A and right in B: "
        f"{found.worse:.1f}{_mean(found)}",
        f"items that differ: {len(items)} of {found.n:,}",
        *shared_features(*rows),
    ]
    seeds = [len(row.runs) for row in rows]
    for item in items[:n_items]:
        both = [_right(s, n) for s, n in zip((item.ours, item.theirs), seeds, strict=True)]
        lines.append(f"  {item.item_id}  A {both[0]}, B {both[1]}")
    if len(items) > n_items:
        lines.append(f"  and {len(items) - n_items} more: --items {len(items)}")
    return lines


def _test(found: Difference) -> str:
    if found.test == "McNemar":
        return "McNemar's exact test; interval: paired bootstrap over items"
    if found.test == "items":
        return "over items, since rewards aren't all 0 or 1; interval: paired bootstrap over items"
    return "over items and the seeds of both, as the interval"


def _mean(found: Difference) -> str:
    return "" if found.n_seeds == (1, 1) else " (mean over pairs of seeds)"


def _right(share: float, seeds: int) -> str:
    if seeds == 1:
        return "right" if share else "wrong"
    return f"right in {round(share * seeds)}/{seeds}"


def main(argv: list[str]) -> int:
    """`python -m crl_exp compare A B [--items N] [--split NAME]`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp compare",
        description="Two finished runs, or rows of a report, on the same items, paired.",
        epilog="A and B: a run (SWEEP/RUN_KEY, its folder, or RUN_KEY), or a row of a report as "
        "SWEEP:METHOD@LAYERS, such as demo:CRL@22, 'demo:CRL fusion=multiply@8,12', or "
        "demo:CorrSteer-S for the layer that did best on validation; SWEEP: lists them.",
    )
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--items", type=int, default=ITEMS_SHOWN, metavar="N",
                        help=f"list so many of the items that differ ({ITEMS_SHOWN})")  # fmt: skip
    parser.add_argument("--split", metavar="NAME", help="validation or a further test set")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    found = [find_rows(name, arguments.output_dir) for name in (arguments.a, arguments.b)]
    test_set = None if arguments.split == "test" else arguments.split
    (name_a, a), (name_b, b) = found
    print("\n".join(text((name_a, name_b), (a, b), test_set, max(arguments.items, 0))))
    return 0

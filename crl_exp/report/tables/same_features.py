"""Whether two methods steer by the same features: counted layer by layer, in `compare` and as a
table of the report."""

from __future__ import annotations

from itertools import combinations

from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.tables.cells import FurtherTable, row_layers
from crl_exp.runs.records import Record, rows_of_run

TITLE = "The same features?"
COLUMNS = ("method", "against", "the same at", "others, by layer")
NOTE = (
    "Layers at which both steer by the same feature, of those that both steer. Of a policy it is "
    "the feature that it added at the most tokens, of several seeds the first's. Controls are left "
    "out. Two methods may share all features and differ in how much of them they add, and when."
)
SHOWN = 3
"""Layers at which two differ that are listed; the rest are counted."""
Features = dict[int, set[int]]
"""By layer."""


def shared_features(ours: Row, theirs: Row) -> list[str]:
    """At how many layers two rows steer by the same features, one line; none where they share no
    layer. Of a policy it is the feature that it added at the most tokens; of several seeds the
    first's is taken.
    """
    mine, their = (features_by_layer(row.runs[0]) for row in (ours, theirs))
    if not (both := sorted(mine.keys() & their.keys())):
        return []
    same = [layer for layer in both if mine[layer] == their[layer]]
    seeds = "" if len(ours.runs) == len(theirs.runs) == 1 else " (of each row's first seed)"
    others = _others(mine, their, [layer for layer in both if layer not in same])
    told = f"; others, A and B: {'; '.join(others)}" if same and others else ""
    return [f"the same feature at {len(same)} of {len(both)} layers{seeds}{told}"]


def same_feature_tables(sweep: SweepComparison) -> list[FurtherTable]:
    """Of each two methods that steer the same layers, two or more, in one run or one a layer."""
    lines = []
    for (name, mine), (other, their) in combinations(_by_method(sweep).items(), 2):
        both = sorted(mine.keys() & their.keys())
        if len(both) < 2:
            continue
        apart = [layer for layer in both if mine[layer] != their[layer]]
        others = _others(mine, their, apart)
        more = [f"and {len(others) - SHOWN} more"] if len(others) > SHOWN else []
        lines.append(
            [name, other, f"{len(both) - len(apart)} of {len(both)} layers",
             "; ".join([*others[:SHOWN], *more]) or "–"]
        )  # fmt: skip
    return [FurtherTable(TITLE, "same_features", COLUMNS, lines, [NOTE])] if lines else []


def _by_method(sweep: SweepComparison) -> dict[str, Features]:
    """A row of several layers by itself; rows of one layer each, a method's together."""
    found: dict[str, Features] = {}
    for row in sweep.rows:
        if row.control or row.unsteered or row.alternatives:
            continue
        name = row.family if row.single else f"{row.family}, layers {row_layers(row)}"
        for layer, features in features_by_layer(row.runs[0]).items():
            found.setdefault(name, {}).setdefault(layer, features)
    return found


def features_by_layer(run: Record) -> Features:
    """What a run's features.json says it steered by."""
    found: Features = {}
    for layer, feature, _ in rows_of_run(run.features):
        found.setdefault(int(layer), set()).add(int(feature))
    return found


def _others(mine: Features, their: Features, layers: list[int]) -> list[str]:
    return [f"{layer}: {_listed(mine[layer])}, {_listed(their[layer])}" for layer in layers]


def _listed(features: set[int]) -> str:
    return "+".join(map(str, sorted(features)))

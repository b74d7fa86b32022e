"""Which items came right or went wrong where which feature was added, from interventions.parquet.

That a feature was added to an item that came right doesn't say that it was the cause: where several
features, tokens or layers are steered, each of them has the item to its credit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from crl_exp.report.comparison.feature_use import all_uses
from crl_exp.report.comparison.rows import Row
from crl_exp.report.feature_labels import judged_label, label_of
from crl_exp.runs.records import Record

pc: Any = pyarrow.compute  # its functions are made when it is imported, unseen by type checkers
BATCH_ROWS = 500_000
REWARDS = ("reward_baseline", "reward_steered")
SEEDS_KEPT = 32
"""Runs whose pairs are kept until the next row's are read: they may be large."""
RIGHT = 0.5  # as in `statistics.compare`


@dataclass
class FeatureCredit:
    """A feature of one row's runs, summed over its seeds. rank: among those that stage 1 found;
    it and the correlation are None where there was no stage 1.

    fixed, broken: items that came right or went wrong and had the feature added at some token;
    None where the runs were made before interventions.parquet held rewards.
    """

    row: Row
    layer: int
    feature: int
    link: str | None
    rank: int | None
    correlation: float | None
    coefficient: float = 0.0
    runs: int = 0
    tokens: int = 0
    items: int = 0
    changed: int = 0
    fixed: int | None = None
    broken: int | None = None

    @property
    def label(self) -> str | None:
        """What Neuronpedia calls it, where its labels were fetched, and a judge, where one was
        asked."""
        by_judge = judged_label((run.path for run in self.row.runs), self.layer, self.feature)
        return "; ".join(filter(None, [label_of(self.link), by_judge])) or None

    @property
    def weight(self) -> tuple[int, int]:
        """What features are sorted by: items that flipped, then additions."""
        return (self.fixed or 0) + (self.broken or 0), self.tokens


def credits_of(row: Row) -> list[FeatureCredit]:
    """Every feature that a row's runs added on test, most flipped items first."""
    found: dict[tuple[int, int], FeatureCredit] = {}
    for layer, uses in all_uses(row).items():
        for use in uses:
            for used in use.used:
                feature = used["feature"]
                credit = found.setdefault(
                    (layer, feature),
                    FeatureCredit(
                        row, layer, feature, used.get("neuronpedia"), use.ranks.get(feature),
                        used.get("correlation") if use.found else None,
                    ),
                )  # fmt: skip
                # The mean over all additions, of all seeds.
                total = credit.coefficient * credit.tokens
                credit.tokens += used["tokens"]
                total += used["mean_coefficient"] * used["tokens"]
                credit.coefficient = total / credit.tokens
                credit.runs += 1
    for run in row.runs:
        for counted in _counts(run):
            _add(found[counted["layer"], counted["feature"]], counted)
    return sorted(found.values(), key=lambda credit: credit.weight, reverse=True)


def _add(credit: FeatureCredit, counted: dict[str, Any]) -> None:
    credit.items += counted["items"]
    credit.changed += counted["changed"]
    if "fixed" in counted:
        credit.fixed = (credit.fixed or 0) + counted["fixed"]
        credit.broken = (credit.broken or 0) + counted["broken"]


def _counts(run: Record) -> list[dict[str, Any]]:
    """A run's test items by layer and feature: how many had it, changed, were fixed or broken."""
    pairs = items_with_features(run)
    if pairs is None or not len(pairs):
        return []
    sums = [("changed", "sum"), ("item", "count")]
    if "fixed" in pairs.column_names:
        sums += [("fixed", "sum"), ("broken", "sum")]
    table = pairs.group_by(["layer", "feature"]).aggregate(sums)
    renamed = [name.removesuffix("_sum") for name in table.column_names]
    return table.rename_columns(
        ["items" if name == "item_count" else name for name in renamed]
    ).to_pylist()


def items_with_features(run: Record) -> pa.Table | None:
    """One line for each test item, layer and feature added to it: item, layer, feature, changed
    and, where the run has rewards, fixed and broken (0 or 1). None without interventions.

    Read in batches: a long answer steered at every layer has millions of rows.
    """
    path = run.path / "interventions.parquet"
    return _pairs(path, path.stat().st_mtime_ns) if path.exists() else None


@lru_cache(maxsize=SEEDS_KEPT)
def _pairs(path: Path, _written: int) -> pa.Table | None:
    """_written: when the file was, so that one written anew is read anew."""
    file = pq.ParquetFile(path, read_dictionary=["item"])
    columns = ["split", "item", "layer", "features", "changed"]
    rewards = [name for name in REWARDS if name in file.schema_arrow.names]
    parts = [
        _distinct(pa.Table.from_batches([batch]), bool(rewards))
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns + rewards)
    ]
    return _unique(pa.concat_tables(parts)) if parts else None


def _distinct(rows: pa.Table, rewarded: bool) -> pa.Table:
    rows = rows.filter(pc.equal(rows["split"], "test"))
    features = rows["features"].combine_chunks()
    at = pc.list_parent_indices(features)
    columns = {
        "item": rows["item"].cast(pa.string()).take(at),
        "layer": rows["layer"].take(at),
        "feature": pc.list_flatten(features),
        "changed": rows["changed"].cast(pa.int32()).take(at),
    }
    if rewarded:
        was, now = (pc.greater_equal(rows[name], RIGHT).take(at) for name in REWARDS)
        columns["fixed"] = pc.and_not(now, was).cast(pa.int32())
        columns["broken"] = pc.and_not(was, now).cast(pa.int32())
    return _unique(pa.table(columns))


def _unique(pairs: pa.Table) -> pa.Table:
    return pairs.group_by(pairs.column_names).aggregate([])


LABEL = "label"
CREDIT_COLUMNS = (
    "method", "layers", "layer", "feature", "runs", "additions", "mean_coefficient", "correlation",
    "rank_in_stage_1", "items", "changed", "fixed", "broken", "neuronpedia",
)  # fmt: skip


def credit_columns(credits: Sequence[FeatureCredit]) -> list[str]:
    """Head of features.csv; labels have a column where one is known."""
    return [*CREDIT_COLUMNS, *([LABEL] if any(c.label for c in credits) else [])]


def credit_lines(credits: Sequence[FeatureCredit]) -> list[list[Any]]:
    """Lines of features.csv, below `credit_columns`; what isn't known is empty."""
    labelled = LABEL in credit_columns(credits)
    lines = [
        [c.row.family, " ".join(map(str, c.row.layers)), c.layer, c.feature, c.runs, c.tokens,
         c.coefficient, c.correlation, c.rank, c.items, c.changed, c.fixed, c.broken, c.link,
         *([c.label] if labelled else [])]
        for c in credits
    ]  # fmt: skip
    return [["" if value is None else value for value in line] for line in lines]


ITEM_COLUMNS = ("method", "layers", "item", "seeds", "fixed", "broken", "features")


def item_lines(row: Row) -> list[list[Any]]:
    """Lines of items.csv: each item that came right or went wrong in some of the row's runs, in how
    many of them, and the features it had there (layer/feature), those of most runs first."""
    seen: dict[str, dict[str, Any]] = {}
    for run in row.runs:
        pairs = items_with_features(run)
        if pairs is None or "fixed" not in pairs.column_names:
            continue
        flipped = pairs.filter(pc.greater(pc.add(pairs["fixed"], pairs["broken"]), 0))
        mine = {one["item"]: one for one in flipped.to_pylist()}
        for item, one in mine.items():
            noted = seen.setdefault(item, {"fixed": 0, "broken": 0, "features": Counter()})
            noted["fixed"] += one["fixed"]
            noted["broken"] += one["broken"]
        for one in flipped.to_pylist():
            seen[one["item"]]["features"][f"{one['layer']}/{one['feature']}"] += 1
    layers = " ".join(map(str, row.layers))
    lines = [
        [row.family, layers, item, len(row.runs), noted["fixed"], noted["broken"],
         " ".join(sorted(noted["features"], key=lambda name: (-noted["features"][name], name)))]
        for item, noted in seen.items()
    ]  # fmt: skip
    return sorted(lines, key=lambda line: (-line[4] - line[5], line[2]))

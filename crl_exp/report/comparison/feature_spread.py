"""How sure a figure of the features used is, over items and seeds.

The items' part by a grouped jackknife: the figure is made again without each twentieth of the test
items, the same for every seed (Tukey 1958; Miller 1974). Shapes: S seeds, G groups.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from scipy.special import stdtrit

from crl_exp.analysis.statistics import Crossed, Z, crossed_parts
from crl_exp.report.comparison.feature_use import LayerUse
from crl_exp.runs.items import BATCH_ROWS

pc: Any = pyarrow.compute  # its functions are made when it is imported, unseen by type checkers
GROUPS = 20
NOISE_TAKEN_OFF = 2 / 3
"""The noise in the seeds' means is in the items' part too. There it counts by the normal quantile,
so that taking all of it off the seeds' part, which counts by Student's, takes off too much where
hardly anything but noise is the items': with three seeds .91 to .93 where seeds matter. Where none
is taken off it is .98 to .99 where they don't. Set by simulation (docs/statistics.md)."""
KEPT = 2048  # files of which counts are kept
Counts = dict[int, list[Counter[int]]]
"""By layer and group of items: at how many tokens each feature was added."""


def spread_over_items(
    uses: Sequence[LayerUse], metric: Callable[[LayerUse], float]
) -> tuple[Crossed, bool]:
    """The mean of a figure over seeds with its uncertainty, and whether items are in it.

    They aren't where a run has no interventions.parquet.
    """
    value_S = np.array([metric(use) for use in uses])
    without = [without_groups(use) for use in uses]
    known = [one for one in without if one is not None]
    if len(known) < len(without):
        return crossed_parts(value_S, 0.0, 0.0, 0), False
    value_SG = np.array([[metric(part) for part in parts] for parts in known])
    return jackknifed(value_S, value_SG), True


def jackknifed(value_S: np.ndarray, value_SG: np.ndarray) -> Crossed:
    """The mean of a figure over seeds. value_SG: each seed's without each group of items."""
    v_of_one = float(np.mean([_jackknife(value_G) for value_G in value_SG]))
    v_items = _jackknife(value_SG.mean(axis=0))
    return crossed_parts(value_S, v_items, v_of_one, GROUPS, NOISE_TAKEN_OFF)


def _jackknife(value_G: np.ndarray) -> float:
    """Variance of a figure from its values without each group of items, made larger by as much as
    Student's interval of so few groups is wider than the normal one, which `Crossed` takes."""
    df = len(value_G) - 1
    return float(df * value_G.var() * (stdtrit(df, 0.975) / Z) ** 2)


def without_groups(use: LayerUse) -> list[LayerUse] | None:
    """A run's features at a layer, counted without each group of items; None where the items that
    had them aren't known, or all lie in one group."""
    if "without_groups" not in use.made:
        use.made["without_groups"] = _without_groups(use)
    return use.made["without_groups"]


def _without_groups(use: LayerUse) -> list[LayerUse] | None:
    path = use.record.path / "interventions.parquet"
    if not path.exists():
        return None
    of_groups = _counted(path, path.stat().st_mtime_ns).get(use.layer)
    if of_groups is None:
        return None
    found = []
    for counts in of_groups:
        left = [{**row, "tokens": row["tokens"] - counts[row["feature"]]} for row in use.used]
        kept = tuple(row for row in left if row["tokens"] > 0)
        if not kept:
            return None
        found.append(replace(use, used=kept))
    return found


@lru_cache(maxsize=KEPT)
def _counted(path: Path, _written: int) -> Counts:
    """Read in batches: a long answer steered at every layer has millions of rows."""
    found: Counts = {}
    columns = ["split", "item", "layer", "features"]
    with pq.ParquetFile(path, read_dictionary=["item"]) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
            rows = pa.Table.from_batches([batch])
            rows = rows.filter(pc.equal(rows["split"], "test"))
            features = rows["features"].combine_chunks()
            at = pc.list_parent_indices(features)
            table = pa.table(
                {
                    "group": _groups(rows["item"]).take(at),
                    "layer": rows["layer"].take(at),
                    "feature": pc.list_flatten(features),
                }
            )
            counts = table.group_by(["group", "layer", "feature"]).aggregate([([], "count_all")])
            for line in counts.to_pylist():
                groups = found.setdefault(line["layer"], [Counter() for _ in range(GROUPS)])
                groups[line["group"]][line["feature"]] += line["count_all"]
    return found


def _groups(items: pa.ChunkedArray) -> pa.Array:
    """The group of each row's item, found once for each item."""
    encoded = items.combine_chunks().dictionary_encode()
    of_item = pa.array([group_of(item) for item in encoded.dictionary.to_pylist()], pa.int32())
    return of_item.take(encoded.indices)


def group_of(item_id: str) -> int:
    return zlib.crc32(item_id.encode()) % GROUPS

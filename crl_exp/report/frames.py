"""`crl_exp.read_sweep`: the runs of a sweep as tables of pandas, for figures of one's own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crl_exp.analysis.estimates import as_float
from crl_exp.config.keys import filed_under
from crl_exp.report.labels import labels
from crl_exp.runs.items import NoItemsError, item_rewards
from crl_exp.runs.records import Record, find_records, find_sweep

OUTPUTS = Path("outputs")
RUN_COLUMNS = ("key", "sweep", "state", "method", "label", "control", "model", "sae", "task",
               "layers", "seed", "n", "accuracy", "baseline", "delta", "low", "high", "p_value",
               "path")  # fmt: skip
LAYER_COLUMNS = ("key", "figure", "layer", "value", "low", "high", "n")


@dataclass(frozen=True)
class SweepTables:
    """Tables of a sweep. Shares and differences are fractions; undefined ones are NaN.

    runs: a line a run, those without a result too. label: the method, with the options that set the
        run apart from the method's others. accuracy, baseline: mean reward on the test items,
        steered and unsteered; delta: their difference, with its 95 % interval low to high over
        items. (`python -m crl_exp report` puts seeds together.)
    items, unsteered: reward of each item of test in each run that has them; indexed by item_id, a
        column a run. NaN where a run wasn't asked an item.
    by_layer: a line for each figure that a run has of a layer, in order of layers.
    """

    runs: pd.DataFrame
    items: pd.DataFrame
    unsteered: pd.DataFrame
    by_layer: pd.DataFrame


def read_sweep(path_or_name: str | Path) -> SweepTables:
    """The runs of a sweep (its name in `outputs`, or its folder), of a folder of sweeps, or one.

    A run is called by its key; where several sweeps have the same one, SWEEP/KEY. Raises
    `UserError` where there is no run, or a file of one is damaged.
    """
    records = find_records(find_sweep(str(path_or_name), OUTPUTS))
    times = Counter(record.key for record in records)
    names = [r.key if times[r.key] == 1 else f"{r.sweep}/{r.key}" for r in records]
    finished = [record for record in records if record.result is not None]
    said = {key: label.text for key, label in labels(finished).items()} if finished else {}
    runs = [_run(name, record, said) for name, record in zip(names, records, strict=True)]
    steered: dict[str, pd.Series] = {}
    unsteered: dict[str, pd.Series] = {}
    layers: list[dict[str, Any]] = []
    for name, record in zip(names, records, strict=True):
        if record.result is None:
            continue
        layers += _by_layer(name, record.result)
        try:
            rewards = item_rewards(record)
        except NoItemsError:  # of an earlier version: the table has no column of it
            continue
        steered[name] = pd.Series(rewards.steered, index=list(rewards.ids))
        unsteered[name] = pd.Series(rewards.baseline, index=list(rewards.ids))
    return SweepTables(
        pd.DataFrame(runs, columns=list(RUN_COLUMNS)).astype({"n": "Int64", "seed": "Int64"}),
        _items(steered), _items(unsteered), pd.DataFrame(layers, columns=list(LAYER_COLUMNS)),
    )  # fmt: skip


def _run(name: str, record: Record, said: dict[str, str]) -> dict[str, Any]:
    config, result = record.config, record.result
    line: dict[str, Any] = {
        "key": name, "sweep": record.sweep, "state": record.state,
        "method": filed_under(config), "label": None, "control": None,
        "model": config["model"]["name"], "sae": (config.get("sae") or {}).get("name"),
        "task": config["task"]["name"], "layers": tuple(record.layers or ()),
        "seed": config["seed"], "n": None, "path": str(record.path),
    }  # fmt: skip
    figures = dict.fromkeys(("accuracy", "baseline", "delta", "low", "high", "p_value"), np.nan)
    if result is not None:
        line |= {"label": said[record.key], "control": record.control, "n": result["n"]}
    if result is not None and "delta" in result:  # an analysis may answer nothing
        low, high = map(as_float, result["delta_ci95"])
        figures = {
            "accuracy": as_float(result["accuracy_steered"]),
            "baseline": as_float(result["accuracy_baseline"]),
            "delta": as_float(result["delta"]), "low": low, "high": high,
            "p_value": as_float(result["p_value"]),
        }  # fmt: skip
    return line | figures


def _by_layer(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """A line a figure and layer. JSON has layers as texts, of which "10" comes before "2"."""
    return [
        {"key": name, "figure": figure, "layer": int(layer),
         **{key: as_float(one.get(key)) for key in ("value", "low", "high", "n")}}
        for figure, of_layer in (result.get("by_layer") or {}).items()
        for layer, one in sorted(of_layer.items(), key=lambda pair: int(pair[0]))
    ]  # fmt: skip


def _items(columns: dict[str, pd.Series]) -> pd.DataFrame:
    """Side by side by id, the first run's items in its order, then what only others have."""
    ids = list(dict.fromkeys(item for column in columns.values() for item in column.index))
    index = pd.Index(ids, name="item_id", dtype=object)
    return pd.DataFrame({name: one.reindex(index) for name, one in columns.items()}, index=index)

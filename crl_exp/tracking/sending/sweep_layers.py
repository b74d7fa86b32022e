"""By layer over a sweep's runs: each steers one layer, so that its own series would be a point.

The sweep's run gets one series a method, the step being the layer, as soon as all runs of a method
and layer (its seeds) are finished; its figures are those of a report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from crl_exp.analysis.estimates import Estimates, Samples
from crl_exp.config.errors import UserError
from crl_exp.config.keys import NOT_IN_KEY, content_key, filed_under
from crl_exp.runs.items import rewards_of_seeds
from crl_exp.runs.records import Record, flatten
from crl_exp.runs.result import Figure, Series
from crl_exp.tracking.sending.content import Point, by_layer_points, control_words

LONGEST = 120
"""Characters of a series' name that are made of options."""
SENTENCE = 60
"""Longer than this an option's value is a text."""


def sweep_points(records: Sequence[Record]) -> list[Point]:
    """`by_layer/METHOD/delta` and `…/accuracy` with `…/low` and `…/high`, of each method and layer
    all of whose runs are finished: means over seeds, intervals over items and seeds."""
    single = [one for one in records if _steers_one_layer(one)]
    groups: dict[str, dict[int, list[Record]]] = {}
    for record in single:
        layer = (record.layers or [0])[0]
        groups.setdefault(_alike(record), {}).setdefault(layer, []).append(record)
    found = []
    for name, layers in _named(groups).items():
        done = {la: runs for la, runs in layers.items() if all(run.result for run in runs)}
        figures = {la: made for la, runs in done.items() if (made := _figures(runs))}
        if len(layers) < 2 or not figures:
            continue
        at = max(_written(run) for la in figures for run in done[la])
        for metric in ("delta", "accuracy"):
            by_layer = {layer: both[metric] for layer, both in figures.items()}
            found += by_layer_points([Series(name, metric, by_layer)], at)
    return found


def _steers_one_layer(record: Record) -> bool:
    try:
        # One that chose its layer itself is no point of a series: its seeds may be at several.
        return record.steers and len(record.layers or []) == 1 and not record.chose_layer
    except UserError:
        return False  # damaged: told where the run itself is sent


def _alike(record: Record) -> str:
    """Equal for runs that differ in layer, seed and draw of training items alone."""
    plain = {k: v for k, v in record.config.items() if k not in (*NOT_IN_KEY, "seed", "layers")}
    plain["task"] = {k: v for k, v in plain["task"].items() if k != "train_seed"}
    return content_key(plain)


def _named(groups: dict[str, dict[int, list[Record]]]) -> dict[str, dict[int, list[Record]]]:
    """By the method's name, with the options that set groups of one name apart."""
    flat: dict[str, dict[str, Any]] = {}
    for key, layers in groups.items():
        flat[key] = flatten(next(iter(layers.values()))[0].config)
    of_name: dict[str, list[str]] = {}
    for key, layers in groups.items():
        of_name.setdefault(_base(next(iter(layers.values()))[0]), []).append(key)
    named: dict[str, dict[int, list[Record]]] = {}
    for base, keys in of_name.items():
        for key in keys:
            options = " ".join(_differing(flat[key], [flat[other] for other in keys]))
            # What MLflow takes in a metric's name, less the slash, which makes groups.
            name = re.sub(r"[^\w.\- :]", "_", f"{base} {options[:LONGEST]}".strip())
            named[name if name not in named else f"{name} {key}"] = groups[key]
    return named


def _base(record: Record) -> str:
    return " ".join([filed_under(record.config), *control_words(record)])


def _differing(mine: dict[str, Any], all_of_them: list[dict[str, Any]]) -> list[str]:
    """`KEY:VALUE`; a sentence (a question's wording) only where nothing shorter differs."""
    skipped = (*NOT_IN_KEY, "seed", "layers")
    found = [
        f"{key}:{value}"
        for key, value in mine.items()
        if key.partition(".")[0] not in skipped
        and not key.endswith("_target_")
        and len({json.dumps(other.get(key)) for other in all_of_them}) > 1
    ]
    return [option for option in found if len(option) <= SENTENCE] or found


def _written(run: Record) -> int:
    return int((run.path / "result.json").stat().st_mtime * 1000)


def _figures(runs: list[Record]) -> dict[str, Figure]:
    """Of these seeds together, on test; nothing where their items aren't there or aren't the same:
    a report says why."""
    try:
        samples = Samples(*rewards_of_seeds(runs, "test"))
    except UserError:
        return {}
    found = Estimates(tuple(run.result for run in runs if run.result is not None), samples)
    return {
        "delta": Figure(found.delta.mean, *found.interval, found.delta.n),
        "accuracy": Figure(found.accuracy.mean, *found.accuracy_interval, found.accuracy.n),
    }

"""What of a run directory wandb is given, and under which names. Knows nothing of wandb.

wandb's own step only rises, and what comes under an earlier one is dropped. So every row has the
value of an axis of its own (`axis_of`), by which wandb draws, and wandb counts rows by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from crl_exp.config.display import plain, undefined
from crl_exp.config.files import sha256_of
from crl_exp.config.keys import NOT_IN_KEY, filed_under
from crl_exp.runs.items import NAME as ITEMS
from crl_exp.runs.records import Record
from crl_exp.tracking.sending.content import (
    BY_LAYER,
    Point,
    data_set,
    final_points,
    run_name,
    tags,
)
from crl_exp.tracking.sending.sent import digest

UPDATE, LAYER, READING = "update", "by_layer/layer", "system/reading"
"""Axes: the policy's update, the layer, and the reading of the machine's load."""
SYSTEM = "system/"
TAG_CHARS = 64
"""wandb's own limit of a tag."""
SENT_FROM = ("journal.jsonl", "system.jsonl", "result.json", ITEMS)


@dataclass
class Row:
    """A row of wandb's history: metrics at one place of one axis.

    seconds: when it was measured, since the epoch.
    """

    axis: str
    step: int
    seconds: float
    values: dict[str, float] = field(default_factory=dict)

    @property
    def logged(self) -> dict[str, float]:
        return {self.axis: self.step, "_timestamp": self.seconds, **self.values}


def axis_of(name: str) -> str:
    """What a metric is drawn over."""
    if name.startswith(BY_LAYER):
        return LAYER
    return READING if name.startswith(SYSTEM) else UPDATE


def rows(found: Iterable[Point]) -> list[Row]:
    """Points of one step and time together, in their order."""
    made: dict[tuple[str, int, int], Row] = {}
    for point in found:
        axis = axis_of(point.name)
        key = (axis, point.step, point.time_ms)
        row = made.setdefault(key, Row(axis, point.step, point.time_ms / 1000))
        row.values[point.name] = point.value
    return list(made.values())


class Seen:
    """Which points were passed on: each once. Those of a journal that goes over the same steps
    again are the ones of the first time; layers come in any order."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._layers: set[tuple[str, int]] = set()

    def new(self, found: Iterable[Point]) -> list[Point]:
        kept = []
        for point in found:
            if point.name.startswith(BY_LAYER):
                fresh = (point.name, point.step) not in self._layers
                self._layers.add((point.name, point.step))
            else:
                fresh = point.step > self._last.get(point.name, -1)
                if fresh:
                    self._last[point.name] = point.step
            if fresh:
                kept.append(point)
        return kept


def final(record: Record) -> tuple[dict[str, float], list[Point]]:
    """Of a finished run the figures for wandb's summary, by name, and the series over layers."""
    if record.result is None:
        return {}, []
    time_ms = int((record.path / "result.json").stat().st_mtime * 1000)
    found = final_points(record.result, time_ms)
    series = [point for point in found if point.name.startswith(BY_LAYER)]
    return {p.name: p.value for p in found if not p.name.startswith(BY_LAYER)}, series


@dataclass(frozen=True)
class Described:
    """How a run is listed. config: the run's own, and under `run` what MLflow has as tags."""

    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: dict[str, Any]


def described(record: Record) -> Described:
    kept = {key: value for key, value in record.config.items() if key not in NOT_IN_KEY}
    facts = {k: v for k, v in tags(record).items() if not k.startswith("mlflow.") and k != "error"}
    data = data_set(record)
    if data is not None:
        facts |= {"data": data.name, "data_digest": data.digest}
    listed = (facts["method"], facts["model"], facts["task"], f"layers {facts['layers']}")
    return Described(
        run_name(record),
        record.sweep,
        filed_under(record.config),
        tuple(dict.fromkeys(plain(tag)[:TAG_CHARS] for tag in listed)),
        _written({**kept, "run": facts}),
    )


def _written(value: Any) -> Any:
    """As JSON takes it in UTF-8: no lone surrogates, no number that isn't finite."""
    if isinstance(value, dict):
        return {plain(str(key)): _written(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(one) for one in value]
    if isinstance(value, str):
        return plain(value)
    return str(value) if isinstance(value, float) and undefined(value) else value


def signature(record: Record) -> str:
    """Equal where wandb would be given the same, wherever the run directory lies."""
    told = described(record)
    facts = {k: v for k, v in told.config["run"].items() if k != "run_directory"}
    config = {**told.config, "run": facts}
    there = (record.path / name for name in SENT_FROM)
    read = {path.name: sha256_of(path) for path in there if path.exists()}
    return digest([told.name, told.group, list(told.tags), config, record.state, read])

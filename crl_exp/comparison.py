"""Runs of a sweep side by side: seeds put together, layers chosen, p-values corrected.

What may be compared and how it is put together is decided here; `report` and `figures` show it.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from crl_exp.errors import UserError
from crl_exp.labels import NAMES, labels
from crl_exp.records import Record, flatten
from crl_exp.statistics import mean_interval

CONTROLS = ("none", "random")
# Keys of the task that don't change what is asked and scored on the test items.
NOT_THE_TEST = ("task.shuffle_labels", "task.n_train", "task.n_train_benign")
# Keys of models that change how they are run, not which they are.
NOT_THE_MODEL = (
    "model.device", "model.attn_implementation", "task.classifier.device",
    "task.classifier.batch_size", "task.cross_encoder.device", "task.cross_encoder.batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seed."""

    family: str
    """What the method is called, with the options that set it apart."""
    method: str
    shuffled: bool
    layers: tuple[int, ...]
    runs: tuple[Record, ...]

    def values(self, key: str, test_set: str | None = None) -> np.ndarray:
        """A figure of the test set, or of a further one, of each seed [S]."""
        return np.array([split(run, test_set)[key] for run in self.runs], dtype=float)

    def mean(self, key: str, test_set: str | None = None) -> float:
        return float(self.values(key, test_set).mean())

    def interval(self, test_set: str | None = None) -> tuple[float, float]:
        """95 % interval of delta: Student's t over seeds; where there is one seed, or all give the
        same, the run's own paired bootstrap over items."""
        values = self.values("delta", test_set)
        if np.ptp(values) > 0:
            return mean_interval(values)
        low, high = split(self.runs[0], test_set)["delta_ci95"]
        return low, high

    @property
    def over_seeds(self) -> bool:
        """Whether `interval` is one over seeds."""
        return bool(np.ptp(self.values("delta")) > 0)

    @property
    def p_value(self) -> float:
        """The largest McNemar p of the seeds."""
        return float(self.values("p_value").max())

    @property
    def ser(self) -> float | None:
        """broken / (fixed + broken), over all seeds."""
        broken, fixed = self.values("broken").sum(), self.values("fixed").sum()
        return float(broken / (fixed + broken)) if fixed + broken else None

    @property
    def validation(self) -> float:
        """Mean reward on validation: what layers are chosen by."""
        return float(np.mean([split(r, "validation")["accuracy_steered"] for r in self.runs]))

    @property
    def control(self) -> bool:
        return self.method in CONTROLS or self.shuffled

    @property
    def seeds(self) -> list[int]:
        return sorted(run.config["seed"] for run in self.runs)


def split(run: Record, name: str | None) -> dict[str, Any]:
    """A run's figures on test (None), validation or a further test set."""
    assert run.result is not None
    if name is None:
        return run.result
    return run.result["validation"] if name == "validation" else run.result["test_sets"][name]


@dataclass(frozen=True)
class SweepComparison:
    """Comparable rows, and the runs that have no result yet. Layers in order within a family."""

    rows: tuple[Row, ...]
    unfinished: tuple[Record, ...]

    @property
    def first(self) -> Record:
        return self.rows[0].runs[0]

    @property
    def test_sets(self) -> list[str]:
        assert self.first.result is not None
        return list(self.first.result["test_sets"])

    @property
    def families(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.family, []).append(row)
        return found

    @cached_property
    def p_holm(self) -> dict[Row, float]:
        """The rows' p-values, Holm-corrected for the layers tried within their family."""
        corrected: dict[Row, float] = {}
        for rows in self.families.values():
            corrected |= dict(zip(rows, holm([row.p_value for row in rows]), strict=True))
        return corrected

    @cached_property
    def chosen(self) -> set[Row]:
        """Of each family tried at several layers, the row that does best on validation.

        The test set is never looked at. Controls are not chosen from.
        """
        families = [
            rows for rows in self.families.values() if len(rows) > 1 and not rows[0].control
        ]
        return {max(rows, key=lambda row: row.validation) for rows in families}


def compare_runs(records: list[Record]) -> SweepComparison:
    """Put finished runs into rows.

    Raises `UserError` where none is finished, or where they were not asked the same of the same
    model: it names what differs.
    """
    finished = [record for record in records if record.result is not None]
    unfinished = tuple(record for record in records if record.result is None)
    if not finished:
        counts = Counter(record.state for record in unfinished)
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        raise UserError(
            f"no run of {records[0].sweep} is finished ({states}); launch it again to run what is "
            "missing"
        )
    refuse_unlike(finished)
    named = labels(finished)
    groups: dict[tuple[str, str, bool, tuple[int, ...]], list[Record]] = {}
    for record in finished:
        assert record.result is not None
        shuffled = bool(record.config["task"].get("shuffle_labels"))
        method = record.result["method"]
        key = (named[record.key], method, shuffled, tuple(record.layers or ()))
        groups.setdefault(key, []).append(record)
    rows = [
        Row(*key, tuple(sorted(runs, key=lambda run: run.config["seed"])))
        for key, runs in groups.items()
    ]
    order = {name: i for i, name in enumerate(NAMES)}
    rows.sort(
        key=lambda r: (order.get(r.method, 99), r.shuffled, r.family, len(r.layers), r.layers)
    )
    return SweepComparison(tuple(rows), unfinished)


def refuse_unlike(records: list[Record]) -> None:
    """Raise `UserError` where model, task, test items, n or scorer differ, naming them all."""
    faults = []
    asked = {record.key: _asked(record) for record in records}
    for name in dict.fromkeys(key for values in asked.values() for key in values):
        runs: dict[str, list[str]] = {}
        for key, values in asked.items():
            runs.setdefault(json.dumps(values.get(name)), []).append(key)
        if len(runs) > 1:
            told = [
                f"{value} in {len(keys)} ({', '.join(keys[:3])})" for value, keys in runs.items()
            ]
            faults.append(f"  {name}: {'; '.join(told)}")
    if faults:
        raise UserError(
            f"the runs of {records[0].sweep} can't be compared, they differ in\n"
            + "\n".join(faults)
            + "\nRun each kind under its own sweep_name=…, or move the odd ones out of the folder"
        )


def _asked(record: Record) -> dict[str, Any]:
    assert record.result is not None
    sections = {"model": record.config["model"], "task": record.config["task"]}
    skipped = (*NOT_THE_TEST, *NOT_THE_MODEL)
    kept = {key: value for key, value in flatten(sections).items() if key not in skipped}
    sizes = {name: figures["n"] for name, figures in record.result["test_sets"].items()}
    return {
        **kept,
        "n": record.result["n"],
        "scorer": record.result["scorer"],
        "test_sets.n": sizes,
    }


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m is multiplied by m - i, made monotone."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected

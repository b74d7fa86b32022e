"""Runs of a sweep side by side: seeds put together, layers chosen, p-values corrected.

What may be compared and how it is put together is decided here; `report` and `figures` show it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from crl_exp.analysis.estimates import Estimates
from crl_exp.analysis.winners_curse import Tried
from crl_exp.report.comparison.comparable import refuse_unfinished, refuse_unlike
from crl_exp.report.comparison.estimates import estimates, split
from crl_exp.report.labels import NAMES, Label, labels
from crl_exp.runs.items import NoItemsError, item_rewards
from crl_exp.runs.records import Record
from crl_exp.runs.result import Result


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seed and the draw of their training items."""

    label: Label
    method: str
    shuffled: bool
    layers: tuple[int, ...]
    """Steered together; where each seed chose its own one, all that were chosen."""
    runs: tuple[Record, ...]

    @property
    def family(self) -> str:
        """What the method is called, with the options that set it apart."""
        return self.label.text

    @property
    def alternatives(self) -> bool:
        """Whether `layers` are those of different seeds."""
        return len({tuple(run.layers or ()) for run in self.runs}) > 1

    @property
    def single(self) -> bool:
        """Whether one layer is steered, the same in all runs."""
        return len(self.layers) == 1

    def values(self, key: str, test_set: str | None = None) -> np.ndarray:
        """A figure of the test set, or of a further one, of each seed [S]."""
        return np.array([split(run, test_set)[key] for run in self.runs], dtype=float)

    def mean(self, key: str, test_set: str | None = None) -> float:
        return float(self.values(key, test_set).mean())

    @cached_property
    def made(self) -> dict[str, Any]:
        """As a comparison's."""
        return {}

    @cached_property
    def _estimates(self) -> dict[str | None, Estimates]:
        return {}

    def estimates(self, test_set: str | None = None) -> Estimates:
        """What the seeds say together, on the test set or a further one."""
        if test_set not in self._estimates:
            self._estimates[test_set] = estimates(self.runs, test_set)
        return self._estimates[test_set]

    def interval(self, test_set: str | None = None) -> tuple[float, float]:
        """95 % interval of delta over items and seeds; see `Estimates`."""
        return self.estimates(test_set).interval

    def accuracy_interval(self, test_set: str | None = None) -> tuple[float, float]:
        """95 % interval of the steered accuracy over items and seeds."""
        return self.estimates(test_set).accuracy_interval

    @property
    def over_seeds(self) -> bool:
        """Whether seeds differ, so that `interval` holds them too."""
        return not self.estimates().alike

    @property
    def p_value(self) -> float:
        return self.estimates().p_value

    @property
    def ser(self) -> float | None:
        """broken / (fixed + broken), over all seeds."""
        broken, fixed = self.values("broken").sum(), self.values("fixed").sum()
        return float(broken / (fixed + broken)) if fixed + broken else None

    @property
    def validation(self) -> float:
        """Mean reward on validation: what layers are chosen by. An undefined one is the worst."""
        mean = self.mean("accuracy_steered", "validation")
        return mean if np.isfinite(mean) else -np.inf

    @property
    def control(self) -> bool:
        return self.runs[0].control

    @property
    def unsteered(self) -> bool:
        """Whether it is the unsteered model against itself, and so no result."""
        return self.runs[0].unsteered

    @property
    def variant_of(self) -> str:
        """The published method that its own is, or changes: `crl`, `corrsteer` or ""."""
        return self.runs[0].variant_of

    @property
    def train_seeds(self) -> set[int | None]:
        return {_draw(run)[1] for run in self.runs}

    @property
    def seeds(self) -> list[int]:
        return sorted(run.config["seed"] for run in self.runs)


@dataclass(frozen=True)
class Analysis:
    """A finished run of a kind that doesn't steer. label: as a row's."""

    label: Label
    run: Record

    @cached_property
    def result(self) -> Result:
        assert self.run.result is not None
        return Result.read(self.run.result)


@dataclass(frozen=True)
class SweepComparison:
    """Comparable rows, and the runs that have no result yet. Layers in order within a family.

    analyses: of the same model and task, beside the rows or alone.
    """

    rows: tuple[Row, ...]
    unfinished: tuple[Record, ...]
    analyses: tuple[Analysis, ...] = ()

    @cached_property
    def made(self) -> dict[str, Any]:
        """What was made of this comparison and is asked for again, by a name of its maker's."""
        return {}

    @property
    def first(self) -> Record:
        return self.rows[0].runs[0] if self.rows else self.analyses[0].run

    @property
    def varied(self) -> list[str]:
        """Keys of the options in which runs of a method differ, besides seed and layers."""
        return list(dict.fromkeys(key for row in self.rows for key, _ in row.label.settings))

    @property
    def test_sets(self) -> list[str]:
        assert self.first.result is not None
        return list(self.first.result.get("test_sets", {}))

    @property
    def families(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.family, []).append(row)
        return found

    @cached_property
    def tried(self) -> dict[str, list[Row]]:
        """By method all its rows, of every layer and option: what p-values are corrected for."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.label.name, []).append(row)
        return found

    @cached_property
    def p_holm(self) -> dict[Row, float]:
        """The rows' p-values, Holm-corrected for the layers and options tried of their method."""
        corrected: dict[Row, float] = {}
        for rows in self.tried.values():
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

    @cached_property
    def choices(self) -> list[dict[str, Any]]:
        """As in a result: the choices among layers that `chosen` makes, and among all rows of a
        method, options included, that the headline and the table of pairs make; on the means over
        seeds. Nothing of runs without rewards by item, or with other validation items."""
        sets = {f"layers of {row.family}": self.families[row.family] for row in self.rows
                if row in self.chosen}  # fmt: skip
        for name, rows in self.tried.items():
            able = [row for row in rows if not row.control]
            if len({row.family for row in able}) > 1:
                sets[f"options of {name}"] = able
        tried = Tried()
        for what, rows in sets.items():
            try:
                each = [[item_rewards(run, "validation") for run in row.runs] for row in rows]
            except NoItemsError:
                continue
            if len({one.ids for row in each for one in row}) > 1:
                continue
            for row in each:
                tried.add(np.mean([one.steered for one in row], axis=0), what)
        return tried.choices()


def compare_runs(records: list[Record]) -> SweepComparison:
    """Put finished runs into rows.

    Raises `UserError` where none is finished, or where they were not asked the same of the same
    model: it names what differs.
    """
    finished = [record for record in records if record.result is not None]
    unfinished = tuple(record for record in records if record.result is None)
    refuse_unfinished(records)
    refuse_unlike(finished)
    named = labels(finished)
    groups: dict[tuple[Label, str, bool, tuple[int, ...]], list[Record]] = {}
    for record in (record for record in finished if record.steers):
        assert record.result is not None
        shuffled = bool(record.config["task"].get("shuffle_labels"))
        # Seeds that chose a layer each are one row, whatever they chose.
        layers = () if record.chose_layer else tuple(record.layers or ())
        key = (named[record.key], record.result["method"], shuffled, layers)
        groups.setdefault(key, []).append(record)
    rows = [_row(key, runs) for key, runs in groups.items()]
    order = {name: i for i, name in enumerate(NAMES)}
    rows.sort(
        key=lambda r: (
            order.get(r.method, 99), r.shuffled, by_number(r.family), len(r.layers), r.layers,
        )
    )  # fmt: skip
    analyses = [Analysis(named[record.key], record) for record in finished if not record.steers]
    analyses.sort(key=lambda one: (by_number(one.label.text), one.run.config["seed"]))
    return SweepComparison(tuple(rows), unfinished, tuple(analyses))


def _row(key: tuple[Label, str, bool, tuple[int, ...]], runs: list[Record]) -> Row:
    label, method, shuffled, layers = key
    layers = layers or tuple(sorted({layer for run in runs for layer in run.layers or ()}))
    if not layers:  # a sweep over layers runs it again and again, each time the same
        runs = list({_draw(run): run for run in runs}.values())
    return Row(
        label,
        method,
        shuffled,
        layers,
        tuple(sorted(runs, key=lambda run: (run.config["seed"], str(_draw(run))))),
    )


def by_number(text: str) -> list[tuple[float, str]]:
    """To sort by: numbers in it by their size, `n_train=25` before `n_train=100`."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(float(part) if i % 2 else 0.0, "" if i % 2 else part) for i, part in enumerate(parts)]


def _draw(run: Record) -> tuple[int, int | None]:
    """A run's seed and that of its training items."""
    return run.config["seed"], run.config["task"].get("train_seed")


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m is multiplied by m - i, made monotone.

    Undefined ones (NaN) stay so and aren't counted.
    """
    order = [i for i in np.argsort(p_values, kind="stable") if np.isfinite(p_values[i])]
    corrected, largest = [float("nan")] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected

"""Which rows of several sweeps belong together: the same but for what sets the sweeps apart.

A key sets sweeps apart where each holds it at one value for a method and a task, and the values
differ. Rows that agree in all other keys, and in their layers, belong together. Where a sweep has
several values of a key, they are told apart by it like rows of one sweep.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from crl_exp.config.option_names import typed
from crl_exp.report.comparison.rows import Row
from crl_exp.report.labels import Label, labels, options_of
from crl_exp.report.parts import ReportPart, SweepParts
from crl_exp.runs.records import Record

Options = dict[str, Any]
Kind = tuple[str, str, str | None]
"""Method, task and model; None where no model is in all the sweeps that have the other two."""


@dataclass(frozen=True)
class Side:
    """One of the sweeps. letter: what it goes by in a table."""

    letter: str
    name: str
    folder: Path
    parts: SweepParts

    @cached_property
    def rows(self) -> list[tuple[ReportPart, Row]]:
        """A row that stands in several parts (it uses no SAE) is there once."""
        found: dict[tuple[Path, ...], tuple[ReportPart, Row]] = {}
        for part in self.parts.parts:
            for row in part.sweep.rows:
                found.setdefault(tuple(run.path for run in row.runs), (part, row))
        return list(found.values())

    @property
    def runs(self) -> list[Record]:
        return [run for _, row in self.rows for run in row.runs]


@dataclass(frozen=True)
class Matched:
    """Rows that belong together, by the number of their sweep. Runs that are in several sweeps are
    in the row of the first alone.

    same: sweeps whose row has no other runs than those of an earlier one.
    """

    label: str
    where: str
    rows: dict[int, Row]
    same: tuple[int, ...]


@dataclass(frozen=True)
class KeyValues:
    """A key in which the sweeps differ: its values in each (none where it isn't there), and the
    methods of which that is so. apart: whether rows are paired across it."""

    key: str
    values: tuple[tuple[str, ...], ...]
    apart: bool
    methods: tuple[str, ...]


class Matching:
    """Of two sides or more."""

    def __init__(self, sides: Sequence[Side]):
        self.sides = tuple(sides)
        runs = [run for side in sides for run in side.runs]
        self.options, self.labels = options_of(runs, leave_out=()), labels(runs)
        self._by_kind = self._kinds()

    def _kinds(self) -> dict[Kind, dict[int, list[tuple[ReportPart, Row]]]]:
        """Every row, by its kind and the number of its sweep."""
        models: dict[tuple[str, str], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for number, side in enumerate(self.sides):
            for _, row in side.rows:
                models[self._what(row)][number].add(_model(row))
        found: dict[Kind, dict[int, list[tuple[ReportPart, Row]]]] = {}
        for number, side in enumerate(self.sides):
            for part, row in side.rows:
                what = self._what(row)
                shared = set.intersection(*models[what].values())
                kind = (*what, _model(row) if shared else None)
                found.setdefault(kind, {}).setdefault(number, []).append((part, row))
        return found

    def _what(self, row: Row) -> tuple[str, str]:
        return self._of(row)["method"], str(row.runs[0].config["task"]["name"])

    def _of(self, row: Row) -> Options:
        return self.options[row.runs[0].key]

    def matched(self) -> list[Matched]:
        """Every row of every sweep once, in the order of the first sweep that has it."""
        first = {run.key: number for number, side in reversed(list(enumerate(self.sides)))
                 for run in side.runs}  # fmt: skip
        found = []
        for rows_of in self._by_kind.values():
            apart = self._apart(rows_of)
            groups: dict[tuple, dict[int, tuple[ReportPart, Row]]] = {}
            for number, rows in rows_of.items():
                for part, row in rows:
                    key = self._identity(row, apart)
                    while number in groups.get(key, {}):  # rows that `--by` keeps apart, say
                        key = (*key, "")
                    groups.setdefault(key, {})[number] = part, row
            made = [self._made(group, apart, first) for group in groups.values()]
            found += [one for one in made if one is not None]
        order = {run.path: i for i, run in enumerate(r for s in self.sides for r in s.runs)}
        found.sort(key=lambda one: order[one.rows[min(one.rows)].runs[0].path])
        return found

    def _made(
        self, group: dict[int, tuple[ReportPart, Row]], apart: set[str], first: dict[str, int]
    ) -> Matched | None:
        """None where each run is in an earlier sweep, by another name of its method."""
        rows, same = {}, []
        for number, (_, row) in group.items():
            own = tuple(run for run in row.runs if first[run.key] == number)
            if len(own) == len(row.runs):
                rows[number] = row
            elif own:
                rows[number] = replace(row, runs=own)
            else:
                same.append(number)
        if not rows:
            return None
        number = min(rows)
        part, row = group[number]
        where = part.title if self.sides[number].parts.several else self._asked(row)
        label: Label = self.labels[row.runs[0].key]
        said = [f"{key}={value}" for key, value in label.said if key not in apart]
        return Matched(" ".join([label.name, *said]), where, rows, tuple(same))

    def _asked(self, row: Row) -> str:
        return f"{row.runs[0].config['task']['name']}, {_model(row)}"

    def _identity(self, row: Row, apart: set[str]) -> tuple:
        kept = {key: value for key, value in self._of(row).items() if key not in apart}
        layers = () if row.runs[0].chose_layer else row.layers
        return row.label.name, layers, json.dumps(kept, sort_keys=True)

    def _apart(self, rows_of: dict[int, list[tuple[ReportPart, Row]]]) -> set[str]:
        """The keys that set the sweeps apart, of rows of one kind."""
        return {
            key for key in self._keys(rows_of)
            if _set_apart([{json.dumps(self._of(row).get(key)) for _, row in rows}
                           for rows in rows_of.values()])
        }  # fmt: skip

    def _keys(self, rows_of: dict[int, list[tuple[ReportPart, Row]]]) -> list[str]:
        return list(
            dict.fromkeys(key for rows in rows_of.values() for _, r in rows for key in self._of(r))
        )

    def keys(self) -> list[KeyValues]:
        """Of methods that are in several sweeps, the keys in which these differ; a key that follows
        from the option's name that it belongs to isn't told."""
        found: dict[tuple, list[str]] = {}
        for (method, *_), rows_of in self._by_kind.items():
            if len(rows_of) < 2:
                continue
            differ: dict[str, tuple[tuple[tuple[str, ...], ...], bool]] = {}
            for key in self._keys(rows_of):
                values = [self._values(rows_of.get(n, []), key) for n in range(len(self.sides))]
                there = [set(values[number]) for number in rows_of]
                if any(one != there[0] for one in there):
                    differ[key] = tuple(values), _set_apart(there)
            for key, (values, apart) in differ.items():
                named = key.partition(".")[0]
                if named != key and named in differ and not all(values[n] for n in rows_of):
                    continue
                methods = found.setdefault((key, values, apart), [])
                if method not in methods:
                    methods.append(method)
        return [
            KeyValues(key, values, apart, tuple(methods))
            for (key, values, apart), methods in found.items()
        ]

    def _values(self, rows: Iterable[tuple[ReportPart, Row]], key: str) -> tuple[str, ...]:
        there = [self._of(row) for _, row in rows]
        return tuple(dict.fromkeys(typed(one[key]) for one in there if key in one))

    def missing(self, number: int, row: Row) -> str:
        """Why a sweep has no row that belongs to this one."""
        rows = [other for _, other in self.sides[number].rows]
        rows = [one for one in rows if self._what(one)[1] == self._what(row)[1]]
        if not rows:
            return f"no task={self._what(row)[1]} there"
        rows = [one for one in rows if _model(one) == _model(row)] or rows
        rows = [one for one in rows if one.label.name == row.label.name]
        if not rows:
            return "no such method there"
        if not any(one.layers == row.layers for one in rows):
            return "not at these layers there"
        return "not with these options there"


def _model(row: Row) -> str:
    return str(row.runs[0].config["model"]["name"])


def _set_apart(values: Sequence[set[str]]) -> bool:
    """Whether each sweep has one value and they aren't the same one."""
    return all(len(one) <= 1 for one in values) and any(one != values[0] for one in values)

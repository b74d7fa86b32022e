"""A sweep over several tasks, models or SAE releases, taken apart into what can be compared.

Within a part all runs were asked the same of the same model; parts stand side by side.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.keys import content_key
from crl_exp.config.option_names import OFF, typed
from crl_exp.config.paths import LONGEST
from crl_exp.report.comparison.comparable import refuse_unfinished
from crl_exp.report.comparison.rows import Row, SweepComparison, compare_runs
from crl_exp.report.labels import NAMES
from crl_exp.report.wordings import wordings
from crl_exp.runs.records import Record, flatten

# What runs are never compared across. `wording`: how the questions were put (`report.wordings`).
PARTED_BY = ("task.name", "model.name", "sae.name", "wording")
FOLDER_BYTES = 60
"""Of a folder's name that is cut."""


@dataclass(frozen=True)
class ReportPart:
    """names: what sets it apart, as ((`task`, `gsm8k`), …); empty where the sweep is one part."""

    names: tuple[tuple[str, str], ...]
    sweep: SweepComparison

    @property
    def title(self) -> str:
        return ", ".join(value for _, value in self.names if value)

    @property
    def folder(self) -> str:
        """A folder's name made from `names`; of other names it is another one."""
        named = "-".join(value for _, value in self.names if value)
        made = re.sub(r"[^\w.-]+", "_", named).strip("._-")
        if made == named and len(made.encode()) < LONGEST:
            return made
        return f"{made.encode()[:FOLDER_BYTES].decode(errors='ignore')}-{content_key(named)[:4]}"


@dataclass(frozen=True)
class SweepParts:
    """parts: those with a finished run. unfinished: runs of parts that have none."""

    name: str
    parts: tuple[ReportPart, ...]
    unfinished: tuple[Record, ...]

    @property
    def keys(self) -> list[str]:
        """What sets the parts apart: `task`, `model`, …"""
        return [key for key, _ in self.parts[0].names]

    @property
    def several(self) -> bool:
        """Whether runs differ in task, model or the like, even if one of them alone is finished."""
        return bool(self.keys)

    @cached_property
    def families(self) -> list[str]:
        """All methods with their options, in the order of the tables."""
        order = {name: i for i, name in enumerate(NAMES)}
        found: dict[str, tuple] = {}
        for part in self.parts:
            for row in part.sweep.rows:
                found.setdefault(row.family, (order.get(row.method, 99), row.shuffled, row.family))
        return sorted(found, key=lambda family: found[family])


def best_rows(sweep: SweepComparison) -> dict[str, Row]:
    """Of each family one row: where it was tried at several layers, the best on validation.

    Controls are chosen in the same way here, so that they have the same choice as the methods.
    """
    return {
        family: max(rows, key=lambda row: row.validation) for family, rows in sweep.families.items()
    }


def compare_parts(records: list[Record], by: tuple[str, ...] = ()) -> SweepParts:
    """Take a sweep apart by task, model, SAE release, wording and the config keys of `by`; compare
    each.

    Raises `UserError` where no run is finished, where a key of `by` isn't in the configs, or where
    runs of a part can't be compared: all of them are named.
    """
    refuse_unfinished(records)
    configs = {record.key: flatten(record.config) for record in records}
    _refuse_unknown(by, configs)
    for key, wording in wordings(configs).items():
        configs[key]["wording"] = wording
    saes = {config["sae.name"] for config in configs.values() if not _without_sae(config)}
    for config in configs.values():
        if _without_sae(config) and len(saes) == 1:
            config["sae.name"] = next(iter(saes))  # beside the others, whose release goes unsaid
    keys = _telling([*PARTED_BY, *by], list(configs.values()))
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in sorted(records, key=lambda record: _without_sae(configs[record.key])):
        values = tuple(typed(configs[record.key].get(key)) for key in keys)
        for own in _beside(values, keys, groups) if _without_sae(configs[record.key]) else [values]:
            groups.setdefault(own, []).append(record)
    short = [key.removesuffix(".name") for key in keys]
    parts, unfinished, faults = [], [], []
    for values, group in groups.items():
        if all(record.result is None for record in group):
            unfinished += group
            continue
        names = tuple(zip(short, values, strict=True))
        try:
            parts.append(ReportPart(names, compare_runs(group)))
        except UserError as error:
            where = ", ".join(f"{key}={value}" for key, value in names)
            faults.append(f"{where}: {error}" if where else str(error))
    if faults:
        raise UserError("\n".join(faults))
    parts.sort(key=lambda part: [value for _, value in part.names])
    return SweepParts(records[0].sweep, tuple(parts), tuple(unfinished))


def _without_sae(config: dict[str, Any]) -> bool:
    """Whether a run uses no SAE, so that it stands beside those of every release."""
    return config.get("sae.name") in (None, OFF)


def _beside(
    values: tuple[str, ...], keys: list[str], groups: dict[tuple[str, ...], list[Record]]
) -> list[tuple[str, ...]]:
    """The groups that a run without an SAE belongs to: those that differ from it in the SAE alone;
    its own where there is none."""

    def but_sae(of: tuple[str, ...]) -> list[str]:
        return [value for key, value in zip(keys, of, strict=True) if key != "sae.name"]

    return [own for own in groups if but_sae(own) == but_sae(values)] or [values]


def _telling(keys: list[str], configs: list[dict[str, Any]]) -> list[str]:
    """The keys that differ, without those that follow from the ones before them."""
    kept: list[str] = []
    for key in keys:
        with_it = {json.dumps([config.get(k) for k in (*kept, key)]) for config in configs}
        if len(with_it) > len({json.dumps([config.get(k) for k in kept]) for config in configs}):
            kept.append(key)
    return kept


def _refuse_unknown(by: tuple[str, ...], configs: dict[str, dict[str, Any]]) -> None:
    known = {key for config in configs.values() for key in config}
    for key in by:
        if key not in known:
            raise UserError(
                f"--by {key}: no run's config has this key{did_you_mean(key, known)}; "
                "`config.yaml` in a run directory lists them, joined by dots (model.dtype)"
            )

"""How long runs take, from finished ones of the same model, task and method."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crl_exp.config.keys import filed_under
from crl_exp.launcher.planning.plan import Point

Kind = tuple[str, str, str]
"""Names of model, task and method."""


@dataclass(frozen=True)
class Measured:
    """What a finished run took. A pack's runs share its time: each is counted its part of it."""

    seconds: float
    packed: int


@dataclass(frozen=True)
class Estimate:
    """Of the runs whose kind has been run before. hours, gpu_hours: of all jobs, one after another.

    otherwise_packed: runs estimated by some that were packed with more others, or fewer.
    """

    hours: float
    gpu_hours: float
    known: int
    unknown: int
    otherwise_packed: int = 0

    def __str__(self) -> str:
        if not self.known:
            return "unknown: no run of this model, task and method has finished in this output_dir"
        text = f"{self.gpu_hours:.2f} GPU-hours, " if self.gpu_hours else ""
        text += f"{self.hours:.2f} hours of running, from finished runs of the same kind"
        if self.otherwise_packed:
            text += f" ({self.otherwise_packed} runs from some in packs of another size)"
        return text + (f"; unknown for {self.unknown} runs" if self.unknown else "")


def measured(output_dir: Path) -> dict[Kind, list[Measured]]:
    """What finished runs took, by kind; damaged results are left to the report to name."""
    found: dict[Kind, list[Measured]] = {}
    for path in sorted(output_dir.glob("*/*/result.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            kind = (result["model"], result["task"], result["method"])
            packed = int(result.get("packed", 1))
            one = Measured(sum(result["seconds"].values()) / packed, packed)
            found.setdefault(kind, []).append(one)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def estimate(packs: Iterable[Sequence[Point]], output_dir: Path) -> Estimate:
    """What these jobs will take: of each run the median of its kind, among those that were packed
    with as many others, or nearly as many."""
    times = measured(output_dir)
    hours = gpu_hours = 0.0
    known = unknown = otherwise = 0
    for point, packed in ((point, len(pack)) for pack in packs for point in pack):
        config = point.config
        kind = (str(config.model.name), str(config.task.name), filed_under(config))
        if kind not in times:
            unknown += 1
            continue
        off = min(abs(one.packed - packed) for one in times[kind])
        alike = [one.seconds for one in times[kind] if abs(one.packed - packed) == off]
        known, otherwise = known + 1, otherwise + (off > 0)
        hours += statistics.median(alike) / 3600
        gpu_hours += statistics.median(alike) / 3600 * point.settings.gpus_asked
    return Estimate(hours, gpu_hours, known, unknown, otherwise)

"""How long runs take, from finished ones of the same model, task and method."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from crl_exp.launcher.plan import Point

Kind = tuple[str, str, str]
"""Names of model, task and method."""


@dataclass(frozen=True)
class Estimate:
    """Of the runs whose kind has been run before. hours, gpu_hours: sums over them."""

    hours: float
    gpu_hours: float
    known: int
    unknown: int

    def __str__(self) -> str:
        if not self.known:
            return "unknown: no run of this model, task and method has finished in this output_dir"
        text = f"{self.gpu_hours:.2f} GPU-hours, " if self.gpu_hours else ""
        text += f"{self.hours:.2f} hours of running, from finished runs of the same kind"
        return text + (f"; unknown for {self.unknown} runs" if self.unknown else "")


def measured_seconds(output_dir: Path) -> dict[Kind, list[float]]:
    """Seconds that finished runs took, by kind; damaged results are left to the report to name."""
    found: dict[Kind, list[float]] = {}
    for path in sorted(output_dir.glob("*/*/result.json")):
        try:
            result = json.loads(path.read_text())
            kind = (result["model"], result["task"], result["method"])
            found.setdefault(kind, []).append(sum(result["seconds"].values()))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def estimate(points: Iterable[Point], output_dir: Path) -> Estimate:
    """What these runs will take, at the median of their kind."""
    seconds = {k: statistics.median(v) for k, v in measured_seconds(output_dir).items()}
    hours = gpu_hours = 0.0
    known = unknown = 0
    for point in points:
        config = point.config
        kind = (str(config.model.name), str(config.task.name), str(config.method.name))
        if kind not in seconds:
            unknown += 1
            continue
        known += 1
        hours += seconds[kind] / 3600
        gpu_hours += seconds[kind] / 3600 * point.settings.gpus_asked
    return Estimate(hours, gpu_hours, known, unknown)

"""What of a run directory MLflow is given, and under which names. Knows nothing of MLflow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from crl_exp.records import Record, flatten
from crl_exp.runs import NOT_IN_KEY

ARTIFACTS = ("config.yaml", "result.json", "features.json", "interventions.parquet")
STATUS = {
    "queued": "SCHEDULED",
    "running": "RUNNING",
    "done": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
    "killed": "KILLED",
    "preempted": "KILLED",
    "lost": "KILLED",
}
"""State of a run directory to MLflow's status of a run."""

# Final metric's name, and its key in the figures of a split.
COMPARED = {
    "n": "n",
    "accuracy_baseline": "accuracy_baseline",
    "accuracy_steered": "accuracy_steered",
    "delta": "delta",
    "p_value": "p_value",
    "ser": "ser",
    "invalid": "invalid_steered",
}


@dataclass(frozen=True)
class Point:
    """A metric at a step; `time_ms` since the epoch, taken from the run directory, so that a point
    sent twice is the same point."""

    name: str
    value: float
    step: int
    time_ms: int


def parameters(config: dict[str, Any]) -> dict[str, str]:
    """The flattened config without what doesn't change the run, as text: JSON, strings bare."""
    kept = {key: value for key, value in config.items() if key not in NOT_IN_KEY}
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in flatten(kept).items()
    }


def tags(record: Record) -> dict[str, str]:
    """What runs are filtered and grouped by. What isn't known yet is left out."""
    config, result = record.config, record.result or {}
    found = {
        "sweep": record.sweep,
        "run_key": record.key,
        "method": config["method"]["name"],
        "model": config["model"]["name"],
        "sae": config["sae"]["name"],
        "task": config["task"]["name"],
        "layers": layers_text(record),
        "seed": str(config["seed"]),
        "git_commit": result.get("git_commit"),
        "git_dirty": None if result.get("git_dirty") is None else json.dumps(result["git_dirty"]),
        "mlflow.source.name": "launch.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": result.get("git_commit"),
        "run_directory": f"{record.status.get('host', '')}:{record.path}",
    }
    return {key: value for key, value in found.items() if value is not None}


def layers_text(record: Record) -> str:
    """`18`, `8,12,15` or `all`."""
    return "all" if record.layers is None else ",".join(map(str, record.layers))


def run_name(record: Record) -> str:
    """How a run is listed: `crl layer 18 seed 0`."""
    word = "layer" if record.layers is not None and len(record.layers) == 1 else "layers"
    name = f"{record.config['method']['name']} {word} {layers_text(record)}"
    shuffled = " shuffled labels" if record.config["task"].get("shuffle_labels") else ""
    return f"{name} seed {record.config['seed']}{shuffled}"


def journal_points(record: Record) -> list[Point]:
    """Every metric of the journal, under the journal's own names."""
    return [
        Point(name, float(value), line["step"], int(line["time"] * 1000))
        for line in record.journal
        for name, value in line["metrics"].items()
    ]


def final_points(result: dict[str, Any], time_ms: int) -> list[Point]:
    """The result's figures: `eval/…`, and `eval_NAME/…` for further test sets and validation.

    Figures that make no sense for a run (null) are left out.
    """
    values = _split_values("eval", result)
    values["eval/over_refusal"] = result["over_refusal_steered"]
    values["eval/unique_features"] = result["unique_features"]
    values["eval/runtime"] = sum(result["seconds"].values())
    sets = {**result["test_sets"], "validation": result["validation"]}
    for name, figures in sets.items():
        values |= _split_values(f"eval_{name}", figures)
    known = {name: value for name, value in values.items() if value is not None}
    return [Point(name, float(value), 0, time_ms) for name, value in known.items()]


def _split_values(prefix: str, figures: dict[str, Any]) -> dict[str, float | None]:
    low, high = figures["delta_ci95"]
    values = {f"{prefix}/{name}": figures[key] for name, key in COMPARED.items()}
    return {**values, f"{prefix}/delta_low": low, f"{prefix}/delta_high": high}

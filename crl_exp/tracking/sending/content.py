"""What of a run directory MLflow is given, and under which names. Knows nothing of MLflow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crl_exp.config.display import plain, undefined
from crl_exp.config.files import read_json as read_our_json
from crl_exp.config.keys import NOT_IN_KEY, filed_under
from crl_exp.config.option_names import DICTIONARIES
from crl_exp.runs.records import AGAIN, Record, flatten
from crl_exp.runs.result import STEERING, Result, Series
from crl_exp.tracking.sending.sent import digest

ARTIFACTS = (
    "config.yaml", "code.json", "data.json", "result.json", "features.json",
    "interventions.parquet", "items.parquet", "by_layer.parquet", "*.png", "figures/*",
)  # fmt: skip
SWEEP_ARTIFACTS = ("submission.json", "code-*.diff", "report/**/*")
STATUS = {
    "queued": "SCHEDULED",
    "unknown": "SCHEDULED",
    "running": "RUNNING",
    "done": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
    "preempted": "KILLED",
    "lost": "KILLED",
}
"""State of a run directory to MLflow's status of a run."""
UNFINISHED = ("SCHEDULED", "RUNNING")
BY_LAYER = "by_layer/"
"""Metrics whose step is a layer, so that they come in any order and begin at -1, the embedding."""
# MLflow's own limits of a param's name and value.
PARAM_CHARS, NAME_CHARS = 6000, 250
WHOLE_PARAMS = "long_params.json"

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
# Of free text alone, and not in results of earlier versions.
QUALITY = ("log_likelihood_baseline", "log_likelihood_steered", "log_likelihood_delta")


@dataclass(frozen=True)
class Point:
    """A metric at a step; `time_ms` since the epoch, taken from the run directory, so that a point
    sent twice is the same point."""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass
class Params:
    """A config as MLflow takes it.

    given: by name, at most `PARAM_CHARS` characters. whole: by name, those that had to be cut.
    """

    given: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)


def parameters(config: dict[str, Any]) -> Params:
    """The flattened config without what doesn't change the run, as text: JSON, strings bare."""
    kept = {key: value for key, value in config.items() if key not in NOT_IN_KEY}
    made = Params()
    for key, value in flatten(kept).items():
        text = plain(value) if isinstance(value, str) else json.dumps(value)
        name = re.sub(r"[^\w.\- /:]", "_", key)
        if len(name) > NAME_CHARS or name in made.given:
            name = f"{name[: NAME_CHARS - 18]}_{digest(key)}"
        if len(text) > PARAM_CHARS:
            made.whole[key] = text
            pointer = f"… (all {len(text)} characters: artifact {WHOLE_PARAMS})"
            text = text[: PARAM_CHARS - len(pointer)] + pointer
        elif name != key:
            made.whole[key] = text
        made.given[name] = text
    return made


def tags(record: Record, code: dict[str, Any] | None = None) -> dict[str, str]:
    """What runs are filtered and grouped by. What isn't known yet is left out.

    code: what to say of the code where the run, not started yet, hasn't said it.
    """
    config, result = record.config, record.result or {}
    sae = config.get("sae") or {}  # an analysis may read none
    found = {
        "sweep": record.sweep,
        "run_key": record.key,
        "kind": STEERING if record.steers else filed_under(config),
        "method": filed_under(config),
        "model": config["model"]["name"],
        "sae": sae.get("name"),
        "sae_release": sae.get("release") or sae.get("folder"),
        "task": config["task"]["name"],
        "wording": config["task"].get("wording"),
        "layers": layers_text(record),
        "seed": str(config["seed"]),
        **code_tags(read_json(record.path / "code.json") or code or result),
        "mlflow.source.name": "launch.py",
        "mlflow.source.type": "LOCAL",
        "run_directory": f"{record.status.get('host', '')}:{record.path}",
        "error": record.status.get("error"),
    }
    return {key: plain(str(value)) for key, value in found.items() if value is not None}


def code_tags(code: dict[str, Any]) -> dict[str, str]:
    """Tags of code.json's facts. git_diff: digest of the sweep's artifact code-DIGEST.diff."""
    dirty = None if code.get("git_dirty") is None else json.dumps(code["git_dirty"])
    found = {
        "git_commit": code.get("git_commit"),
        "git_dirty": dirty,
        "git_diff": code.get("git_diff"),
        "mlflow.source.git.commit": code.get("git_commit"),
        "mlflow.source.git.dirty": dirty,
    }
    return {key: value for key, value in found.items() if value is not None}


def layers_text(record: Record) -> str:
    """`18`, `8,12,15` or `all`; `none` of a method that has no use for them."""
    if record.layers == []:
        return "none"
    return "all" if record.layers is None else ",".join(map(str, record.layers))


def run_name(record: Record) -> str:
    """How a run is listed: `crl layer 18 seed 0`."""
    word = "layer" if record.layers is not None and len(record.layers) == 1 else "layers"
    where = "" if record.layers == [] else f" {word} {layers_text(record)}"
    name = f"{filed_under(record.config)}{where}"
    return " ".join([name, f"seed {record.config['seed']}", *control_words(record)])


def control_words(record: Record) -> list[str]:
    """What makes a control of a method that is none itself: other directions, shuffled labels."""
    dictionary = DICTIONARIES[(record.config.get("sae") or {}).get("dictionary", "sae")]
    shuffled = "shuffled labels" if record.config["task"].get("shuffle_labels") else ""
    return [word for word in (dictionary, shuffled) if word]


def points(lines: list[dict[str, Any]], prefix: str = "") -> list[Point]:
    """Every metric of journal lines, under the journal's own names.

    Undefined ones are left out: MLflow stores NaN as 0 and infinity as the largest number.
    """
    return [
        Point(prefix + name, float(value), line["step"], int(line["time"] * 1000))
        for line in lines
        for name, value in line["metrics"].items()
        if not undefined(value)
    ]


def final_points(result: dict[str, Any], time_ms: int) -> list[Point]:
    """The result's figures: `eval/…`, and `eval_NAME/…` for further test sets and validation.

    Undefined figures (null, or not finite in a result of before) are left out.
    """
    read = Result.read(result)
    values = {"eval/primary": read.figures[read.primary].value}
    if read.kind != STEERING:
        for name, figure in read.figures.items():
            values |= {f"eval/{name}": figure.value}
            values |= {f"eval/{name}_low": figure.low, f"eval/{name}_high": figure.high}
        values["eval/runtime"] = sum(result["seconds"].values())
        return [*_known(values, time_ms), *by_layer_points(read.series, time_ms)]
    values |= _split_values("eval", result)
    values |= _in_points(result)
    values["eval/over_refusal"] = result["over_refusal_steered"]
    values["eval/unique_features"] = result["unique_features"]
    values["eval/left_alone"] = result.get("left_alone")  # not in results of before
    values["eval/runtime"] = sum(result["seconds"].values())
    sets = {**result["test_sets"], "validation": result["validation"]}
    for name, figures in sets.items():
        values |= _split_values(f"eval_{name}", figures)
    return [*_known(values, time_ms), *by_layer_points(read.series, time_ms)]


def _known(values: Mapping[str, float | None], time_ms: int) -> list[Point]:
    """Those that are defined."""
    return [
        Point(name, float(value), 0, time_ms)
        for name, value in values.items()
        if value is not None and not undefined(value)
    ]


def by_layer_points(all_series: Sequence[Series], time_ms: int) -> list[Point]:
    """Series over layers, as MLflow draws them: `by_layer/NAME/METRIC`, the step being the layer.

    MLflow draws no intervals: their ends are series of their own, `…/low` and `…/high`. Undefined
    figures are left out.
    """
    found = []
    for series in all_series:
        for layer, figure in series.by_layer.items():
            ends = {"": figure.value, "/low": figure.low, "/high": figure.high}
            found += [
                Point(f"by_layer/{series.key}{end}", float(value), layer, time_ms)
                for end, value in ends.items()
                if value is not None and not undefined(value)
            ]
    return sorted(found, key=lambda point: (point.name, point.step))


def _in_points(figures: dict[str, Any]) -> dict[str, float | None]:
    """The figures that a report's table has, in its units: percentage points."""
    low, high = figures["delta_ci95"]
    shares = {
        "delta": figures["delta"],
        "delta_low": low,
        "delta_high": high,
        "accuracy": figures["accuracy_steered"],
    }
    return {f"points/{k}": None if v is None else 100 * v for k, v in shares.items()}


def _split_values(prefix: str, figures: dict[str, Any]) -> dict[str, float | None]:
    low, high = figures["delta_ci95"]
    values = {f"{prefix}/{name}": figures[key] for name, key in COMPARED.items()}
    values |= {f"{prefix}/{name}": figures.get(name) for name in QUALITY}
    return {**values, f"{prefix}/delta_low": low, f"{prefix}/delta_high": high}


@dataclass(frozen=True)
class DataSet:
    """The items of a run's splits, as MLflow's data sets are described; `source`, `profile`: JSON.

    digest: content hash of all splits; runs may be compared only where it is equal.
    """

    name: str
    digest: str
    source_type: str
    source: str
    profile: str


def data_set(record: Record) -> DataSet | None:
    """What the run worked with; None where it hasn't got to loading it."""
    facts = read_json(record.path / "data.json")
    if facts is None and record.result is not None:
        facts = {"digest": record.result["data_digest"], "n": {"test": record.result["n"]}}
    if facts is None:
        return None
    task = record.config["task"]
    kind, source = _data_source(task)
    return DataSet(task["name"], facts["digest"], kind, json.dumps(source), json.dumps(facts["n"]))


def _data_source(task: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a task's items come from: kind and description, in MLflow's words."""
    files = task.get("data_files") or task.get("path")
    if files is not None:
        return "local", {"uri": files if isinstance(files, str) else json.dumps(files)}
    if "hub_id" in task:
        names = ("subsets", "revision", "sources")
        return "hugging_face", {"path": task["hub_id"], **{n: task.get(n) for n in names}}
    return "code", {"tags": {"mlflow.source.name": task.get("_target_")}}


def files(folder: Path, patterns: tuple[str, ...]) -> Iterator[tuple[Path, str | None]]:
    """Each file and the artifact folder that it belongs into; hidden ones are left out."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and not path.name.startswith("."):
                inside = str(path.parent.relative_to(folder))
                yield path, None if inside == "." else inside


def read_json(path: Path) -> dict[str, Any] | None:
    return read_our_json(path, AGAIN)

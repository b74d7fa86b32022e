"""What runs are called side by side: the method, and the options that set them apart."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

from crl_exp.records import Record, flatten
from crl_exp.runs import NOT_IN_KEY

NAMES = {
    "none": "unsteered",
    "random": "random features",
    "random_direction": "random directions",
    "top_activation": "most active features",
    "raw_residual": "raw residual",
    "corrsteer_s": "CorrSteer-S",
    "corrsteer_a": "CorrSteer-A",
    "corrsteer_p": "CorrSteer-P",
    "crl": "CRL",
}


def labels(records: list[Record]) -> dict[str, str]:
    """By run key: the method's name, and the options in which runs of the method differ.

    An option's usual value (that of most runs of the method) goes without saying.
    """
    options = {record.key: _options(record) for record in records}
    counts: dict[tuple, Counter[str]] = defaultdict(Counter)
    for mine in options.values():
        for name, value in mine.items():
            counts[_compared_among(name, mine)][json.dumps(value)] += 1
    found = {}
    for record in records:
        mine, parts = options[record.key], []
        for name, value in mine.items():
            (usual, count), *others = counts[_compared_among(name, mine)].most_common(2)
            if others and not (json.dumps(value) == usual and count > others[0][1]):
                parts.append(f"{name}={value}")
        found[record.key] = " ".join([_name(record), *parts])
    return found


def _compared_among(name: str, mine: dict[str, Any]) -> tuple:
    """Runs are compared with those of the same method; a part's keys, with those of that part."""
    part = name.partition(".")[0]
    return name, mine["method"], mine.get(part) if part != name else None


def _name(record: Record) -> str:
    method = record.config["method"]
    name: str = NAMES.get(method["name"]) or method["name"]
    if method.get("stage2") is False:
        name += " without stage 2"
    if str(record.config["layers"].get("_target_")).endswith(".BestOnValidation"):
        name += " at its best layer"
    return f"{name} (shuffled labels)" if record.config["task"].get("shuffle_labels") else name


def _options(record: Record) -> dict[str, Any]:
    """What of a config may set runs of one method apart. A part goes by its class's name."""
    skipped = (*NOT_IN_KEY, "seed", "layers")
    kept = {key: value for key, value in record.config.items() if key not in skipped}
    found = {}
    for key, value in flatten(kept).items():
        if key.endswith("._target_"):
            found[key.removesuffix("._target_")] = str(value).rpartition(".")[2]
        elif key not in ("task.shuffle_labels", "method.stage2"):
            found[key] = value
    return found

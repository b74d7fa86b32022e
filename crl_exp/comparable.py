"""Which runs may stand in one table: those that were asked the same of the same model."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from crl_exp.errors import UserError
from crl_exp.records import Record, flatten

# Keys of the task that don't change what is asked and scored on the test items.
NOT_THE_TEST = (
    "task.shuffle_labels", "task.n_train", "task.n_train_benign", "task.n_validation",
    "task.n_validation_benign", "task.train_seed",
    "task.wording",  # a name; task.question has what it stands for
)  # fmt: skip
# Keys of models that change how they are run, not which they are.
NOT_THE_MODEL = (
    "model.device", "model.attn_implementation", "task.classifier.device",
    "task.classifier.batch_size", "task.cross_encoder.device", "task.cross_encoder.batch_size",
)  # fmt: skip


def refuse_unfinished(records: list[Record]) -> None:
    """Raise `UserError` where no run has a result."""
    if any(record.result is not None for record in records):
        return
    counts = Counter(record.state for record in records)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    raise UserError(
        f"no run of {records[0].sweep} is finished ({states}); launch it again to run what is "
        "missing"
    )


def refuse_unlike(records: list[Record]) -> None:
    """Raise `UserError` where model, task, data, n or scorer differ, naming them all."""
    faults = _asked_differences(records)
    keys = [fault.split(":")[0].strip() for fault in faults]
    by = next((key for key in keys if key.startswith(("model.", "task."))), None)
    faults += _other_data(records)
    if faults:
        apart = f"`--by {by}` reports each kind by itself; or run" if by else "Run"
        raise UserError(
            f"the runs of {records[0].sweep} can't be compared, they differ in\n"
            + "\n".join(faults)
            + f"\n{apart} each kind under its own sweep_name=…, or move the odd ones out of the "
            "folder"
        )


def differences(records: list[Record]) -> list[str]:
    """A line for each thing of model, task, data, n and scorer in which runs differ."""
    return _asked_differences(records) + _other_data(records)


def _asked_differences(records: list[Record]) -> list[str]:
    return _differences({record.key: _asked(record) for record in records})


def _differences(asked: dict[str, dict[str, Any]]) -> list[str]:
    faults = []
    for name in dict.fromkeys(key for values in asked.values() for key in values):
        runs: dict[str, list[str]] = {}
        for key, values in asked.items():
            runs.setdefault(json.dumps(values.get(name)), []).append(key)
        if len(runs) > 1:
            told = [
                f"{value} in {len(keys)} ({', '.join(keys[:3])})" for value, keys in runs.items()
            ]
            faults.append(f"  {name}: {'; '.join(told)}")
    return faults


def _other_data(records: list[Record]) -> list[str]:
    """Where configs ask for the same splits and the items were others (a file was edited, the hub's
    data changed). Other training splits rightly have other items, and are compared."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        assert record.result is not None
        task = flatten({"task": record.config["task"]})
        training = json.dumps([task.get(key) for key in NOT_THE_TEST])
        seen = {"data_digest": record.result["data_digest"]}
        groups.setdefault(training, {})[record.key] = seen
    return [fault for group in groups.values() for fault in _differences(group)]


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

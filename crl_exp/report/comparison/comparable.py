"""Which runs may stand in one table: those that were asked the same of the same model."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.runs.records import Record, flatten

# Keys of the task that don't change what is asked and scored on the test items.
NOT_THE_TEST = (
    "task.shuffle_labels", "task.n_train", "task.n_train_benign", "task.n_validation",
    "task.n_validation_benign", "task.train_seed",
    "task.wording",  # a name; task.question has what it stands for
)  # fmt: skip
# Keys of models that change how they are run, not which they are.
NOT_THE_MODEL = (
    "model.device", "model.device_map", "model.attn_implementation", "task.classifier.device",
    "task.classifier.batch_size", "task.cross_encoder.device", "task.cross_encoder.batch_size",
)  # fmt: skip
CHOSEN_ON = ("fed.train", "fed.validation")
OF_ANSWERS = ("n", "scorer", "test_sets.n")
WHY = {
    "weights": " (hashes of the model's weights: its files were changed between the runs)",
    "fed.": " (hashes of the prompts' tokens: the tokenizer or its chat template was changed "
    "between the runs, or prints the date, see model.chat_template_args)",
}
"""What is said of a difference that no config shows."""


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
    """Raise `UserError` where model, task, data, n or scorer differ, or what no config tells:
    weights and the tokens fed. Names them all."""
    faults = _asked_differences(records)
    keys = [fault.split(":")[0].strip() for fault in faults]
    by = next((key for key in keys if key.startswith(("model.", "task."))), None)
    faults += _other_data(records, faults)
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
    asked = _asked_differences(records)
    return asked + _other_data(records, asked)


def _asked_differences(records: list[Record]) -> list[str]:
    asked = {run: _asked(record) for run, record in _named(records).items()}
    # What an analysis doesn't say, as it answers no test set, is no difference.
    said = {key: value for values in reversed(asked.values()) for key, value in values.items()}
    return _differences({
        run: {**{key: said[key] for key in OF_ANSWERS if key in said}, **values}
        for run, values in asked.items()
    })  # fmt: skip


def _named(records: list[Record]) -> dict[str, Record]:
    """By key; where runs of several sweeps have the same one by sweep and key, or by folder."""
    runs = list({record.path.absolute(): record for record in records}.values())
    names = [[run.key, f"{run.sweep}/{run.key}", str(run.path)] for run in runs]
    times = Counter(name for own in names for name in own)
    return {
        next((name for name in own if times[name] == 1), own[-1]): run
        for own, run in zip(names, runs, strict=True)
    }


def _differences(asked: dict[str, dict[str, Any]]) -> list[str]:
    """asked: by run; what a run doesn't say is taken for null."""
    faults = []
    for name in dict.fromkeys(key for values in asked.values() for key in values):
        runs: dict[str, list[str]] = {}
        for key, values in asked.items():
            runs.setdefault(json.dumps(values.get(name)), []).append(key)
        if len(runs) > 1:
            told = [
                f"{value} in {len(keys)} ({', '.join(keys[:3])})" for value, keys in runs.items()
            ]
            why = next((text for key, text in WHY.items() if name.startswith(key)), "")
            faults.append(f"  {name}: {'; '.join(told)}{why}")
    return faults


def _other_data(records: list[Record], asked: list[str]) -> list[str]:
    """Where configs ask for the same and it was other (a file, a template or weights were edited
    between the runs, the hub's data changed). Other training splits rightly have other items, and
    labels that another seed shuffled are others; both are compared.

    asked: lines on what configs ask for. Another model has other weights, and reads other tokens.
    """
    differ = {line.split(".")[0].strip() for line in asked}
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    everywhere: dict[str, dict[str, Any]] = {}
    for run, record in _named(records).items():
        assert record.result is not None
        task = flatten({"task": record.config["task"]})
        shuffled_by = record.config["seed"] if task.get("task.shuffle_labels") else None
        training = json.dumps([shuffled_by, *(task.get(key) for key in NOT_THE_TEST)])
        fed = {} if differ & {"model", "task"} else record.result.get("fed", {})
        fed = {f"fed.{split}": ids for split, ids in fed.items()}
        chosen_on = {name: fed.pop(name) for name in CHOSEN_ON if name in fed}
        seen = {"data_digest": record.result["data_digest"], **chosen_on}
        groups.setdefault(training, {})[run] = seen
        weights = None if "model" in differ else record.result.get("weights")
        everywhere[run] = {"weights": weights, **fed}
    found = [fault for group in groups.values() for fault in _told_differences(group)]
    return found + _told_differences(everywhere)


def _told_differences(seen: dict[str, dict[str, Any]]) -> list[str]:
    """As `_differences`, of each thing among the runs that say it: earlier results may not."""
    faults = []
    for name in dict.fromkeys(key for values in seen.values() for key in values):
        told = {run: {name: v[name]} for run, v in seen.items() if v.get(name) is not None}
        faults += _differences(told)
    return faults


def _asked(record: Record) -> dict[str, Any]:
    assert record.result is not None
    sections = {"model": record.config["model"], "task": record.config["task"]}
    skipped = (*NOT_THE_TEST, *NOT_THE_MODEL)
    kept = {key: value for key, value in flatten(sections).items() if key not in skipped}
    if not record.steers:
        return kept
    sizes = {name: figures["n"] for name, figures in record.result["test_sets"].items()}
    return {
        **kept,
        "n": record.result["n"],
        "scorer": record.result["scorer"],
        "test_sets.n": sizes,
    }

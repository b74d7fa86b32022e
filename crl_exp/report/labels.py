"""What runs are called side by side: the method, and the options that set them apart, as typed."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crl_exp.config.compatibility import ADDED, as_compared, inert, mended_since
from crl_exp.config.keys import NOT_IN_KEY, content_key, filed_under
from crl_exp.config.option_names import DICTIONARIES, option_names, typed
from crl_exp.runs.records import Record, flatten

# Results say so themselves (`label`); here for the order of rows, and for results of before.
NAMES = {
    "none": "unsteered",
    "random": "random features",
    "random_direction": "random directions",
    "top_activation": "most active features",
    "raw_residual": "raw residual",
    "corrsteer_s": "CorrSteer-S",
    "corrsteer_a": "CorrSteer-A",
    "corrsteer_p": "CorrSteer-P",
    "attribution": "attribution",
    "listed": "listed features",
    "crl": "CRL",
    "crl_published": "CRL as published",
    "prompting": "prompting",
    "calibration": "bias on the answer",
    "bag_of_words": "bag of words (no model)",
    "probe": "linear probe (reads only)",
    "probe_steering": "probe that steers",
    "lora": "LoRA",
}
# Said in the method's name.
IN_THE_NAME = ("task.shuffle_labels", "method.stage2", "method.name", "sae.dictionary")
SWITCHES = {f"{added.section}.{added.key}" for added in ADDED if added.meant is False}
"""Off, they are what every run was before there were such: a plain name is a run's without them."""
# Draws of training items are put together; the others follow from what was typed.
NEVER_SAID = ("task.train_seed", "task.documents", "task.choice_prefix")
Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Label:
    """name: the method's. said: the options that set it apart from the method's other runs.
    settings: each option in which the method's runs differ, said or not. Both as (key, value)."""

    name: str
    said: Settings
    settings: Settings

    @property
    def options(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.said)

    @property
    def text(self) -> str:
        return f"{self.name} {self.options}".rstrip()


def labels(records: list[Record]) -> dict[str, Label]:
    """By run key. An option goes without saying where more than half of the method's runs have it,
    a switch of `SWITCHES` where it is off, and one that does nothing in a run (`inert`) there.

    A part (`decay=exponential`) is said even then where one of its own keys (`decay.gamma`) has no
    such usual value.
    """
    options = options_of(records)
    for record in records:
        for name in inert(record.config):
            options[record.key].pop(name, None)
    counts: dict[tuple, Counter[str]] = defaultdict(Counter)
    for mine in options.values():
        for name, value in mine.items():
            counts[_compared_among(name, mine)][json.dumps(value)] += 1
    found = {}
    for record in records:
        mine = options[record.key]
        seen = {name: counts[_compared_among(name, mine)] for name in mine}
        differ = [name for name in mine if len(seen[name]) > 1]
        usual = {name: _usual(name, seen[name]) for name in differ}
        settled = {part for part in differ if usual[part]}
        unsettled = {n.partition(".")[0] for n in differ if "." in n and not usual[n]}
        said = [
            name
            for name in differ
            if json.dumps(mine[name]) != usual[name] or name in settled & unsettled
        ]
        found[record.key] = Label(
            _name(record),
            tuple((name, typed(mine[name])) for name in said),
            tuple((name, typed(mine[name])) for name in differ),
        )
    return found


def _usual(name: str, counts: Counter[str]) -> str | None:
    """The value of more than half of the runs; of a switch: off, where any run has it so."""
    off = json.dumps(False)
    if name in SWITCHES and off in counts:
        return off
    (value, count) = counts.most_common(1)[0]
    return value if 2 * count > counts.total() else None


def _compared_among(name: str, mine: dict[str, Any]) -> tuple:
    """Runs are compared with those of the same method; a part's keys, with those of that part."""
    part = name.partition(".")[0]
    return name, mine["method"], mine.get(part) if part != name else None


def _name(record: Record) -> str:
    method = record.config.get("method") or {}  # an analysis has none
    filed = filed_under(record.config)
    name: str = (record.result or {}).get("label") or NAMES.get(filed) or filed
    if method.get("stage2") is False:
        name += " without stage 2"
    if record.chose_layer:
        name += " at its best layer"
    said = [
        DICTIONARIES[(record.config.get("sae") or {}).get("dictionary", "sae")],
        "shuffled labels" if record.config["task"].get("shuffle_labels") else "",
        *[f"before “{name}”" for name in mended_since(*_identity(record))],
    ]
    return f"{name} ({', '.join(filter(None, said))})" if any(said) else name


def _identity(record: Record) -> tuple[dict[str, Any], str, Callable[[Any], str]]:
    """What `mended_since` asks: results of before a fault was mended are rows of their own."""
    plain = {k: v for k, v in record.config.items() if k not in NOT_IN_KEY}
    return plain, record.key, content_key


def options_of(
    records: list[Record], leave_out: tuple[str, ...] = IN_THE_NAME
) -> dict[str, dict[str, Any]]:
    """By run key: what of a config may set runs of one method apart. A part goes by its name."""
    skipped = (*NOT_IN_KEY, "seed", "layers")
    kept = {
        record.key: {k: v for k, v in as_compared(record.config).items() if k not in skipped}
        for record in records
    }
    parts = option_names(list(kept.values()))
    found: dict[str, dict[str, Any]] = {}
    for (key, sections), names in zip(kept.items(), parts, strict=True):
        values = {
            name: value
            for name, value in flatten(sections).items()
            if not name.endswith("_target_")
            and name not in (*leave_out, "method.name", "experiment.name", *NEVER_SAID)
        }
        found[key] = {"method": filed_under(sections), **names, **values}
    return found

"""How runs put their questions, in short: what a report sets prompts side by side by.

Runs that were asked differently are compared within a wording only: the unsteered model isn't the
same under each.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from crl_exp.config.option_names import typed

TEXTS = ("task.question", "task.template", "task.instruction", "task.question_template")
FORMS = ("task.n_shots", "task.shots_from", "task.chat_template")
"""Keys of the prompt: texts, and how they are put."""
NAME = "task.wording"
CHARS = 40

Flat = Mapping[str, Any]
"""A config, keys joined by dots (`records.flatten`)."""


def wordings(configs: Mapping[str, Flat]) -> dict[str, str]:
    """By run key: what sets a run's prompts apart from those of other runs of its task.

    The wording's name where it has one that stands for one text, else the text's beginning; nothing
    where the task's runs were all asked alike.
    """
    by_task: dict[Any, list[str]] = defaultdict(list)
    for key, config in configs.items():
        by_task[config.get("task.name")].append(key)
    found: dict[str, str] = {}
    for keys in by_task.values():
        found |= _of_one_task({key: configs[key] for key in keys})
    return found


def _of_one_task(configs: Mapping[str, Flat]) -> dict[str, str]:
    differ = [
        name
        for name in (*TEXTS, *FORMS)
        if len({json.dumps(config.get(name)) for config in configs.values()}) > 1
    ]
    asked = {key: tuple(json.dumps(c.get(name)) for name in differ) for key, c in configs.items()}
    texts = {key: tuple(json.dumps(c.get(name)) for name in TEXTS) for key, c in configs.items()}
    stands_for: dict[Any, set] = defaultdict(set)
    for key, config in configs.items():
        stands_for[config.get(NAME)].add(texts[key])
    names: dict[tuple[str, ...], str] = {}
    for key, config in configs.items():
        if differ and asked[key] not in names:
            named = bool(config.get(NAME)) and len(stands_for[config[NAME]]) == 1
            names[asked[key]] = _not_yet(_name(config, differ, named), names.values())
    return {key: names.get(asked[key], "") for key in configs}


def _name(config: Flat, differ: list[str], named: bool) -> str:
    parts = []
    if any(name in TEXTS for name in differ):
        texts = [str(config.get(name)) for name in differ if name in TEXTS]
        parts.append(str(config[NAME]) if named else " / ".join(map(_short, texts)))
    parts += [
        f"{name.split('.')[-1]}={typed(config.get(name))}" for name in differ if name in FORMS
    ]
    return ", ".join(parts)


def _not_yet(name: str, taken: Collection[str]) -> str:
    """Texts that begin alike are numbered."""
    number, made = 1, name
    while made in taken:
        number += 1
        made = f"{name} ({number})"
    return made


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= CHARS else line[: CHARS - 1].rstrip() + "…"

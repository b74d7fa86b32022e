"""Option names, as they are typed, of the sections of a frozen config: `activation=jumprelu`."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

from crl_exp.config.paths import REPO
from crl_exp.config.plain_configs import read_yaml

CONF = REPO / "conf"
DICTIONARIES = {"sae": "", "random": "random dictionary", "permuted": "permuted dictionary"}
"""What `sae.dictionary` may be, and what a report calls a method with it."""
# A file of this name switches its group off; a section is never called so unless it says just that.
OFF = "none"


def option_names(configs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For each config, by group with a `_target_`: the name of its file in `conf/`.

    Of several files of one class the one that agrees in most values is named. Where there is none
    (a class of the user's own), the class.
    """
    return [
        {
            group: option_name(group, section)
            for group, section in config.items()
            if isinstance(section, dict) and "_target_" in section and group != "method"
        }
        for config in configs
    ]


def option_name(group: str, section: dict[str, Any]) -> str:
    target = str(section["_target_"])
    cls = target.rpartition(".")[2]
    files = {name: values for name, values in _files(group) if values.get("_target_") == target}

    def agreeing(name: str) -> tuple[int, float]:
        same = sum(section.get(key) == value for key, value in files[name].items())
        return same, difflib.SequenceMatcher(None, name, cls.lower()).ratio()

    exact = [
        name
        for name, values in files.items()
        if all(section.get(key) == value for key, value in values.items())
    ]
    known = exact or [name for name in files if name != OFF]
    return max(known, key=agreeing) if known else cls


@cache
def _files(group: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    return tuple((path.stem, _values(path)) for path in sorted((CONF / group).glob("*.yaml")))


def _values(path: Path) -> dict[str, Any]:
    """What a file sets, without references to other keys, which a frozen config has resolved."""
    node = read_yaml(path)
    assert isinstance(node, dict)
    return {
        str(key): value
        for key, value in node.items()
        if key != "defaults" and "${" not in str(value) and value != "???"
    }


def typed(value: Any) -> str:
    """A value as it is typed on the command line: `null`, `true`, `[8,12]`, `0.5`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(typed, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{typed(item)}" for key, item in value.items()) + "}"
    return str(value)

"""Values as Hydra's command line reads them back: a text with a comma stays one text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

FUNCTION = re.compile(
    r"\s*(range|interval|choice|glob|shuffle|sort|tag|int|float|str|bool|json_str|extend_list)\(.*\)\s*",
    re.DOTALL,
)
"""Hydra's own functions (`seed: range(0,5)`): meant as such where they are the whole value."""


def as_override(value: Any) -> str:
    """What stands behind `KEY=` for this value of a YAML file.

    A text that Hydra would read as something else than itself (several values, a number that is
    written otherwise, a truth value, quotes fewer, a fault) is quoted. Other numbers, lists,
    mappings and Hydra's functions that are written as text are read as on the command line.
    """
    if isinstance(value, str):
        return value if FUNCTION.fullmatch(value) or _reads_back(value) else quoted(value)
    return _plain(value)


def quoted(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(_plain, value)) + "]"
    return str(value)


@cache
def _reads_back(text: str) -> bool:
    """Whether Hydra reads one value there, and of a text the text itself."""
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return False
    if override.is_sweep_override():
        return False
    value = override.value()
    if isinstance(value, (bool, int, float)):  # 1e5, 2024_11_29, true: as text it is another one
        return str(value) == text
    return value == text if isinstance(value, str) else True

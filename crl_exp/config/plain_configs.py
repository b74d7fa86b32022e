"""Frozen configs read as plain dicts, for commands over many runs.

OmegaConf takes 60 ms for a config, and most sections are the same in all runs of a sweep. Here each
section's text is parsed once for a process, by libyaml. What isn't written as `keys.freeze` writes
it is left to OmegaConf, so that results and errors are always its own.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from crl_exp.config import compatibility
from crl_exp.config.keys import read_config

SECTION = re.compile(r"[A-Za-z_]\w*:(?=[ \n])")
"""How a line that begins a section begins. Lines of one that goes on begin with a space or `-`."""


class _OtherwiseWrittenError(Exception):
    """A config that OmegaConf has to read."""


def filled_config(path: Path) -> dict[str, Any]:
    """A config as it was frozen, with what `compatibility.fill_missing` gives it.

    Whoever gets it doesn't change what lies in its sections: other configs may share it. Raises
    `UserError` for a damaged file.
    """
    try:
        return _quickly(path.read_bytes().decode())
    except (OSError, ValueError, _OtherwiseWrittenError):
        config = read_config(path)
        compatibility.fill_missing(config)
        plain = OmegaConf.to_container(config)
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}


def read_yaml(path: Path) -> Any:
    """What a YAML file of ours holds, references to other keys as they are written."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())


def _quickly(text: str) -> dict[str, Any]:
    parts = _sections(text)
    found = dict(map(_section, parts))
    if len(found) < len(parts):
        raise _OtherwiseWrittenError("a section comes twice")
    if found.get("experiment") in (None, "???"):
        found["experiment"] = dict(compatibility.STEERING)
    return found


def _sections(text: str) -> list[str]:
    """The text of each section. Each is whole YAML by itself, or else `_section` refuses it."""
    parts: list[str] = []
    for line in re.split(r"(?<=\n)", text):
        if SECTION.match(line):
            parts.append(line)
        elif parts:
            parts[-1] += line
        else:
            raise _OtherwiseWrittenError("it doesn't begin with a section")
    if not parts:
        raise _OtherwiseWrittenError("it is empty")
    return parts


@lru_cache(maxsize=4096)
def _section(text: str) -> tuple[str, Any]:
    if "${" in text:
        raise _OtherwiseWrittenError("it refers to another key")
    try:
        read = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise _OtherwiseWrittenError(str(error)) from error
    if not isinstance(read, dict) or len(read) != 1 or not _is_plain(read):
        raise _OtherwiseWrittenError("it isn't one section of plain values")
    ((name, value),) = read.items()
    return name, compatibility.filled_section(name, value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(of) for key, of in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


@cache
def _loader() -> Any:
    """OmegaConf's own (1e5 is a number, a date is text, no key comes twice), over libyaml where
    PyYAML was built with it."""
    theirs = get_yaml_loader()
    if not hasattr(yaml, "CSafeLoader"):
        return theirs
    from yaml import cyaml

    parser: Any = cyaml.CParser  # type: ignore[attr-defined]

    class Loader(parser, theirs):
        def __init__(self, stream: Any):
            parser.__init__(self, stream)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    return Loader

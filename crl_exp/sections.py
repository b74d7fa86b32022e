"""A section of the config made into the object that it describes, every value checked."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crl_exp.errors import UserError, did_you_mean
from crl_exp.runs import content_key

PACKAGE = "crl_exp."
Known = dict[str, Any]
"""What was found out for one point of a sweep, by content, for the others."""


def build(node: DictConfig, where: str, base: type) -> Any:
    """Make the object that a section's `_target_` names, its values checked against its fields.

    Raises `UserError` for a class outside this package or of the wrong kind, an unknown or missing
    key (with the nearest right names), and a value of the wrong type.
    """
    target = str(node.get("_target_", ""))
    module, _, name = target.rpartition(".")
    if not target.startswith(PACKAGE):
        raise UserError(
            f"{where}._target_={target or 'missing'}: must name a class of crl_exp; "
            f"choose an option of the group instead ({where}=NAME)"
        )
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where}._target_={target}: no such class ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"{where}._target_={target}: is not a {base.__name__}")
    return fill(node, where, cls)


def fill(node: DictConfig, where: str, cls: type) -> Any:
    """Make a dataclass from a section, checked. Raises `UserError` as `build` does."""
    known = [f.name for f in fields(cls)]
    given = [str(key) for key in node if key != "_target_"]
    faults = [
        f"{where}.{key}: {cls.__name__} has no such key{did_you_mean(key, known)}"
        for key in given
        if key not in known
    ]
    faults += [
        f"{where}.{key} is missing; set {where}.{key}=…"
        for key in known
        if key not in given or OmegaConf.is_missing(node, key)
    ]
    if faults:
        raise UserError("\n".join(faults))
    values = {key: node[key] for key in known}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except OmegaConfBaseException as error:
        key = f"{where}.{error.full_key}" if error.full_key else where
        raise UserError(f"{key}: {error.msg or error}".splitlines()[0]) from error


def once(known: Known | None, of: Any, find: Callable[[], Any]) -> Any:
    """What `find` returns, asked once for equal `of` where something is known at all."""
    if known is None:
        return find()
    key = content_key(of)
    if key not in known:
        known[key] = find()
    return known[key]

"""A section of the config made into the object that it describes, every value checked."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crl_exp.config import own_code
from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.files import content_key

PACKAGE = "crl_exp."
LARGEST = 1e9
LARGEST_WHOLE = 2**63 - 1
"""One less than 64 bits hold: a seed's successor is used too."""
SANE = f"must be finite and from -{LARGEST:g} to {LARGEST:g}"
Known = dict[str, Any]
"""What was found out for one point of a sweep, by content, for the others."""


def build(node: DictConfig, where: str, base: type) -> Any:
    """Make the object that a section's `_target_` names, its values checked against its fields.

    Raises `UserError` for a class that is neither this package's nor in a folder of `own_code`, or
    of the wrong kind, an unknown or missing key (with the nearest right names), and a value of the
    wrong type.
    """
    return fill(node, where, target_class(str(node.get("_target_", "")), where, base))


def target_class(target: str, where: str, base: type) -> type:
    """The class that a section's `_target_` names. Raises `UserError` as `build` does."""
    module, _, name = target.rpartition(".")
    key = f"{where}._target_={target}"
    if not target.startswith(PACKAGE):
        if not own_code.holds(module):
            raise UserError(
                f"{where}._target_={target or 'missing'}: must name a class of crl_exp, or of a "
                "module beside YAML files of your own (--config-dir) or in a folder of own_code; "
                f"choose an option of the group instead ({where}=NAME)"
            )
        return _of_kind(own_code.loaded(target, key), key, where, base)
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}: no such class ({error})") from error
    return _of_kind(cls, key, where, base)


def _of_kind(cls: Any, key: str, where: str, base: type) -> type:
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"{key}: is not a {base.__name__}")
    if left := [name for name in dir(cls) if _is_open(getattr(cls, name, None))]:
        raise UserError(
            f"{key}: is a base for others, which leaves {', '.join(left)} to "
            f"them; choose an option of the group instead ({where}=NAME)"
        )
    return cls


def _is_open(attribute: Any) -> bool:
    """Whether it is a method or property that a subclass has to give (`abc.abstractmethod`)."""
    return bool(getattr(attribute, "__isabstractmethod__", False))


def fill(node: DictConfig, where: str, cls: type) -> Any:
    """Make a dataclass from a section, checked. Raises `UserError` as `build` does."""
    known = [f.name for f in fields(cls) if f.init]
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
        merged = OmegaConf.merge(OmegaConf.structured(cls), values)
        if faults := list(number_faults(where, OmegaConf.to_container(merged, resolve=True))):
            raise UserError("\n".join(faults))
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = f"{where}.{error.full_key}" if error.full_key else where
        raise UserError(f"{key}: {error.msg or error}".splitlines()[0]) from error


def number_faults(where: str, value: Any) -> Iterator[str]:
    """A fault for each number in a section that no option can mean: one that isn't finite, is past
    `LARGEST`, or, where it is whole, doesn't fit into 64 bits."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from number_faults(f"{where}.{key}", one)
    elif isinstance(value, list):
        # Named by the whole list: that is what is typed again.
        if any(True for one in value for _ in number_faults(where, one)):
            yield f"{where}={value}: {SANE}"
    elif isinstance(value, float) and not abs(value) <= LARGEST:
        yield f"{where}={value}: {SANE}"
    elif isinstance(value, int) and not abs(value) < LARGEST_WHOLE:
        yield f"{where}={value}: must be a whole number below 2^63"


def once(known: Known | None, of: Any, find: Callable[[], Any]) -> Any:
    """What `find` returns, asked once for equal `of` where something is known at all. So is the
    `UserError` that it raises: without a network the hub says no after half a minute."""
    if known is None:
        return find()
    key = content_key(of)
    if key not in known:
        try:
            known[key] = find()
        except UserError as error:
            known[key] = error
    if isinstance(found := known[key], UserError):
        raise found.with_traceback(None)
    return found

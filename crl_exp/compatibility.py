"""What a config of an earlier version means now: options added since, and what was mended.

The rule, for every version from now on: an option that equals what meant the earlier behaviour
isn't hashed into the run key, and a missing one is filled with that value. So finished runs keep
their keys when an option is added, and a config frozen earlier runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict


class Added(NamedTuple):
    """An option that earlier versions didn't have.

    section: of the config. target: end of the section's `_target_` (`CRL`), or "" where every class
    of the section has the key. meant: the value that does what earlier versions did.
    """

    section: str
    target: str
    key: str
    meant: Any


ADDED: tuple[Added, ...] = (
    Added("task", "", "train_seed", None),
    Added("task", "", "groups", None),
)
"""In the order in which they came. Add a line with each new option; never change one."""


class Mended(NamedTuple):
    """A fault that was mended: results of the configs concerned aren't those of before.

    name: hashed into the run key of those configs, so that a result of before doesn't pass for one
    of now. concerns: whether a resolved config is one of them.
    """

    name: str
    concerns: Callable[[dict[str, Any]], bool]


MENDED: tuple[Mended, ...] = ()


def fill_missing(config: DictConfig) -> None:
    """Give each option that came later, where it is missing, the value that meant what was."""
    with open_dict(config):
        for added in ADDED:
            section = config.get(added.section)
            if not isinstance(section, DictConfig) or not _is_of(section.get("_target_"), added):
                continue
            if added.key not in section or OmegaConf.is_missing(section, added.key):
                section[added.key] = added.meant


def hashed(plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved config as its run key sees it: without what means the earlier behaviour."""
    kept = {k: dict(v) if isinstance(v, dict) else v for k, v in plain.items()}
    for added in ADDED:
        section = kept.get(added.section)
        if not isinstance(section, dict) or not _is_of(section.get("_target_"), added):
            continue
        if section.get(added.key, added.meant) in (added.meant, "???"):
            section.pop(added.key, None)
    mended = sorted(m.name for m in MENDED if m.concerns(plain))
    return {**kept, "mended": mended} if mended else kept


def _is_of(target: Any, added: Added) -> bool:
    return not added.target or str(target or "").endswith(f".{added.target}")

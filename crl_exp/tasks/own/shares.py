"""Sizes of splits given as shares of a file, or not at all, made into numbers of items.

A share is of all items that are drawn from. What is left out gets what the others leave, in the
ratio 60 : 15 : 25. Numbers are rounded down; of sizes left out, the first takes what is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from crl_exp.config.errors import UserError

LEFT_OUT = {"n_train": 60, "n_validation": 15, "n_test": 25}
"""Percentages of a file where no size is given."""


def is_open(section: Mapping[str, Any]) -> bool:
    """Whether a size is to be found from the file: a share, or left out."""
    return any(name in section and _is_open(section[name]) for name in LEFT_OUT)


def _is_open(size: Any) -> bool:
    return size is None or isinstance(size, float)


def numbers(section: Mapping[str, Any], n_items: int, where: str) -> dict[str, int]:
    """The three sizes in items. where: the file, as messages name it.

    Raises `UserError` for a share that is none, and where the file is too small for all three.
    """
    given = {name: section[name] for name in LEFT_OUT}
    faults = [
        f"task.{name}={size}: a share must be over 0 and under 1; a number of items is written "
        f"without a point (task.{name}=100)"
        for name, size in given.items()
        if isinstance(size, float) and not 0 < size < 1
    ]
    if faults:
        raise UserError("\n".join(faults))
    found = {
        # As it is typed: .29 of 100 are 29, which binary fractions make 28.
        name: int(Decimal(str(size)) * n_items) if isinstance(size, float) else size
        for name, size in given.items()
        if size is not None
    }
    open_ones = [name for name in LEFT_OUT if given[name] is None]
    left, whole = n_items - sum(found.values()), sum(LEFT_OUT[name] for name in open_ones)
    for name in open_ones:
        found[name] = left * LEFT_OUT[name] // whole
    if open_ones:
        found[open_ones[0]] += left - sum(found[name] for name in open_ones)
    if min(found.values()) < 1 or sum(found.values()) > n_items:
        asked = ", ".join(f"task.{n}={'null' if given[n] is None else given[n]}" for n in LEFT_OUT)
        made = ", ".join(f"{found[name]} for {name}" for name in LEFT_OUT)
        raise UserError(
            f"{where} has {n_items} items, of which {asked} would make {made}: each split needs "
            "one or more, and together they can't have more than there are; give numbers, or a "
            "longer file"
        )
    return {name: found[name] for name in LEFT_OUT}

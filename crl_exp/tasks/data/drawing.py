"""How splits are drawn: by seed and the items' own ids, the same wherever the data lies."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.tasks.data.items import Item


class Identified(Protocol):
    """An item, or what one is made from."""

    @property
    def item_id(self) -> str: ...

    @property
    def group(self) -> str: ...


Kind = TypeVar("Kind", bound=Identified)


def content_id(text: str) -> str:
    """Stable id of an item from its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def unique(items: Sequence[Kind]) -> list[Kind]:
    """Items without repeated ids, first occurrence kept."""
    first: dict[str, Kind] = {}
    for item in items:
        first.setdefault(item.item_id, item)
    return list(first.values())


def shuffled(items: Sequence[Kind], seed: int) -> list[Kind]:
    """Items in an order that depends on the seed and their ids alone, not on the order given."""
    order = sorted(items, key=lambda item: item.item_id)
    random.Random(seed).shuffle(order)
    return order


def of_groups(items: Sequence[Kind], groups: Sequence[str] | None, where: str) -> list[Kind]:
    """Those of the groups asked for. Raises `UserError` for a group that no item is of."""
    if groups is None:
        return list(items)
    there = sorted({item.group for item in items} - {""})
    for group in groups:
        if group not in there:
            known = f"it has {', '.join(there)}" if there else "its items are in no groups"
            raise UserError(
                f"task.groups: {where} has no group {group!r}{did_you_mean(group, there)} ({known})"
            )
    if not groups:
        raise UserError("task.groups=[]: name groups, or set task.groups=null for all items")
    return [item for item in items if item.group in groups]


def split_items(
    items: Sequence[Item],
    sizes: dict[str, int],
    seed: int,
    where: str,
    train_seed: int | None = None,
) -> tuple[tuple[Item, ...], tuple[Item, ...], tuple[Item, ...]]:
    """Shuffle `items` by seed and cut them into parts: train, validation, test.

    The test part is cut first, then validation, then train, so that changing `n_train` leaves the
    other two as they were. train_seed: shuffles what is left for train once more. Raises
    `UserError` where the sizes exceed the data.
    """
    wanted = sum(sizes.values())
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"task.n_{name}={size}: a split needs at least one item")
    if wanted > len(items):
        left = len(items) - wanted + sizes["train"]
        fits = f": task.n_train={left} fits" if left > 0 else ""
        raise UserError(
            f"{where} has {len(items)} items, but task.n_train + task.n_validation + task.n_test "
            f"= {wanted}; lower one of them (task.n_train={sizes['train']} at present){fits}"
        )
    order = shuffled(items, seed)
    n_test, n_validation = sizes["test"], sizes["validation"]
    cut = n_test + n_validation
    rest = order[cut:] if train_seed is None else shuffled(order[cut:], train_seed)
    return (
        tuple(rest[: sizes["train"]]),
        tuple(order[n_test:cut]),
        tuple(order[:n_test]),
    )


def permute_labels(items: tuple[Item, ...], seed: str) -> tuple[Item, ...]:
    """Labels change places among items with as many options, so that each stays one of them. They
    are the targets or, where no item has one, whether an item is benign.

    Among the items of each true label every label becomes as frequent as in all: a permutation
    drawn without this agrees with the truth a little too often or too rarely, by chance, and what
    is selected on it then gains or loses by more than chance.
    """
    label = "target" if any(item.target is not None for item in items) else "benign"
    if label == "benign" and len({item.benign for item in items}) < 2:
        raise UserError(
            "task.shuffle_labels=true needs a task whose items carry a target, or whose training "
            "and validation items are partly benign (task=refusal with task.n_train_benign and "
            "task.n_validation_benign of at least 1, task=xstest)"
        )
    draw = random.Random(seed)
    permuted = list(items)
    for n_options in sorted({item.n_options for item in items}):
        places = [i for i, item in enumerate(items) if item.n_options == n_options]
        draw.shuffle(places)
        places.sort(key=lambda i: str(getattr(items[i], label)))
        labels = _spread([getattr(items[i], label) for i in places])
        for i, other in zip(places, labels, strict=True):
            permuted[i] = replace(items[i], **{label: other})
    return tuple(permuted)


def _spread(labels: list[Any]) -> list[Any]:
    """These, sorted, in an order in which each stretch holds every label in proportion."""
    n = len(labels)
    step = round(0.618 * n)  # near the golden section, multiples are spread most evenly
    while math.gcd(step, n) > 1:
        step += 1
    return [labels[at * step % n] for at in range(n)]

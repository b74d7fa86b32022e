"""What a task hands out: items in disjoint splits, and the scores of their answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from crl_exp.config.errors import UserError


@dataclass(frozen=True)
class Item:
    """One question. `item_id` is a hash of the content: the same wherever the item lies.

    n_options: how many lettered options the question has; 0 where it has none.
    group: a subject, a subset, a category, by which results are told apart; "" where it has none.
    row: what else an answer is scored by, as JSON: a line of the user's file; "" where nothing.
    options: the texts that its answer is one of, where items have options of their own; then the
        target is the position of the right one, written as a number.
    """

    item_id: str
    user: str
    target: str | None = None
    benign: bool = False
    n_options: int = 0
    group: str = ""
    row: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """`reward` in [0, 1]; `valid` is false where the answer could not be read as one."""

    reward: float
    valid: bool = True


@dataclass(frozen=True)
class Splits:
    """Disjoint item sets. `extra` holds further test sets by name, never trained or selected on.

    shared: what all prompts hold besides their items (few-shot examples).
    warnings: what was found in the data and belongs into the result.
    """

    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    extra: dict[str, tuple[Item, ...]] = field(default_factory=dict)
    shared: str = ""
    warnings: tuple[str, ...] = ()

    def named(self) -> dict[str, tuple[Item, ...]]:
        return {
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
            **self.extra,
        }

    def check_disjoint(self) -> None:
        """Raise `UserError` where two splits share an item, one is empty or has an id twice."""
        seen: dict[str, str] = {}
        for name, items in self.named().items():
            if not items:
                raise UserError(
                    f"the {name} split of this task is empty; raise task.n_{name} or give more data"
                )
            twice = len(items) - len({item.item_id for item in items})
            if twice:
                raise UserError(
                    f"{twice} of the {len(items)} items of {name} have an id that another one of "
                    "them has: runs are paired by it. Leave out what comes twice (`unique` in "
                    "crl_exp/tasks/base.py does), or give each item an id of its own"
                )
            for item in items:
                other = seen.setdefault(item.item_id, name)
                if other != name:
                    raise UserError(f"item {item.item_id} is in both {other} and {name}")

    def digest(self) -> str:
        """Content hash of every split: two runs may be compared only where it is equal."""
        lines = [
            f"{name}:{i.item_id}:{i.target}" for name, items in self.named().items() for i in items
        ]
        if self.shared:
            lines.append(self.shared)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def asked(self) -> str:
        """Content hash of every split with what its answers are scored by: besides the targets
        whether an item is benign, and with that to be answered or refused, and its row."""
        lines = [
            f"{name}:{i.item_id}:{i.target}:{i.benign}{f':{i.row}' if i.row else ''}"
            for name, items in self.named().items()
            for i in items
        ]
        return hashlib.sha256("\n".join([*lines, self.shared]).encode()).hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """As in a run's data.json: what the splits are known by, and their sizes."""
        sizes = {name: len(items) for name, items in self.named().items()}
        found = {"digest": self.digest(), "asked": self.asked(), "n": sizes}
        of = [f"{i.item_id}:{i.group}" for items in self.named().values() for i in items if i.group]
        if of:  # tables by group hang on it, and no score
            found["groups"] = hashlib.sha256("\n".join(of).encode()).hexdigest()[:16]
        return found

"""What a task is: items in disjoint splits, a prompt for each, a score for each answer.

A task is a dataclass whose fields are the keys of its YAML file in `conf/task/`. It never sees a
model or a tokenizer: it hands out user turns (`Item.user`) and scores strings.
"""

from __future__ import annotations

import hashlib
import math
import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from crl_exp.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Item:
    """One question. `item_id` is a hash of the content: the same wherever the item lies.

    n_options: how many lettered options the question has; 0 where it has none.
    group: a subject, a subset, a category, by which results are told apart; "" where it has none.
    """

    item_id: str
    user: str
    target: str | None = None
    benign: bool = False
    n_options: int = 0
    group: str = ""


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
        whether an item is benign, and with that to be answered or refused."""
        lines = [
            f"{name}:{i.item_id}:{i.target}:{i.benign}"
            for name, items in self.named().items()
            for i in items
        ]
        return hashlib.sha256("\n".join([*lines, self.shared]).encode()).hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """As in a run's data.json: what the splits are known by, and their sizes."""
        sizes = {name: len(items) for name, items in self.named().items()}
        return {"digest": self.digest(), "asked": self.asked(), "n": sizes}


@dataclass
class Task:
    """Base of all tasks.

    name: what results are filed under.
    n_train, n_validation, n_test: items drawn for each split, from `split_seed`.
    train_seed: draws the training items anew from all that are in neither validation nor test,
        which stay as they are; null, as `split_seed` has them.
    groups: only items of these groups, in all three splits; null for all. Which there are, the
        error about an unknown one tells.
    max_new_tokens: tokens generated for an answer.
    choices: answers the output is restricted to (`None`: free text), of one token or several; the
        same restriction holds in warmup, training and evaluation.
    chat_template: render the user turn with the tokenizer's chat template.
    shuffle_labels: a control; targets of train and validation are permuted, test keeps its own.
    """

    name: str
    n_train: int
    n_validation: int
    n_test: int
    split_seed: int
    train_seed: int | None
    groups: list[str] | None
    max_new_tokens: int
    choices: list[str] | None
    chat_template: bool
    shuffle_labels: bool

    def faults(self) -> list[str]:
        """What is wrong with the values, each with the override that mends it."""
        sizes = ("n_train", "n_validation", "n_test", "max_new_tokens")
        found = [
            f"task.{name}={getattr(self, name)}: must be at least 1"
            for name in sizes
            if getattr(self, name) < 1
        ]
        if self.train_seed is not None and self.train_seed < 0:  # -1 would draw what 1 does
            found.append(f"task.train_seed={self.train_seed}: must be 0 or more, or null")
        if self.choices is not None and len(self.choices) < 2:
            found.append(
                f"task.choices={self.choices}: give two answers or more, e.g. "
                "task.choices=[yes,no], or task.choices=null for free text"
            )
        if self.choices and any(not choice.strip() for choice in self.choices):
            found.append(f"task.choices={self.choices}: an answer is empty")
        if self.choices and len(set(self.choices)) < len(self.choices):
            found.append(f"task.choices={self.choices}: an answer is there twice")
        if self.choices and self.max_new_tokens > 1:
            found.append(
                f"task.max_new_tokens={self.max_new_tokens}: an answer restricted to task.choices "
                "is one of them, however long; set task.max_new_tokens=1, or task.choices=null for "
                "free text"
            )
        return found

    def splits(self) -> Splits:
        """Draw the splits: same seed and data, same splits, in every run and on every machine."""
        self._raise_faults()
        self.load_scorer()
        return self.drawn()

    def drawn(self) -> Splits:
        """The splits, without asking whether answers can be scored here."""
        self._raise_faults()
        splits = self.draw()
        if self.shuffle_labels:
            splits = replace(
                splits,
                train=_permute_targets(splits.train, self.split_seed),
                validation=_permute_targets(splits.validation, self.split_seed + 1),
            )
        splits.check_disjoint()
        return splits

    def _raise_faults(self) -> None:
        if found := self.faults():
            raise UserError("\n".join(found))

    @property
    def is_local(self) -> bool:
        """Whether the data lies on this machine, so that a sweep can draw it beforehand."""
        return True

    @abstractmethod
    def draw(self) -> Splits:
        """Load the data and split it. Raises `UserError` where data is missing or too small."""
        raise NotImplementedError

    def cut(self, items: Sequence[Item], where: str) -> Splits:
        """Train, validation and test from one set of items, of the groups asked for."""
        sizes = {"train": self.n_train, "validation": self.n_validation, "test": self.n_test}
        kept = of_groups(items, self.groups, where)
        parts = split_items(kept, sizes, self.split_seed, where, self.train_seed)
        all_taken = self.all_taken(len(kept) - self.n_validation - self.n_test)
        return Splits(*parts, warnings=tuple(all_taken))

    def all_taken(self, n_left: int) -> list[str]:
        """A warning where `train_seed` has nothing to choose from. n_left: items for train."""
        if self.train_seed is None or n_left > self.n_train:
            return []
        return [
            f"task.train_seed={self.train_seed}: task.n_train={self.n_train} takes every item that "
            "is left for training, so that all draws have the same items; lower task.n_train"
        ]

    def load_scorer(self) -> None:
        """Make sure that answers can be scored, before anything is generated.

        Raises `UserError` naming the scorer and the offline alternative.
        """

    @property
    def constrained_to(self) -> list[str] | None:
        """The texts to which an answer is restricted; `None`: free text."""
        return self.choices

    @property
    def by_length(self) -> bool:
        """Whether options of several tokens are compared by the mean over their tokens."""
        return False

    @property
    def stop_strings(self) -> list[str]:
        """Texts that end an answer; they and what follows are no part of it."""
        return []

    @abstractmethod
    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        """Score generated answers (text without the prompt), one `Score` an item."""
        raise NotImplementedError

    @property
    @abstractmethod
    def scorer_name(self) -> str:
        """The rule behind `score`, as the result records it."""
        raise NotImplementedError


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


def _permute_targets(items: tuple[Item, ...], seed: int) -> tuple[Item, ...]:
    """Targets change places among items with as many options, so that each stays one of them.

    Among the items of each true target every target becomes as frequent as in all: a permutation
    drawn without this agrees with the truth a little too often or too rarely, by chance, and what
    is selected on it then gains or loses by more than chance.
    """
    if all(item.target is None for item in items):
        raise UserError("task.shuffle_labels=true needs a task whose items carry a target")
    draw = random.Random(seed)
    permuted = list(items)
    for n_options in sorted({item.n_options for item in items}):
        places = [i for i, item in enumerate(items) if item.n_options == n_options]
        draw.shuffle(places)
        places.sort(key=lambda i: str(items[i].target))
        for i, target in zip(places, _spread([items[i].target for i in places]), strict=True):
            permuted[i] = replace(items[i], target=target)
    return tuple(permuted)


def _spread(targets: list[str | None]) -> list[str | None]:
    """These, sorted, in an order in which each stretch holds every target in proportion."""
    n = len(targets)
    step = round(0.618 * n)  # near the golden section, multiples are spread most evenly
    while math.gcd(step, n) > 1:
        step += 1
    return [targets[at * step % n] for at in range(n)]

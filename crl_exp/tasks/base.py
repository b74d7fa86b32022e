"""What a task is: items in disjoint splits, a prompt for each, a score for each answer.

A task is a dataclass whose fields are the keys of its YAML file in `conf/task/`. It never sees a
model or a tokenizer: it hands out user turns (`Item.user`) and scores strings.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Self

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.tasks.data.drawing import (
    content_id,
    of_groups,
    permute_labels,
    shuffled,
    split_items,
    unique,
)
from crl_exp.tasks.data.items import Item, Score, Splits

__all__ = [
    "Item", "Score", "Splits", "Task", "content_id", "of_groups", "shuffled", "split_items",
    "unique",
]  # fmt: skip


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
        Where items have none, whether each is benign is. Each seed of a run permutes in its own
        way, so that an interval over seeds holds the draw.
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
    shuffle_seed: int = field(default=0, init=False)  # the run's: `permuted_by`

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
        if self.split_seed < 0:  # likewise
            found.append(f"task.split_seed={self.split_seed}: must be 0 or more")
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

    def permuted_by(self, seed: int) -> Self:
        """This task as a run of that seed has it: itself, but for `shuffle_labels`."""
        if not self.shuffle_labels:
            return self
        task = copy(self)
        task.shuffle_seed = seed
        return task

    def drawn(self) -> Splits:
        """The splits, without asking whether answers can be scored here."""
        self._raise_faults()
        splits = self.draw()
        if self.shuffle_labels:
            draw = f"{self.split_seed} {self.shuffle_seed}"
            splits = replace(
                splits,
                train=permute_labels(splits.train, f"train {draw}"),
                validation=permute_labels(splits.validation, f"validation {draw}"),
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

    def told(self) -> dict[str, Any]:
        """What scoring has to tell, for the result's notes."""
        return {}

    @property
    def against_unsteered(self) -> bool:
        """Whether rewards are relative to the unsteered model's answers to the training items."""
        return False

    def take_unsteered(self, items: Sequence[Item], outputs: Sequence[str]) -> None:
        """Keep those answers for `score`; called first where `against_unsteered`."""

    def why_no_benign(self) -> str:
        """Why no training item is benign, as `warmup.contrast=benign` asks; "" where some are."""
        return f"task={self.name} has no harmful and benign prompts"

    def is_benign(self, item: Item) -> bool:
        """For `warmup.contrast=benign`; asked only where `why_no_benign` is ""."""
        return item.benign

    @property
    def constrained_to(self) -> list[str] | None:
        """The texts to which an answer is restricted; `None`: free text."""
        return self.choices

    @property
    def by_length(self) -> bool:
        """Whether options of several tokens are compared by the mean over their tokens."""
        return False

    @property
    def options_by_item(self) -> bool:
        """Whether the answer is one of options that each item has for itself (`Item.options`)."""
        return False

    @property
    def divisors(self) -> list[int] | None:
        """What the log-probability of each of `constrained_to` is divided by before they are
        compared; `None`: as `by_length` says."""
        return None

    def divisors_of(self, item: Item) -> list[int]:
        """The same of an item's own options."""
        return [1] * len(item.options)

    def why_no_options(self) -> str:
        """Why there are no options that all items share; "" where there are."""
        if self.options_by_item:
            return f"task={self.name} has other options for each item"
        return "" if self.constrained_to else f"task={self.name} is answered in free text"

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


@dataclass
class Worded(Task):
    """Base of tasks whose question can be worded in several ways: an axis of a sweep.

    question: the user turn, `{text}` stands for the item's text. It comes last, so that all prompts
        share one long prefix, which is read once. By default the one of `wordings` that `wording`
        names; given itself, it holds.
    wording: its name, by which reports set prompts side by side.
    wordings: questions by name. Another one: `+task.wordings.mine="…"` with task.wording=mine.
    """

    question: str
    wording: str
    wordings: dict[str, str]

    def faults(self) -> list[str]:
        found = super().faults()
        if self.wordings and self.wording not in self.wordings:
            return [
                *found,
                f"task.wording={self.wording}: must be one of {', '.join(self.wordings)}, or be "
                f"added by '+task.wordings.{self.wording}=…'"
                f"{did_you_mean(self.wording, self.wordings)}",
            ]
        if "{text}" not in self.question:
            found.append(f"task.question={self.question!r}: must hold {{text}}, the item's text")
        return found

    def asked(self, text: str, target: str | None = None) -> Item:
        """The item of a text. Its id is of the text alone: another wording keeps the splits."""
        return Item(content_id(text), self.question.replace("{text}", text), target=target)

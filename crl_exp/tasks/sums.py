"""Sums to be judged, made without data: a task for trying things out on a tiny random model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crl_exp.tasks.base import Item, Score, Splits, Task, content_id
from crl_exp.tasks.scorers.choice import ChoiceScorer

LARGEST = 40


@dataclass
class Sums(Task):
    """Is a + b more than c? Yes or no, for all a and b from 1 to 40 with one c each."""

    @property
    def scorer_name(self) -> str:
        return self._scorer().name

    def _scorer(self) -> ChoiceScorer:
        return ChoiceScorer(("yes", "no"))

    def draw(self) -> Splits:
        items = [
            self._item(a, b, (7 * a + 5 * b) % (2 * LARGEST))
            for a in range(1, LARGEST + 1)
            for b in range(1, LARGEST + 1)
        ]
        return self.cut(items, "task=tiny")

    @staticmethod
    def _item(a: int, b: int, c: int) -> Item:
        user = f"Is {a} + {b} more than {c}?"
        return Item(content_id(user), user, "yes" if a + b > c else "no")

    def why_no_benign(self) -> str:
        return ""

    def is_benign(self, item: Item) -> bool:
        """A stand-in, so that sweeps about refusing can be tried without their data."""
        return item.target == "no"

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return self._scorer()(items, outputs)

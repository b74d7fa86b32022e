"""Answers scored by a function of the user's own: `score(prompts, answers, items) -> list[float]`.

Whatever isn't a number from 0 to 1 for each answer ends the run, with the item: a reward is never
made up. The function is known by its module's file, which run keys hash.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from crl_exp.config import own_code
from crl_exp.config.errors import UserError
from crl_exp.tasks.base import Item, Score

ARGUMENTS = ("prompts", "answers", "items")


@dataclass(frozen=True)
class FunctionScorer:
    """function: its dotted name. source: digest of its module's file, as the run's key has it."""

    function: str
    source: str

    @property
    def name(self) -> str:
        return f"function({self.function}@{self.source})"

    @property
    def key(self) -> str:
        return f"task.function={self.function}"

    def load(self) -> Callable[..., Any]:
        """Raises `UserError` where it can't be had, or its module's file isn't what it was."""
        found = own_code.function(self.function, self.key, ARGUMENTS)
        module = self.function.rpartition(".")[0]
        now = own_code.source_digest(module, self.key)
        if now != self.source:
            raise UserError(
                f"{self.key}: {own_code.source_of(module, self.key)} was edited since this run was "
                f"frozen (digest {self.source} then, {now} now). Put it back as it was, or launch "
                "the line again: with another function it is another run"
            )
        return found

    def __call__(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        """Raises `UserError` with the item for whatever isn't a reward."""
        if not items:
            return []
        call, rows = self.load(), [as_row(item) for item in items]
        try:
            given = call([item.user for item in items], list(outputs), rows)
        except Exception as error:  # whatever a user's function raises
            where = self._first_that_raises(call, items, outputs)
            said = f"raised {type(error).__name__}: {error}"
            raise UserError(f"{self.key}: {said}; {where}") from error
        return [
            Score(self._reward(value, item))
            for value, item in zip(self._values(given, len(items)), items, strict=True)
        ]

    def _first_that_raises(
        self, call: Callable[..., Any], items: Sequence[Item], outputs: Sequence[str]
    ) -> str:
        """In words, the item that is to blame."""
        for item, output in zip(items, outputs, strict=True):
            try:
                call([item.user], [output], [as_row(item)])
            except Exception:
                return f"{shown(item)}, answer {output[:60]!r}"
        return f"it did so for {len(items)} answers together, and for none of them alone"

    def _values(self, given: Any, n: int) -> list[Any]:
        wanted = f"{n} numbers, one for each answer"
        if isinstance(given, (str, bytes, dict, set)) or not hasattr(given, "__iter__"):
            raise UserError(
                f"{self.key}: gave {brief(given)}, a {type(given).__name__}; it must return a list "
                f"of {wanted}"
            )
        values = list(given)
        if len(values) != n:
            raise UserError(f"{self.key}: gave {len(values)} values; it must return {wanted}")
        return values

    def _reward(self, value: Any, item: Item) -> float:
        number = None
        if isinstance(value, numbers.Real):
            number = float(value)
        elif getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of a tensor or array
            number = float(value.item())
        if number is None or not math.isfinite(number) or not 0 <= number <= 1:
            raise UserError(
                f"{self.key}: gave {brief(value)}, which is no number from 0 to 1; {shown(item)}"
            )
        return number


def as_row(item: Item) -> dict[str, Any]:
    """An item as its line in the file, with the answer that it is scored by."""
    return {**json.loads(item.row or "{}"), "answer": item.target}


def shown(item: Item) -> str:
    return f"item {item.item_id} ({brief(item.user)})"


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"

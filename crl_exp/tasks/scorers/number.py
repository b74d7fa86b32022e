"""Scores answers that end in a number (GSM8K): 1,234 = 1234 = 1234.0 = $1,234.

The number is the first one after `####`, the data set's own mark; without one, the last number.
A minus is a sign unless it stands between two things ("5-3"). Numbers in words aren't read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from crl_exp.tasks.base import Item, Score

MARK = "####"
_NUMBER = re.compile(
    r"(?P<sign>[-−]?[$€£]?[-−]?)"
    r"(?P<digits>(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][+-]?[0-9]{1,2}(?!\w))?)"
)
_BEFORE_A_MINUS = re.compile(r"[\w)\]%]$")


@dataclass(frozen=True)
class NumberScorer:
    """Reward 1 where the answer's number equals the target's; invalid where there is none."""

    @property
    def name(self) -> str:
        return "number"

    def __call__(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return [self._score(item, output) for item, output in zip(items, outputs, strict=True)]

    def _score(self, item: Item, output: str) -> Score:
        assert item.target is not None
        answer, right = read_number(output), read_number(item.target)
        assert right is not None, f"target {item.target!r} has no number"
        return Score(reward=float(answer == right), valid=answer is not None)


def read_number(text: str) -> Decimal | None:
    """The number that `text` gives as its answer, or `None`."""
    marked = numbers(text.partition(MARK)[2])
    if marked:
        return marked[0]
    found = numbers(text)
    return found[-1] if found else None


def numbers(text: str) -> list[Decimal]:
    """All numbers of `text`, thousands separators and currency signs left out."""
    found = []
    for match in _NUMBER.finditer(text):
        value = Decimal(match["digits"].replace(",", ""))
        signed = match["sign"].strip("$€£") != ""
        negative = signed and not _BEFORE_A_MINUS.search(text[: match.start()])
        found.append(-value if negative else value)
    return found

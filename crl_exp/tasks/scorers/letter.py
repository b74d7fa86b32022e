"""Scores answers that name an option by its letter: "B", " B", "(b)", "The answer is B."

What is read, in this order; the first that gives a letter counts:

1. A statement: "answer: B", "the answer is (B)", "the correct option is B". Of several the last.
2. The letter that the output begins with: "B", "b.", "B) because", "**B**", "B. Paris".
3. A letter named as a choice: "(B)", "option B", "I choose B.", "It is B." Of several, none.

A capital A or I with a plain word after it is an article or a pronoun. What follows a new
"Question:" belongs to no answer. Letters beyond the item's options are not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from crl_exp.tasks.base import Item, Score

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_MARKUP = re.compile(r"\\(?:boxed|text\w*|mathrm)\b|[*_`${}\"“”]+")
_NEXT_QUESTION = re.compile(r"\n\s*(?:question|q)\s*\d*\s*[:.]", re.IGNORECASE)
_STATED = (
    r"\b(?i:answer|(?:correct|right|best)\s+(?:option|choice|letter|one))"
    r"(?:\s+(?i:is|would\s+be|should\s+be|must\s+be))?\s*[:=]?\s*"
    r"(?:(?i:option|choice|letter)\s+)?"
)
_NAMED = (
    r"\(",
    r"\b(?i:option|choice|letter)\s+",
    r"\b(?i:choose|pick|select|chose|think|say|go\s+with|going\s+with|is|be|it's)\s+",
)
_NO_WORD = r"(?!(?<=[AI])\s+(?!(?:because|since|is|due)\b)[a-z])"


@lru_cache
def _patterns(n_options: int) -> tuple[re.Pattern, re.Pattern, tuple[re.Pattern, ...]]:
    """Statement, beginning and mentions, for the first `n_options` letters."""
    last = LETTERS[n_options - 1]
    letter = rf"([A-{last}])(?![\w'’]|-\w)"
    capital = letter + _NO_WORD
    small = rf"([a-{last.lower()}])(?=\s*(?:[).,;:!\]]|$))"
    either = rf"\(?(?:{capital}|{small})"
    end = r"(?=\s*(?:[).,;:!\]]|$)|\s+(?:because|since|as|due)\b)"
    mentions = (
        re.compile(rf"{_NAMED[0]}(?:{capital}|{small})(?=\))"),
        re.compile(rf"{_NAMED[1]}\(?{letter}"),
        re.compile(rf"{_NAMED[2]}{capital}{end}"),
    )
    return re.compile(_STATED + either), re.compile(rf"^\W*{either}"), mentions


@dataclass(frozen=True)
class LetterScorer:
    """Reward 1 where the answer's letter is the item's target; invalid where none can be read.

    n_options: letters known, from A on. An item with fewer (`Item.n_options`) is read with its own.
    """

    n_options: int

    @property
    def name(self) -> str:
        return f"letter(A-{LETTERS[self.n_options - 1]})"

    def __call__(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return [self._score(item, output) for item, output in zip(items, outputs, strict=True)]

    def _score(self, item: Item, output: str) -> Score:
        answer = read_letter(output, item.n_options or self.n_options)
        return Score(reward=float(answer == item.target), valid=answer is not None)


def read_letter(output: str, n_options: int) -> str | None:
    """The capital letter that `output` gives as its answer, or `None`; see the top of this file."""
    text = _NEXT_QUESTION.split(_MARKUP.sub("", output), maxsplit=1)[0].strip()
    stated, beginning, mentions = _patterns(n_options)
    if found := list(stated.finditer(text)):
        return _letter(found[-1])
    if first := beginning.match(text):
        return _letter(first)
    named = {_letter(found) for pattern in mentions for found in pattern.finditer(text)}
    return named.pop() if len(named) == 1 else None


def _letter(found: re.Match) -> str:
    return next(group for group in found.groups() if group).upper()

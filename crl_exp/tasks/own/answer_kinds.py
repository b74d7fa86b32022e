"""How a written answer is compared with the one that a line of a `jsonl` file gives.

Of `exact` and `contains` both texts are made plain first: Unicode's NFKC, whatever the case, runs
of blanks as one; of `exact` also without quotes and markdown's marks around them and without a
closing `.`, `!` or `?`. `number` and `f1` are those of GSM8K and SQuAD; `regex` takes answers as
they are written.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crl_exp.tasks.base import Item, Score
from crl_exp.tasks.scorers.base import Scorer
from crl_exp.tasks.scorers.number import NumberScorer, read_number
from crl_exp.tasks.scorers.token_f1 import TokenF1Scorer, words

AROUND = " \"'`*_“”‘’«»"
CLOSING = ".!?"


def plain_text(text: str) -> str:
    """NFKC, case folded, runs of blanks as one, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def bare(text: str) -> str:
    """`plain_text` without what is around an answer: quotes, marks, a closing mark."""
    return plain_text(text).strip(AROUND).rstrip(CLOSING).strip(AROUND)


def holds(text: str, part: str) -> bool:
    """Whether a plain text has another in it, from the beginning of a word to the end of one."""
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


@dataclass(frozen=True)
class TextScorer:
    """Reward 1 where an answer agrees with the target; an answer without a letter or digit (for
    `regex`: of blanks alone) is invalid, with reward 0."""

    name: str
    agrees: Callable[[str, str], bool]

    def __call__(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return [self._score(item, output) for item, output in zip(items, outputs, strict=True)]

    def _score(self, item: Item, output: str) -> Score:
        assert item.target is not None
        said = bool(output.strip()) if self.name == "regex" else _says_something(output)
        return Score(float(said and self.agrees(output, item.target)), valid=said)


def _says_something(text: str) -> bool:
    return any(char.isalnum() for char in text)


def _found(output: str, pattern: str) -> bool:
    return re.search(pattern, output) is not None  # `re` keeps what it has compiled


def _bad_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    return ""


def _needs_a_sign(text: str) -> str:
    return "" if _says_something(bare(text)) else "has no letter or digit to compare"


@dataclass(frozen=True)
class AnswerKind:
    """scorer: of answers. fault: what a line's answer lacks for it; "" for nothing."""

    scorer: Scorer
    fault: Callable[[str], str]


WRITTEN: dict[str, AnswerKind] = {
    "exact": AnswerKind(TextScorer("exact", lambda o, t: bare(o) == bare(t)), _needs_a_sign),
    "number": AnswerKind(
        NumberScorer(), lambda t: "has no number" if read_number(t) is None else ""
    ),
    "f1": AnswerKind(TokenF1Scorer(), lambda t: "" if words(t) else "has no word to compare"),
    "contains": AnswerKind(
        TextScorer("contains", lambda o, t: holds(plain_text(o), plain_text(t))), _needs_a_sign
    ),
    "regex": AnswerKind(TextScorer("regex", _found), _bad_regex),
}
"""Kinds of answers that are written freely. The remaining one is `choice`."""
KINDS = ("choice", *WRITTEN)

"""Scores free answers by the words they share with the right one (SQuAD, arXiv 1606.05250).

The offline alternative to the cross-encoder in `crl_exp/tasks/scorers/semantic.py`. It can't tell
"1969" from "the year of the Moon landing", and takes a wrong answer of many right words for a
fair one.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from crl_exp.tasks.base import Item, Score

_PUNCTUATION = str.maketrans("", "", string.punctuation + "‘’“”–—…")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@dataclass(frozen=True)
class TokenF1Scorer:
    """Reward: F1 of the words, in [0, 1]; from .5 up an item counts as right.

    An output without a word is invalid, with reward 0.
    """

    @property
    def name(self) -> str:
        return "token_f1"

    def __call__(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return [self._score(item, output) for item, output in zip(items, outputs, strict=True)]

    def _score(self, item: Item, output: str) -> Score:
        assert item.target is not None
        return Score(reward=token_f1(output, item.target), valid=bool(words(output)))


def words(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(output: str, target: str) -> float:
    """2PR/(P+R) with P = shared / words of output, R = shared / words of target; 0 if none."""
    said, right = words(output), words(target)
    shared = sum((Counter(said) & Counter(right)).values())
    return 2 * shared / (len(said) + len(right)) if shared else 0.0

"""Is an answer one whole sentence? A rule on its form; what it says plays no part.

1. Blanks at both ends don't count.
2. The first character is a capital letter. An opening quote, a bullet or a digit is none.
3. There is one closing mark, `.`, `!`, `?` or `…`, and it is the last character. So a second
   sentence, a list, an ellipsis of three dots and an answer that was cut off fail; so do a quote
   that is closed behind the mark, an abbreviation (`Mr. Smith`) and a decimal (`3.5`): the rule
   doesn't tell their dots from a sentence's end, and errs against the answer.
4. It has as many words as asked for; words are what blanks separate (`it's` and `well-made` are one
   each), and a dash that stands alone is none.

An empty answer is invalid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crl_exp.tasks.base import Item, Score

MARKS = ".!?…"


@dataclass(frozen=True)
class SentenceScorer:
    """Reward 1 for one whole sentence of `min_words` to `max_words` words, both included."""

    min_words: int
    max_words: int

    @property
    def name(self) -> str:
        return f"one_sentence({self.min_words}-{self.max_words} words)"

    def __call__(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return [
            Score(float(self.whole(output)), valid=bool(output.strip()))
            for _, output in zip(items, outputs, strict=True)
        ]

    def whole(self, output: str) -> bool:
        text = output.strip()
        if not text or not text[0].isupper():
            return False
        if text[-1] not in MARKS or sum(text.count(mark) for mark in MARKS) != 1:
            return False
        words = [word for word in text.split() if any(char.isalnum() for char in word)]
        return self.min_words <= len(words) <= self.max_words

"""Movie-review sentences rated by people: is this one positive or negative?

Data: `movieReviewSnippets_GroundTruth.txt` of Hutto & Gilbert (ICWSM 2014), MIT licence: one
sentence a line, `id <tab> mean rating in [-4, 4] <tab> text`, UTF-8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crl_exp.config.machine.assets import asset_path
from crl_exp.tasks.base import Item, Score, Splits, Worded, unique
from crl_exp.tasks.choice_task import ChoiceTask
from crl_exp.tasks.data.files import damaged, read_text
from crl_exp.tasks.scorers.choice import ChoiceScorer

DATA = "data/hutto_icwsm_2014"
FILE = "movieReviewSnippets_GroundTruth.txt"
POSITIVE, NEGATIVE = "Positive", "Negative"
SCORER = ChoiceScorer((POSITIVE, NEGATIVE))


@dataclass
class Sentiment(Worded, ChoiceTask):
    """The sign of a review sentence, answered with one word.

    min_abs_rating: sentences rated nearer to zero than this are left out.
    min_chars, max_chars: bounds on the length of a sentence in characters, both included.
    """

    min_abs_rating: float
    min_chars: int
    max_chars: int

    def faults(self) -> list[str]:
        found = super().faults()
        if self.choices is not None and sorted(self.choices) != sorted((POSITIVE, NEGATIVE)):
            found.append(
                f"task.choices={list(self.choices)}: these can't answer this task; use "
                f"task.choices=[{POSITIVE},{NEGATIVE}] or task.choices=null"
            )
        if not 0 < self.min_abs_rating <= 4:
            found.append(
                f"task.min_abs_rating={self.min_abs_rating}: must be over 0 and at most 4, "
                "as a rating of 0 has no sign"
            )
        if self.min_chars > self.max_chars:
            found.append(
                f"task.min_chars={self.min_chars}: must not be over task.max_chars={self.max_chars}"
            )
        return found

    @property
    def scorer_name(self) -> str:
        return SCORER.name

    def draw(self) -> Splits:
        """Raises `UserError` where the file is missing or damaged, or has too few sentences."""
        path = asset_path(DATA) / FILE
        items = unique([self._item(text, rating) for rating, text in self._kept(path)])
        return self.cut(items, f"{DATA}/{FILE}")

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        """Reward 1 where the answer names the review's sign and not the other."""
        return SCORER(items, outputs)

    def _item(self, text: str, rating: float) -> Item:
        return self.asked(text, POSITIVE if rating > 0 else NEGATIVE)

    def _kept(self, path: Path) -> Iterator[tuple[float, str]]:
        for rating, text in read_ratings(path):
            if abs(rating) >= self.min_abs_rating and self.min_chars <= len(text) <= self.max_chars:
                yield rating, text


def read_ratings(path: Path) -> list[tuple[float, str]]:
    """All (mean rating, sentence) of a rating file. Raises `UserError` naming a damaged line."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            rows.append(_parse(line, f"{path}, line {number}"))
    return rows


def _parse(line: str, where: str) -> tuple[float, str]:
    try:
        _, rating, text = line.split("\t")
        value = float(rating)
    except ValueError as error:
        raise damaged(where, "expected `id <tab> rating <tab> text`") from error
    if not math.isfinite(value):
        raise damaged(where, f"the rating is {rating}")
    return value, text.strip()

"""Say in one sentence what a review is about: free text, rewarded by its form alone.

Unlike a choice between two words, this can't be had by moving a threshold at one token: the answer
has to begin, go on and end. And since the reward doesn't read it, it is a task on which reward and
quality can part; the result has both (`crl_exp.experiments.kinds.quality`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crl_exp.config.machine.assets import asset_path
from crl_exp.tasks.base import Item, Score, Splits, Worded, unique
from crl_exp.tasks.scorers.sentence import SentenceScorer
from crl_exp.tasks.sentiment import DATA, FILE, read_ratings


@dataclass
class OneSentence(Worded):
    """Review sentences of `task=sentiment`'s data, of whatever rating.

    min_chars, max_chars: bounds on the length of a review sentence, both included.
    min_words, max_words: bounds on the length of a rewarded answer, both included.
    """

    min_chars: int
    max_chars: int
    min_words: int
    max_words: int

    def faults(self) -> list[str]:
        found = super().faults()
        if self.choices is not None:
            found.append(
                f"task.choices={list(self.choices)}: this task is free text; set task.choices=null"
            )
        for unit in ("chars", "words"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if not 1 <= low <= high:
                found.append(
                    f"task.min_{unit}={low}: must be from 1 to task.max_{unit}={high}, both "
                    "included"
                )
        return found

    @property
    def scorer_name(self) -> str:
        return self._scorer().name

    def _scorer(self) -> SentenceScorer:
        return SentenceScorer(self.min_words, self.max_words)

    def draw(self) -> Splits:
        """Raises `UserError` where the file is missing or damaged, or has too few sentences."""
        texts = [text for _, text in read_ratings(asset_path(DATA) / FILE)]
        items = unique(
            [self.asked(text) for text in texts if self.min_chars <= len(text) <= self.max_chars]
        )
        return self.cut(items, f"{DATA}/{FILE}")

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        """Reward 1 where the answer is one whole sentence; the rule: `scorers.sentence`."""
        return self._scorer()(items, outputs)

"""Scores answers that name one of a few options: "Positive", " positive.", "**Negative**"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from crl_exp.tasks.base import Item, Score


@dataclass(frozen=True)
class ChoiceScorer:
    """Reward 1 where the answer names the item's target and no other option.

    Options are matched as whole words, whatever the case and the punctuation or markup around
    them. An answer that names none or several is invalid, with reward 0.
    """

    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"choice({'|'.join(self.options)})"

    def __call__(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return [self._score(item, output) for item, output in zip(items, outputs, strict=True)]

    def read(self, output: str) -> str | None:
        """The one option that `output` names, or `None`.

        An option that is another one too ("related" in "not related") is named by itself alone.
        """
        if output.strip() in self.options:
            return output.strip()
        named = [o for o in self.options if _names(o, output)]
        longer = [o for o in named if any(o != other and _names(o, other) for other in named)]
        if longer:
            text = output
            for other in sorted(named, key=len, reverse=True):
                if other not in longer:
                    text = re.sub(re.escape(other), " | ", text, flags=re.IGNORECASE)
            named = [o for o in named if o not in longer or _names(o, text)]
        return named[0] if len(named) == 1 else None

    def _score(self, item: Item, output: str) -> Score:
        assert item.target in self.options, f"target {item.target!r} is not among the options"
        answer = self.read(output)
        return Score(reward=float(answer == item.target), valid=answer is not None)


def _names(option: str, output: str) -> bool:
    # Not \b: markdown's underscore counts as a letter there, and "_Positive_" is an answer.
    pattern = rf"(?<![^\W_]){re.escape(option)}(?![^\W_])"
    return re.search(pattern, output, re.IGNORECASE) is not None

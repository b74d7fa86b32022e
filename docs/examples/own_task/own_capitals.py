"""A task of one's own: capitals, half rewarded where the answer names the country alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crl_exp.tasks.base import Item, Score, Splits, Task, content_id

ROWS = Path(__file__).with_name("capitals.jsonl")


@dataclass
class Capitals(Task):
    """What is the capital? country_alone: the reward of an answer that only names the country."""

    country_alone: float

    @property
    def scorer_name(self) -> str:
        return f"capitals({self.country_alone})"

    def draw(self) -> Splits:
        items = []
        for line in ROWS.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            user = f"What is the capital of {row['country']}?"
            items.append(Item(content_id(user), user, row["capital"], group=row["continent"]))
        return self.cut(items, ROWS.name)  # by the sizes, the seed and the groups of the config

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        return [self._score(item, output) for item, output in zip(items, outputs, strict=True)]

    def _score(self, item: Item, output: str) -> Score:
        country = item.user.removeprefix("What is the capital of ").rstrip("?")
        if str(item.target) in output:
            return Score(1.0)
        return Score(self.country_alone if country in output else 0.0, valid=bool(output.strip()))

"""Rewards of one's own, for `task=jsonl task.scorer=function task.function=own_rewards.named`."""

from __future__ import annotations

from typing import Any


def named(prompts: list[str], answers: list[str], items: list[dict[str, Any]]) -> list[float]:
    """The share of an item's `words` that the answer names; of an empty answer 0."""
    rewards = []
    for answer, item in zip(answers, items, strict=True):
        said = answer.lower()
        found = [word for word in item["words"] if word.lower() in said]
        rewards.append(len(found) / len(item["words"]))
    return rewards

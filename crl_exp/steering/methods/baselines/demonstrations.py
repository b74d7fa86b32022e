"""Training items with an answer that is right: what examples and adapted weights are made of."""

from __future__ import annotations

import random
from dataclasses import dataclass

from crl_exp.models.choice import ItemOptions
from crl_exp.steering.methods.baselines.options import right_options
from crl_exp.steering.workspace import Workspace


@dataclass(frozen=True)
class Demonstration:
    """item: position among the training items. user: its user turn.

    answer: as the model would write it. tokens: the same as ids, an end token left out. option:
        its index among the task's options; None in free text, and where items have their own.
    """

    item: int
    user: str
    answer: str
    tokens: tuple[int, ...]
    option: int | None


def demonstrations(workspace: Workspace) -> list[Demonstration]:
    """One for each training item that has one, in the order of the items.

    With options, the right one, where it is one. In free text there is no right answer to copy:
    the unsteered model's own, where it was rewarded (from .5 up).
    """
    items = workspace.splits.train
    if isinstance(workspace.options, ItemOptions):
        own = workspace.options.of["train"]
        return [
            Demonstration(at, items[at].user, own[at].texts[option], own[at].ids[option], None)
            for at, option in enumerate(right_options(workspace, "train").tolist())
        ]
    if workspace.options:
        texts = workspace.exp.task.constrained_to or []
        return [
            Demonstration(at, items[at].user, texts[option], workspace.options.ids[option], option)
            for at, option in enumerate(right_options(workspace, "train").tolist())
            if option >= 0
        ]
    own = workspace.baseline("train")
    return [
        Demonstration(at, item.user, text, tuple(tokens), None)
        for at, (item, score, text, tokens) in enumerate(
            zip(items, own.scores, own.generation.texts, own.generation.tokens, strict=True)
        )
        if score.reward >= 0.5 and text.strip()
    ]


def in_turns(given: list[Demonstration], seed: int) -> list[Demonstration]:
    """Shuffled, the answers (where they are options) taking turns."""
    order = list(given)
    # Of a negative number Python's generator takes the size alone.
    random.Random(seed if seed >= 0 else str(seed)).shuffle(order)
    seen: dict[int | None, int] = {}
    ranked = []
    for one in order:
        seen[one.option] = seen.get(one.option, 0) + (one.option is not None)
        ranked.append((seen[one.option], one))
    return [one for _, one in sorted(ranked, key=lambda pair: pair[0])]

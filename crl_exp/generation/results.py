"""What goes into the engine and what comes out of it: jobs, answers, recorded steps.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crl_exp.generation.controller import Action, Controller


@dataclass
class Job:
    """Rows for one controller: these items of the store, in this order."""

    controller: Controller
    items: Sequence[int]


@dataclass
class Step:
    """One controller's action at one layer and token, for all answers that had got so far.

    rows: position of each answer among the job's, ascending. alive_B: whether what was done counts.
    option: of `Generation.others`, the option whose token it was.
    """

    layer: int
    token_index: int
    rows: list[int]
    alive_B: Tensor
    action: Action
    token_B: Tensor | None = None
    option: int | None = None

    def living(self) -> Step:
        """Without the rows that had ended."""
        if bool(self.alive_B.all()):
            return self
        return self.part(self.alive_B.nonzero()[:, 0])

    def part(self, index_R: Tensor) -> Step:
        """These of its rows, in this order."""
        rows = [self.rows[i] for i in index_R.tolist()]
        token_R = None if self.token_B is None else self.token_B[index_R]
        alive_R = self.alive_B[index_R]
        action = self.action.part(index_R)
        return Step(self.layer, self.token_index, rows, alive_R, action, token_R, self.option)


@dataclass
class Generation:
    """A job's answers, in the order of its items, and its actions if they were recorded.

    tokens: ids of each answer, the end token left out. steps: one for each token and layer, in
    that order, however the rows were cut into batches. others: where answers are options of several
    tokens, the actions at the tokens of options that weren't taken; one for each token, layer and
    option.
    """

    tokens: list[list[int]]
    texts: list[str]
    steps: list[Step] = field(default_factory=list)
    others: list[Step] = field(default_factory=list)

    def copy(self) -> Generation:
        """With lists of its own, so that two callers can't disturb each other."""
        tokens = [list(one) for one in self.tokens]
        return Generation(tokens, list(self.texts), [*self.steps], [*self.others])


def joined(steps: Sequence[Step]) -> list[Step]:
    """One step for each token and layer (and option), its rows ascending, from those of several
    batches."""
    together: dict[tuple[int, int, int], list[Step]] = {}
    for step in steps:
        place = (step.token_index, step.layer, -1 if step.option is None else step.option)
        together.setdefault(place, []).append(step)
    return [_one(together[place]) for place in sorted(together)]


def _one(parts: list[Step]) -> Step:
    if len(parts) == 1:
        return parts[0]
    rows = [row for part in parts for row in part.rows]
    first = parts[0]
    tokens = [part.token_B for part in parts if part.token_B is not None]
    whole = Step(
        first.layer, first.token_index, rows, torch.cat([part.alive_B for part in parts]),
        Action.cat([part.action for part in parts]), torch.cat(tokens) if tokens else None,
        first.option,
    )  # fmt: skip
    order = torch.tensor(rows).argsort()
    return whole.part(order.to(whole.alive_B.device))


def cut_at(text: str, stop: Sequence[str]) -> str:
    """`text` before the first of the stop texts in it."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]

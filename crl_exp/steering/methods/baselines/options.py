"""A task's options: which is right for an item, how the model scores them, an option as an answer.

Shapes: N items, B rows, O options.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crl_exp.generation.controller import Controller, StepContext
from crl_exp.generation.results import Generation
from crl_exp.models.choice import Options
from crl_exp.steering.answers import batches
from crl_exp.steering.workspace import SteeringConfig, Workspace


class OptionReader(Controller):
    """Keeps how the unsteered model scores the options, and changes nothing."""

    steers = False
    at_output = True

    def __init__(self) -> None:
        super().__init__()
        self.score_NO: Tensor | None = None

    def weigh(self, score_BX: Tensor, context: StepContext) -> None:
        if self.score_NO is None:
            self.score_NO = score_BX.new_empty(context.n_rows, score_BX.shape[1])
        self.score_NO[context.row_B.to(score_BX.device)] = score_BX


def option_scores(workspace: Workspace, split: str) -> Tensor:
    """The scores [N, O] of which the engine takes the highest: float64, on the CPU."""
    n, found = len(workspace.splits.named()[split]), []
    for items in batches(0, n, workspace.exp.engine.items_together):
        reader = OptionReader()
        workspace.answer(reader, split, items)
        assert reader.score_NO is not None
        found.append(reader.score_NO.double().cpu())
    return torch.cat(found)


def option_rewards(workspace: Workspace, split: str) -> Tensor:
    """The task's reward [N, O] of each option as the answer, float64."""
    items, task = workspace.splits.named()[split], workspace.exp.task
    assert not task.options_by_item
    columns = [[one.reward for one in task.score(items, [option] * len(items))]
               for option in task.constrained_to or []]  # fmt: skip
    return torch.tensor(columns, dtype=torch.float64).T


def right_options(workspace: Workspace, split: str) -> Tensor:
    """Index [N] of the one option that is rewarded from .5 up; -1 where none or several are."""
    if workspace.exp.task.options_by_item:
        return torch.tensor([int(str(i.target)) for i in workspace.splits.named()[split]])
    good_NO = option_rewards(workspace, split) >= 0.5
    one_N = good_NO.sum(dim=1) == 1
    return torch.where(one_N, good_NO.double().argmax(dim=1), -1)


def answered(workspace: Workspace, option_B: Sequence[int]) -> Generation:
    """These options as answers, as the engine gives them."""
    assert isinstance(workspace.options, Options)
    tokens = [list(workspace.options.ids[option]) for option in option_B]
    return Generation(tokens, workspace.options.texts_of(tokens))


def needs_options(exp: SteeringConfig, name: str, instead: str) -> str:
    """The fault of a method that can only answer with an option, where the task has none."""
    why = exp.task.why_no_options()
    return f"method={name} answers with one of the task's options, and {why}; {instead}" * bool(why)

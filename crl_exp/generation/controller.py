"""What a controller is: it decides what is added to the residual, layer by layer.

Unsteered, fixed, random and learned steering are all controllers. The engine and the evaluation
can't tell them apart, so a difference between two methods is a difference in what they add.
Shapes: B rows, R rows that stay, D d_model, K features picked at once, X candidates for the next
token: the task's options, or the vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from crl_exp.generation.prompt_features import PromptActs


class RowState(Protocol):
    """Notes with something for each row. Finished rows leave the batch, and the notes follow."""

    def keep(self, index_R: Tensor) -> None:
        """Only these rows stay, in this order."""
        ...


@dataclass
class StepContext:
    """What a controller may know besides the residual.

    token_index: 0 at the last prompt token, then 1, 2, … at the generated ones; a tensor [] where
        a team's step is captured in a graph.
    items: position of each row's prompt in its store.
    alive_B: false where the row has finished; nothing it does counts any more.
    state: the controller's own notes for this batch of rows, empty at token 0.
    prompt: mean activations over the rows' prompts; None outside of an engine.
    row_B: position of each row among the n_rows items of its job. A job may go through the model
        in several batches, and rows that have finished leave theirs.
    option_B: where an answer is one of several options of several tokens, the option whose tokens
        each row reads; there are several rows of one item then. None: it writes its own answer, or
        is still at the last prompt token.
    taken_N: set before `end` in that case: the option that each of the job's rows took, -1 for
        those of other batches.
    """

    token_index: int
    items: list[int]
    alive_B: Tensor
    state: dict[str, RowState] = field(default_factory=dict)
    prompt: PromptActs | None = None
    row_B: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    n_rows: int = 0
    option_B: Tensor | None = None
    taken_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.n_rows == 0:  # the job's rows are these
            self.row_B, self.n_rows = torch.arange(len(self.items)), len(self.items)

    @staticmethod
    def joined(parts: Sequence[StepContext]) -> StepContext:
        """One for the rows of several, before the first token; with notes of its own."""
        prompt = None
        if parts[0].prompt is not None:
            items = [item for part in parts if part.prompt for item in part.prompt.items]
            prompt = replace(parts[0].prompt, items=items)
        return StepContext(
            parts[0].token_index,
            [item for part in parts for item in part.items],
            torch.cat([part.alive_B for part in parts]),
            prompt=prompt,
            row_B=torch.cat([part.row_B for part in parts]),
            n_rows=sum(part.n_rows for part in parts),
        )

    def keep(self, index_R: Tensor) -> None:
        """Only these rows stay in the batch."""
        self.items = [self.items[i] for i in index_R.tolist()]
        self.alive_B, self.row_B = self.alive_B[index_R], self.row_B[index_R]
        self.option_B = None if self.option_B is None else self.option_B[index_R]
        if self.prompt is not None:
            self.prompt = self.prompt.part(index_R.tolist())
        for notes in self.state.values():
            notes.keep(index_R)

    def branch(self, row_R: Tensor, option_R: Tensor) -> None:
        """Each row becomes one for each of its options, side by side. row_R: of these rows."""
        self.alive_B = torch.ones(len(self.items), dtype=torch.bool, device=row_R.device)
        self.keep(row_R)
        self.option_B = option_R


@dataclass
class Action:
    """What was added and why. A slot with `feature_idx` -1 adds nothing.

    delta_BD: added to the residual. feature_idx_BK, coefficient_BK: the SAE features and their
    coefficients. log_prob_B, value_B: of a learned policy. notes: tensors the trainer asks for.
    """

    delta_BD: Tensor
    feature_idx_BK: Tensor
    coefficient_BK: Tensor
    log_prob_B: Tensor | None = None
    value_B: Tensor | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)

    def part(self, index_R: Tensor | slice) -> Action:
        """These rows, in this order."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index_R]

        return Action(
            self.delta_BD[index_R], self.feature_idx_BK[index_R], self.coefficient_BK[index_R],
            rows(self.log_prob_B), rows(self.value_B),
            {name: tensor[index_R] for name, tensor in self.notes.items()},
        )  # fmt: skip

    def tensors(self) -> dict[str, Any]:
        """Copies of what it holds, by the names of its fields."""
        found = {
            name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return {**found, "notes": {name: value.clone() for name, value in self.notes.items()}}

    @staticmethod
    def cat(parts: Sequence[Action]) -> Action:
        """All rows of several actions that hold the same things."""

        def rows(tensors: list[Tensor | None]) -> Tensor | None:
            given = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(given) if given else None

        return Action(
            torch.cat([part.delta_BD for part in parts]),
            torch.cat([part.feature_idx_BK for part in parts]),
            torch.cat([part.coefficient_BK for part in parts]),
            rows([part.log_prob_B for part in parts]),
            rows([part.value_B for part in parts]),
            {name: torch.cat([part.notes[name] for part in parts]) for name in parts[0].notes},
        )


class Team:
    """Controllers of one `batch_key` at one layer, made for one call of the engine: within it,
    what is learned doesn't change.

    setting: of two teams with the same, the `tensors` alone differ.
    """

    setting: Hashable

    def act(self, x_ND: Tensor, context: StepContext, sizes: Sequence[int]) -> Action:
        """Decide for the rows of all members, one member's after another's: a function of tensors,
        of which `context.token_index` may be one.

        sizes: rows of each. context: of all these rows.
        """
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """All that this team decides by and another of its setting may have otherwise."""
        raise NotImplementedError

    def captured(self) -> Team:
        """The same with tensors of its own, for a graph that reads them at fixed addresses."""
        raise NotImplementedError

    def take(self, other: Team) -> None:
        """Decide as another team of this setting does."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


class Controller:
    """Base: steers nowhere, which makes it the unsteered model.

    sites: residual index of every layer that the controller acts at, by layer number. Index r is
        the output of decoder layer r; -1 is the input of layer 0.
    steers: false for a controller that only looks; it is handed the residuals but adds nothing.
    at_output: whether it is shown the candidates' scores (`weigh`).
    """

    steers = True
    at_output = False

    def __init__(self, sites: dict[int, int] | None = None):
        self.sites = sites or {}

    def begin(self, context: StepContext) -> None:
        """Called before the first token, while the model is free to run: read what has to be."""

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action | None:
        """Decide for every row at `layer`; None adds nothing."""
        return None

    def batch_key(self, layer: int) -> Hashable | None:
        """Controllers of one key act as one `team` at this layer. None: by itself, with `act`."""
        return None

    @staticmethod
    def team(members: Sequence[Controller], layer: int) -> Team:
        """One that acts for all of these, who are of one key. A controller with a key has one."""
        raise NotImplementedError

    def weigh(self, score_BX: Tensor, context: StepContext) -> Tensor | None:
        """The candidates' scores, of which the highest is taken; what it returns is taken instead.

        score_BX: of each row's next token; of the options, in their order, where the answer is
            restricted to options.
        """
        return None

    def end(self, context: StepContext) -> None:
        """Called when all answers of a batch are there. A batch that didn't fit into memory is
        played again without it: what is counted over batches has to be counted here."""


class Unsteered(Controller):
    """The model as it is."""


def slots(feature_idx_BK: Tensor, coefficient_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Steering vector [B, D]: the sum over slots of coefficient times the feature's `W_dec` row.

    Rows only, never `decode()`, which would add `b_dec`. Empty slots (-1) add nothing.
    """
    rows_BKD = W_dec_FD[feature_idx_BK.clamp(min=0)]
    weight_BK = torch.where(feature_idx_BK >= 0, coefficient_BK, 0.0).to(rows_BKD.dtype)
    return torch.einsum("bk,bkd->bd", weight_BK, rows_BKD)


def one_length(feature_idx_BK: Tensor, coefficient_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Factor [B, 1] that makes the sum of `slots` as long as its filled slots are on average.

    1 where nothing is added or the additions cancel out.
    """
    filled_BK = feature_idx_BK >= 0
    length_BK = W_dec_FD[feature_idx_BK.clamp(min=0)].float().norm(dim=2) * coefficient_BK.abs()
    mean_B = (length_BK * filled_BK).sum(dim=1) / filled_BK.sum(dim=1).clamp(min=1)
    whole_B = slots(feature_idx_BK, coefficient_BK, W_dec_FD).float().norm(dim=1)
    nothing_B = whole_B <= 1e-6 * mean_B
    return torch.where(nothing_B, 1.0, mean_B / whole_B.where(~nothing_B, 1.0))[:, None]

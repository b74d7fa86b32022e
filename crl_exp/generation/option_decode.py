"""One batch of rows answered by one of several options, each read to its end.

The last prompt token goes through the model once, with one act for all options. Then every row
becomes one for each of its options of more than one token, the prompt's keys and values behind it,
and the
option's tokens follow one at a time, steered as in generation. Which option a row takes is known
when all have been read. Shapes: B rows of the batch, R rows of options still being read, O options,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crl_exp.generation.controller import Action, StepContext
from crl_exp.generation.decode import Decoding
from crl_exp.generation.grouping import ControllerGroup
from crl_exp.generation.results import Step
from crl_exp.models.choice import Options
from crl_exp.models.kv_cache import Running


class OptionDecoding(Decoding):
    """As `Decoding`, for options of several tokens. Not captured by `engine.decode=compiled`.

    steps: what was done at the tokens of the option that each row took. others: at those of the
    options that it didn't take, which its choice depends on as well; of each part.
    """

    def __init__(self, *given: Any, **more: Any):
        super().__init__(*given, **more)
        self.options_B: Sequence[Options] = ()
        self.others: list[list[Step]] = [[] for _ in self.parts]
        self.option_R: Tensor | None = None  # of each row: the option that it reads; None: all
        self.next_R: Tensor | None = None  # of each row: the token after the one that is fed
        self.read_out: list[list[tuple[Step, Tensor]]] = [[] for _ in self.parts]

    def choose(self, options_B: Sequence[Options]) -> None:
        """Answer every row by one of its options; where rows have more or fewer, those that lack
        score -inf. Raises `UserError` where the model can't take that many tokens."""
        self.options_B = options_B
        longest = max(options.longest for options in options_B)
        now = self._begin(longest)
        device = self.alive_R.device
        logp_BV = self.lm.log_probs(self._forward(0, now)[:, -1])
        score_BO = self._first_scores(logp_BV)
        del logp_BV
        whole = [replace(one, alive_B=one.alive_B, state={}) for one in self.all_groups.contexts]
        if longest > 1:
            self._branch(now)
        for index in range(1, longest):
            assert self.option_R is not None
            option = self.option_R.tolist()
            now.token_R = self._tokens(self.place_R, option, index - 1)
            self.next_R = self._tokens(self.place_R, option, index)
            logp_RV = self.lm.log_probs(self._forward(index, now)[:, -1])
            row_R = torch.tensor(self.place_R, device=device)
            score_BO[row_R, self.option_R] += logp_RV.gather(1, self.next_R[:, None])[:, 0]
            del logp_RV
            longer_R = [
                len(options_B[row].ids[o]) > index + 1
                for row, o in zip(self.place_R, option, strict=True)
            ]
            self.alive_R = torch.tensor(longer_R, device=device)
            if index + 1 < longest and not bool(self.alive_R.all()):
                index_R = self.alive_R.nonzero()[:, 0]
                now.keep(index_R)
                self._leave(index_R)
        n_options = score_BO.shape[1]
        over_BO = [[*one.over, *[1] * (n_options - len(one.ids))] for one in options_B]
        score_BO = score_BO / score_BO.new_tensor(over_BO)
        self._take(self._weighed_options(score_BO, whole).argmax(dim=1))

    def _first_scores(self, logp_BV: Tensor) -> Tensor:
        """Log-probability [B, O] of each option's first token."""
        n_options = max(len(options.ids) for options in self.options_B)
        first_BO = [
            [ids[0] for ids in one.ids] + [-1] * (n_options - len(one.ids))
            for one in self.options_B
        ]
        first = torch.tensor(first_BO, device=logp_BV.device)
        score_BO = logp_BV.gather(1, first.clamp(min=0))
        return score_BO.masked_fill(first < 0, -torch.inf)

    def _weighed_options(self, score_BO: Tensor, contexts: Sequence[StepContext]) -> Tensor:
        """The options' scores, after the controllers that have a say in them. contexts: of each
        part, with all its rows."""
        at, weighed_BO = 0, score_BO
        for part, context in zip(self.parts, contexts, strict=True):
            rows = slice(at, at + len(part.items))
            at = rows.stop
            if not part.controller.at_output:
                continue
            mine_BO = part.controller.weigh(score_BO[rows], context)
            if mine_BO is None:
                continue
            if weighed_BO is score_BO:
                weighed_BO = score_BO.clone()
            weighed_BO[rows] = mine_BO
        return weighed_BO

    def _tokens(self, rows: Sequence[int], option: Sequence[int], index: int) -> Tensor:
        """A token of an option of each of these rows of the batch."""
        ids = [self.options_B[row].ids[o][index] for row, o in zip(rows, option, strict=True)]
        return torch.tensor(ids, device=self.alive_R.device)

    def _branch(self, now: Running) -> None:
        """Each row becomes one for each of its longer options, side by side."""
        branches = [
            (row, option)
            for row, options in enumerate(self.options_B)
            for option, ids in enumerate(options.ids)
            if len(ids) > 1
        ]
        self.place_R = [row for row, _ in branches]
        device = self.alive_R.device
        row_R = torch.tensor(self.place_R, device=device)
        self.option_R = torch.tensor([option for _, option in branches], device=device)
        now.keep(row_R)
        for part, rows in enumerate(self.all_groups.rows):
            mine = [row - rows.start for row in self.place_R if rows.start <= row < rows.stop]
            self.job_rows[part] = [self.job_rows[part][i] for i in mine]
        self.alive_R = self.alive_R[row_R]
        self.all_groups.branch(row_R, self.option_R)

    def _leave(self, index_R: Tensor) -> None:
        assert self.option_R is not None
        self.option_R = self.option_R[index_R]
        super()._leave(index_R)

    def _record(
        self, group: ControllerGroup, token_index: int, action: Action, slices: Sequence[slice]
    ) -> None:
        super()._record(group, token_index, action, slices)
        if self.option_R is None:
            return
        assert self.next_R is not None
        for index in group.parts:
            step, rows = self.steps[index].pop(), self.all_groups.rows[index]
            step.token_B = self.next_R[rows]
            self.read_out[index].append((step, self.option_R[rows]))

    def _take(self, option_B: Tensor) -> None:
        """Give every row the option of highest score, and its acts."""
        taken = option_B.tolist()
        self.tokens = [list(o.ids[at]) for o, at in zip(self.options_B, taken, strict=True)]
        at = 0
        for index, part in enumerate(self.parts):
            rows = range(at, at + len(part.items))
            own_B, at = option_B[at : rows.stop], rows.stop
            first_B = self._tokens(rows, own_B.tolist(), 0)
            for step in self.steps[index]:  # those at the last prompt token
                step.token_B = first_B
            taken_N = own_B.new_full((part.n_rows,), -1)
            taken_N[torch.tensor(part.row_B, device=own_B.device)] = own_B
            for step, option_R in self.read_out[index]:
                self._sort(index, step, option_R, taken_N)
            self.all_groups.contexts[index].taken_N = taken_N
        self._end()

    def _sort(self, index: int, step: Step, option_R: Tensor, taken_N: Tensor) -> None:
        """One token's acts: those for the options taken, and for each of the others."""
        mine_R = taken_N[torch.tensor(step.rows, device=taken_N.device)] == option_R
        alive_R = step.alive_B
        if (alive_R & mine_R).any():
            self.steps[index].append(step.part((alive_R & mine_R).nonzero()[:, 0]))
        for option in option_R.unique().tolist():
            other_R = alive_R & ~mine_R & (option_R == option)
            if other_R.any():
                other = step.part(other_R.nonzero()[:, 0])
                other.option = option
                self.others[index].append(other)

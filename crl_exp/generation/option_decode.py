"""One batch of rows answered by one of several options, each read to its end.

The last prompt token goes through the model once, with one act for all options. Then every row
becomes one for each option of more than one token, the prompt's keys and values behind it, and the
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
        self.others: list[list[Step]] = [[] for _ in self.parts]
        self.option_R: Tensor | None = None  # of each row: the option that it reads; None: all
        self.next_R: Tensor | None = None  # of each row: the token after the one that is fed
        self.read_out: list[list[tuple[Step, Tensor]]] = [[] for _ in self.parts]

    def choose(self, options: Options) -> None:
        """Answer every row. Raises `UserError` where the model can't take that many tokens."""
        now = self._begin(options.longest)
        device = self.alive_R.device
        logp_BV = self.lm.log_probs(self._forward(0, now)[:, -1])
        score_BO = logp_BV[:, torch.tensor([ids[0] for ids in options.ids], device=device)]
        del logp_BV
        whole = [replace(one, alive_B=one.alive_B, state={}) for one in self.all_groups.contexts]
        longer = [o for o, ids in enumerate(options.ids) if len(ids) > 1]
        self._branch(now, torch.tensor(longer, device=device))
        for index in range(1, options.longest):
            assert self.option_R is not None
            option = self.option_R.tolist()
            now.token_R = self._tokens(options, option, index - 1)
            self.next_R = self._tokens(options, option, index)
            logp_RV = self.lm.log_probs(self._forward(index, now)[:, -1])
            row_R = torch.tensor(self.place_R, device=device)
            score_BO[row_R, self.option_R] += logp_RV.gather(1, self.next_R[:, None])[:, 0]
            del logp_RV
            longer_R = [len(options.ids[o]) > index + 1 for o in option]
            self.alive_R = torch.tensor(longer_R, device=device)
            if index + 1 < options.longest and not bool(self.alive_R.all()):
                index_R = self.alive_R.nonzero()[:, 0]
                now.keep(index_R)
                self._leave(index_R)
        if options.length_normalised:
            score_BO = score_BO / score_BO.new_tensor([len(ids) for ids in options.ids])
        self._take(options, self._weighed_options(score_BO, whole).argmax(dim=1))

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

    def _tokens(self, options: Options, option: Sequence[int], index: int) -> Tensor:
        return torch.tensor([options.ids[o][index] for o in option], device=self.alive_R.device)

    def _branch(self, now: Running, option_O: Tensor) -> None:
        """Each row becomes one for each of these options, side by side."""
        n = len(option_O)
        index_R = torch.arange(len(self.place_R), device=option_O.device).repeat_interleave(n)
        now.keep(index_R)
        self.option_R = option_O.repeat(len(self.place_R))
        self.place_R = [self.place_R[i] for i in index_R.tolist()]
        self.job_rows = [[row for row in rows for _ in range(n)] for rows in self.job_rows]
        self.alive_R = self.alive_R[index_R]
        self.all_groups.branch(option_O)

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

    def _take(self, options: Options, option_B: Tensor) -> None:
        """Give every row the option of highest score, and its acts."""
        taken = option_B.tolist()
        self.tokens = [list(options.ids[o]) for o in taken]
        at = 0
        for index, part in enumerate(self.parts):
            own_B = option_B[at : at + len(part.items)]
            at += len(part.items)
            first_B = self._tokens(options, own_B.tolist(), 0)
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

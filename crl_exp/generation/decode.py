"""One batch of rows, decoded together: from the last prompt token to the answers' ends.

Here the controllers meet the model: their hooks are set for one forward pass at a time. Rows whose
answers have ended leave the batch. Where rows come from and where answers go is `engine`'s
part.
Shapes: B rows of the batch, R rows still in it, T tokens, D d_model, V vocabulary or choices,
X either of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Action
from crl_exp.generation.grouping import (
    ControllerGroup,
    ControllerGroups,
    JobRows,
    Teams,
    first_site,
    start_layer,
)
from crl_exp.generation.prompts import PromptBatch
from crl_exp.generation.results import Step, cut_at
from crl_exp.models.kv_cache import Running
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.sites import hooks

COMPACT_BELOW = 0.75
"""Ended rows leave once the living ones are at most this share: each time the cache is copied."""


class Decoding:
    """Rows that go through the model together, each part's one after another.

    tokens: of each row of the batch. steps: of each part. stop: texts that end an answer.
    """

    def __init__(
        self, lm: LanguageModel, prompt: PromptBatch, parts: list[JobRows], record: bool,
        stop: Sequence[str] = (), teams: Teams | None = None,
    ):  # fmt: skip
        self.lm, self.prompt, self.parts, self.record = lm, prompt, parts, record
        self.stop = list(stop)
        n_rows = len(prompt.items)
        self.all_groups = ControllerGroups(prompt, parts, teams or Teams(), lm.device)
        self.job_rows = [list(part.row_B) for part in parts]  # of the rows still there
        self.place_R = list(range(n_rows))  # of the rows still there: their place in the batch
        self.alive_R = torch.ones(n_rows, dtype=torch.bool, device=lm.device)
        self.tokens: list[list[int]] = [[] for _ in range(n_rows)]
        self.steps: list[list[Step]] = [[] for _ in parts]
        self.ends = lm.eos_ids

    def run(self, max_new_tokens: int, choices: Sequence[int] | None) -> None:
        """Answer every row, greedily. Raises `UserError` where the model can't take that many."""
        if choices:  # an option is an answer, whatever it is
            self.ends = set()
        now = self._begin(max_new_tokens)
        for index in range(max_new_tokens):
            token_R = self._step(index, now, choices)
            self._note_tokens(index, token_R)
            if not self.alive_R.any():
                break
            if index + 1 < max_new_tokens:
                self._drop_ended(now)
        self._end()

    def _begin(self, max_new_tokens: int) -> Running:
        """What the first forward pass starts from; controllers are told."""
        self._check_room(max_new_tokens)
        for part, context in zip(self.parts, self.all_groups.contexts, strict=True):
            part.controller.begin(context)
        lm, prompt = self.lm, self.prompt
        # Up to the first steered residual the last prompt token is as the store has it.
        self.top = top = min(first_site(part.controller, lm.n_layers) for part in self.parts)
        first_layer = min(
            start_layer(part.controller, max_new_tokens, lm.n_layers) for part in self.parts
        )
        cache = prompt.cache(first_layer, with_last=top + 1, room=max_new_tokens)
        return Running(prompt.last_B, prompt.position_B, prompt.key_BT, prompt.valid_BT, cache)

    def _end(self) -> None:
        for part, context in zip(self.parts, self.all_groups.contexts, strict=True):
            part.controller.end(context)

    def _step(self, index: int, now: Running, choices: Sequence[int] | None) -> Tensor:
        """Run the model for one token of every row; returns the next ones [R]."""
        now.token_R = self._next(self._forward(index, now)[:, -1], choices, index)
        return now.token_R

    def _forward(self, index: int, now: Running) -> Tensor:
        """Run the model for one token of every row; returns its last hidden states [R, 1, D]."""
        lm = self.lm
        now.step()
        with ExitStack() as stack:
            if index == 0:
                stack.enter_context(lm.skipping(self.top, self.prompt.residual(self.top)))
                self._show_prompt_residuals()
            stack.enter_context(self._hooks(index))
            hidden_RTD = lm.decoder(
                input_ids=now.token_R[:, None],
                attention_mask=lm.mask(now.position_R[:, None], now.key_RT, now.valid_RT),
                position_ids=now.position_R[:, None],
                past_key_values=now.cache,
                use_cache=True,
            ).last_hidden_state
        now.position_R = now.position_R + 1
        return hidden_RTD

    def _check_room(self, max_new_tokens: int) -> None:
        longest, limit = int(self.prompt.position_B.max()) + 1, self.lm.max_positions
        # The last token that is generated doesn't go through the model.
        if limit and longest + max_new_tokens - 1 > limit:
            raise UserError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones don't fit: "
                f"{self.lm.room()}; lower task.max_new_tokens"
            )

    def _drop_ended(self, now: Running) -> None:
        """Let the rows go whose answers have ended, if they are enough."""
        index_R = self.alive_R.nonzero()[:, 0]
        if len(index_R) > COMPACT_BELOW * len(self.alive_R):
            return
        now.keep(index_R)
        self._leave(index_R)

    def _leave(self, index_R: Tensor) -> None:
        """Only these rows stay in the batch; the others have ended."""
        for part, rows in enumerate(self.all_groups.rows):
            index_J = self.alive_R[rows].nonzero()[:, 0]
            self.job_rows[part] = [self.job_rows[part][i] for i in index_J.tolist()]
        self.all_groups.keep(self.alive_R)
        self.place_R = [self.place_R[i] for i in index_R.tolist()]
        self.alive_R = self.alive_R[index_R]

    def _show_prompt_residuals(self) -> None:
        """Controllers that only look get the stored residuals, which no other one can change."""
        for site, groups in self.all_groups.at(steering=False).items():
            for group in groups:
                self._act(group, self.prompt.residual(site)[group.rows], 0)

    def _hooks(self, token_index: int) -> AbstractContextManager[None]:
        """Controllers at their layers for one forward pass; always removed."""
        sites = self.all_groups.at(steering=True)
        if token_index > 0:
            for site, groups in self.all_groups.at(steering=False).items():
                sites.setdefault(site, []).extend(groups)
        return hooks(
            self.lm, {site: self._steer(groups, token_index) for site, groups in sites.items()}
        )

    def _steer(self, groups: list[ControllerGroup], token_index: int) -> Callable[[Tensor], Tensor]:
        def steer(hidden_RTD: Tensor) -> Tensor:
            steered_RTD = hidden_RTD
            for group in groups:
                action = self._act(group, hidden_RTD[group.rows, -1], token_index)
                if action is None or not self.all_groups.steers(group):
                    continue
                if steered_RTD is hidden_RTD:
                    steered_RTD = hidden_RTD.clone()
                steered_RTD[group.rows, -1] += action.delta_BD.to(hidden_RTD.dtype)
            return steered_RTD

        return steer

    def _act(self, group: ControllerGroup, x_ND: Tensor, token_index: int) -> Action | None:
        action = self.all_groups.act(group, x_ND, token_index, self.alive_R)
        if self.record and action is not None:
            self._record(group, token_index, action, group.slices())
        return action

    def _record(
        self, group: ControllerGroup, token_index: int, action: Action, slices: Sequence[slice]
    ) -> None:
        """slices: each part's rows of the action."""
        for index, part in zip(group.parts, slices, strict=True):
            alive = self.alive_R[self.all_groups.rows[index]]
            rows = list(self.job_rows[index])
            self.steps[index].append(Step(group.layer, token_index, rows, alive, action.part(part)))

    def _next(self, hidden_BD: Tensor, choices: Sequence[int] | None, token_index: int) -> Tensor:
        best_B = self._weighed(self.lm.logits(hidden_BD, choices), token_index).argmax(dim=-1)
        return best_B if choices is None else torch.as_tensor(choices, device=best_B.device)[best_B]

    def _weighed(self, score_RX: Tensor, token_index: int) -> Tensor:
        """The candidates' scores, after the controllers that have a say in them."""
        weighed_RX = score_RX
        all_groups = self.all_groups
        for part, rows, context in zip(
            self.parts, all_groups.rows, all_groups.contexts, strict=True
        ):
            if not part.controller.at_output or rows.start == rows.stop:
                continue
            context.token_index, context.alive_B = token_index, self.alive_R[rows]
            mine_BX = part.controller.weigh(score_RX[rows], context)
            if mine_BX is None:
                continue
            if weighed_RX is score_RX:
                weighed_RX = score_RX.clone()
            weighed_RX[rows] = mine_BX
        return weighed_RX

    def _note_tokens(self, token_index: int, token_R: Tensor) -> None:
        for index, rows in enumerate(self.all_groups.rows):
            for step in reversed(self.steps[index]):
                if step.token_index != token_index:
                    break
                step.token_B = token_R[rows]
        ended = torch.zeros_like(self.alive_R)
        for row, (token, alive) in enumerate(
            zip(token_R.tolist(), self.alive_R.tolist(), strict=True)
        ):
            if alive and token in self.ends:
                ended[row] = True
            elif alive:
                self.tokens[self.place_R[row]].append(token)
        # A new tensor: the recorded steps hold the one of the tokens that they were at.
        self.alive_R = self.alive_R & ~ended
        if self.stop:
            self._end_at_stops()

    def _end_at_stops(self) -> None:
        """End the answers that have just written a stop text. Only their last tokens are read."""
        rows = self.alive_R.nonzero()[:, 0].tolist()
        # A token may be a single byte, and the one before tells how the first is to be spelt.
        n_tokens = 1 + max(len(text.encode()) for text in self.stop)
        tails = [self.tokens[self.place_R[row]][-n_tokens:] for row in rows]
        texts = self.lm.tokenizer.batch_decode(tails, skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            if cut_at(text, self.stop) != text:
                self.alive_R[row] = False

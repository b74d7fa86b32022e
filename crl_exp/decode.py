"""One batch of rows, decoded together: from the last prompt token to the answers' ends.

Here the controllers meet the model: their hooks are set for one forward pass at a time. Where rows
come from and where answers go is `crl_exp.engine`'s part.
Shapes: B rows, T tokens, D d_model, V vocabulary or choices, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crl_exp.controllers.base import Action, Controller, StepContext
from crl_exp.errors import UserError
from crl_exp.models import LanguageModel
from crl_exp.prompt_acts import PromptActs
from crl_exp.prompts import PromptBatch


@dataclass
class Job:
    """Rows for one controller: these items of the store, in this order."""

    controller: Controller
    items: Sequence[int]


@dataclass
class Step:
    """One controller's action at one layer and token of one batch of rows."""

    layer: int
    token_index: int
    rows: list[int]
    alive_B: Tensor
    action: Action
    token_B: Tensor | None = None


@dataclass
class Generation:
    """A job's answers, in the order of its items, and its actions if they were recorded.

    tokens: ids of each answer, the end token left out. steps: rows index into `tokens`.
    """

    tokens: list[list[int]]
    texts: list[str]
    steps: list[Step] = field(default_factory=list)


class Decoding:
    """Rows that go through the model together, each job's one after another.

    rows: each job's slice of the batch. stop: texts that end an answer.
    """

    def __init__(
        self, lm: LanguageModel, prompt: PromptBatch, jobs: list[Job], record: bool,
        stop: Sequence[str] = (),
    ):  # fmt: skip
        self.lm, self.prompt, self.jobs, self.record = lm, prompt, jobs, record
        self.stop = list(stop)
        ends = torch.tensor([len(job.items) for job in jobs]).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self.rows = [slice(a, b) for a, b in zip(starts, ends, strict=True)]
        self.contexts = [
            StepContext(
                0,
                list(job.items),
                torch.empty(0),
                prompt=PromptActs(prompt.store, prompt.items[rows]),
            )
            for job, rows in zip(jobs, self.rows, strict=True)
        ]
        self.alive_B = torch.ones(ends[-1], dtype=torch.bool, device=lm.device)
        self.tokens: list[list[int]] = [[] for _ in range(ends[-1])]
        self.steps: list[list[Step]] = [[] for _ in jobs]

    def run(self, max_new_tokens: int, choices: Sequence[int] | None) -> None:
        """Answer every row, greedily. Raises `UserError` where the model can't take that many."""
        self._check_room(max_new_tokens)
        for job, context in zip(self.jobs, self.contexts, strict=True):
            job.controller.begin(context)
        lm, prompt = self.lm, self.prompt
        steered = [
            r for job in self.jobs if job.controller.steers for r in job.controller.sites.values()
        ]
        # Up to the first steered residual the last prompt token is as the store has it.
        top = min(steered, default=lm.n_layers - 1)
        one_token = max_new_tokens == 1
        cache = prompt.cache(first_layer=top + 1 if one_token else 0, with_last=top + 1)
        key_BT, valid_BT = prompt.key_BT, prompt.valid_BT
        token_B, position_B = prompt.last_B, prompt.position_B
        for index in range(max_new_tokens):
            key_BT = torch.cat([key_BT, position_B[:, None]], dim=1)
            valid_BT = torch.cat([valid_BT, valid_BT.new_ones(len(valid_BT), 1)], dim=1)
            with ExitStack() as stack:
                if index == 0:
                    stack.enter_context(lm.skipping(top, prompt.residual(top)))
                    self._show_prompt_residuals()
                stack.enter_context(self._hooks(index))
                hidden_BTD = lm.decoder(
                    input_ids=token_B[:, None],
                    attention_mask=lm.mask(position_B[:, None], key_BT, valid_BT),
                    position_ids=position_B[:, None],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
            token_B = self._next(hidden_BTD[:, -1], choices)
            self._note_tokens(index, token_B)
            if not self.alive_B.any():
                break
            position_B = position_B + 1

    def _check_room(self, max_new_tokens: int) -> None:
        longest, limit = int(self.prompt.position_B.max()) + 1, self.lm.max_positions
        # The last token that is generated doesn't go through the model.
        if limit and longest + max_new_tokens - 1 > limit:
            raise UserError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones don't fit into the "
                f"{limit} positions of {self.lm.name}; lower task.max_new_tokens"
            )

    def _show_prompt_residuals(self) -> None:
        """Controllers that only look get the stored residuals, which no other job can change."""
        for job_index, job in enumerate(self.jobs):
            if job.controller.steers:
                continue
            for layer, site in job.controller.sites.items():
                self._act(job_index, layer, self.prompt.residual(site)[self.rows[job_index]], 0)

    @contextmanager
    def _hooks(self, token_index: int) -> Iterator[None]:
        """Controllers at their layers for one forward pass; always removed."""
        sites: dict[int, list[tuple[int, int]]] = {}
        for job_index, job in enumerate(self.jobs):
            if token_index == 0 and not job.controller.steers:
                continue
            for layer, site in job.controller.sites.items():
                sites.setdefault(site, []).append((job_index, layer))
        handles = []
        try:
            for site, who in sites.items():
                handles.append(self.lm.hook(site, self._steer(who, token_index)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _steer(self, who: list[tuple[int, int]], token_index: int) -> Callable[[Tensor], Tensor]:
        def steer(hidden_BTD: Tensor) -> Tensor:
            steered_BTD = hidden_BTD
            for job_index, layer in who:
                rows = self.rows[job_index]
                action = self._act(job_index, layer, hidden_BTD[rows, -1], token_index)
                if action is None or not self.jobs[job_index].controller.steers:
                    continue
                if steered_BTD is hidden_BTD:
                    steered_BTD = hidden_BTD.clone()
                steered_BTD[rows, -1] += action.delta_BD.to(hidden_BTD.dtype)
            return steered_BTD

        return steer

    def _act(self, job_index: int, layer: int, x_BD: Tensor, token_index: int) -> Action | None:
        context = self.contexts[job_index]
        rows = self.rows[job_index]
        context.token_index, context.alive_B = token_index, self.alive_B[rows]
        action = self.jobs[job_index].controller.act(layer, x_BD, context)
        if self.record and action is not None:
            own = list(range(rows.stop - rows.start))
            step = Step(layer, token_index, own, context.alive_B.clone(), action)
            self.steps[job_index].append(step)
        return action

    def _next(self, hidden_BD: Tensor, choices: Sequence[int] | None) -> Tensor:
        best_B = self.lm.logits(hidden_BD, choices).argmax(dim=-1)
        return best_B if choices is None else torch.as_tensor(choices, device=best_B.device)[best_B]

    def _note_tokens(self, token_index: int, token_B: Tensor) -> None:
        for job_index, rows in enumerate(self.rows):
            for step in reversed(self.steps[job_index]):
                if step.token_index != token_index:
                    break
                step.token_B = token_B[rows]
        ended = self.lm.eos_ids
        for row, (token, alive) in enumerate(
            zip(token_B.tolist(), self.alive_B.tolist(), strict=True)
        ):
            if alive and token in ended:
                self.alive_B[row] = False
            elif alive:
                self.tokens[row].append(token)
        if self.stop:
            self._end_at_stops()

    def _end_at_stops(self) -> None:
        """End the answers that have just written a stop text. Only their last tokens are read."""
        rows = self.alive_B.nonzero()[:, 0].tolist()
        # A token may be a single byte, and the one before tells how the first is to be spelt.
        n_tokens = 1 + max(len(text.encode()) for text in self.stop)
        tails = [self.tokens[row][-n_tokens:] for row in rows]
        texts = self.lm.tokenizer.batch_decode(tails, skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            if cut_at(text, self.stop) != text:
                self.alive_B[row] = False

    def hand_over(self, result: Generation, rows: slice, offset: int) -> None:
        """Append these rows' answers and actions to their job's result."""
        job_index = self.rows.index(rows)
        result.tokens.extend(self.tokens[rows])
        for step in self.steps[job_index]:
            step.rows = [offset + row for row in step.rows]
            result.steps.append(step)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """`text` before the first of the stop texts in it."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]

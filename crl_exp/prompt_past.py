"""Lengths of a policy's logits over the tokens of prompts, for attention over the whole sequence.

Shapes: B rows, M tokens, D d_model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crl_exp.prompt_acts import PromptActs

if TYPE_CHECKING:
    from crl_exp.policy import LayerAgent


class PromptPast:
    """log Σ exp ‖logits‖ over all tokens but the last of each prompt, by one policy, as it was when
    it read them: read before the first token, while the model is free to run."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int, int], float] = {}  # by layer, store and prompt

    def read(self, agent: LayerAgent, prompt: PromptActs) -> None:
        """The prompts of these rows, by a layer's policy: its own logits, before any stage."""

        def length(x_MD: Tensor) -> Tensor:
            return agent.addition_logits(agent.standardise(x_MD)).norm(dim=1)

        sums = prompt.log_sums(agent.sae[0].site, length).tolist()
        self._sums |= dict(zip(_keys(agent, prompt), sums, strict=True))

    def of(self, agent: LayerAgent, prompt: PromptActs) -> Tensor:
        """Each row's [B]; read now where it wasn't."""
        keys = _keys(agent, prompt)
        if any(key not in self._sums for key in keys):
            self.read(agent, prompt)
        return torch.tensor([self._sums[key] for key in keys], device=prompt.store.lm.device)


def _keys(agent: LayerAgent, prompt: PromptActs) -> list[tuple[int, int, int]]:
    return [(agent.layer, id(prompt.store), item) for item in prompt.items]

"""Lengths of a policy's logits over the tokens of prompts, for attention over the whole sequence.

Shapes: B rows, M tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from crl_exp.generation.prompt_features import PromptActs
from crl_exp.saes.layer_sae import LayerSAE


class PromptReader(Protocol):
    """A layer's policy, as far as it reads prompts."""

    @property
    def layer(self) -> int: ...
    @property
    def sae(self) -> Sequence[LayerSAE]: ...
    def standardise(self, x_BD: Tensor) -> Tensor: ...
    def addition_logits(self, obs_BD: Tensor) -> Tensor: ...


class PromptPast:
    """log Σ exp ‖logits‖ over all tokens but the last of each prompt, by one policy, as it was when
    it read them: read before the first token, while the model is free to run."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int, int], float] = {}  # by layer, store and prompt

    def read(self, agent: PromptReader, prompt: PromptActs) -> None:
        """The prompts of these rows, by a layer's policy: its own logits, before any stage."""

        def length(x_MD: Tensor) -> Tensor:
            return agent.addition_logits(agent.standardise(x_MD)).norm(dim=1)

        sums = prompt.log_sums(agent.sae[0].site, length).tolist()
        self._sums |= dict(zip(_keys(agent, prompt), sums, strict=True))

    def of(self, agent: PromptReader, prompt: PromptActs) -> Tensor:
        """Each row's [B]; read now where it wasn't."""
        keys = _keys(agent, prompt)
        if any(key not in self._sums for key in keys):
            self.read(agent, prompt)
        return torch.tensor([self._sums[key] for key in keys], device=prompt.store.lm.device)


def _keys(agent: PromptReader, prompt: PromptActs) -> list[tuple[int, int, int]]:
    return [(agent.layer, id(prompt.store), item) for item in prompt.items]

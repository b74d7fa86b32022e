"""What a layer's stages remember of an answer's earlier tokens.

Held in the controller's notes for the batch of rows (`StepContext.state`), so that it is empty at
the first token. Shapes: B rows, R rows that stay, C allowed features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crl_exp.generation.controller import StepContext

OF_ACTS = frozenset({"feature_acts", "seen", "importance"})


class Memory:
    """One layer's memory of a batch of rows. key_B: of their random numbers, the same at all
    tokens (`draws.layer_keys`)."""

    def __init__(self) -> None:
        self.key_B: Tensor | None = None
        self.seen_BC: Tensor | None = None
        self.total_BC: Tensor | None = None
        self.count_B1: Tensor | None = None
        self.past_B: Tensor | None = None
        self.prompt_tokens_B: Tensor | None = None

    @staticmethod
    def of(layer: int, context: StepContext) -> Memory:
        found = context.state.setdefault(f"memory of layer {layer}", Memory())
        assert isinstance(found, Memory)
        return found

    def held(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def keep(self, index_R: Tensor) -> None:
        """Only these rows stay."""
        for name, held in vars(self).items():
            setattr(self, name, None if held is None else held[index_R])

    def see(self, acts_BC: Tensor) -> Tensor:
        """Whether each feature was active at this or an earlier steered token."""
        active_BC = acts_BC > 0
        self.seen_BC = active_BC if self.seen_BC is None else self.seen_BC | active_BC
        return self.seen_BC

    def weigh(self, acts_BC: Tensor, prompt_means: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """Mean activation of each feature over the prompt's tokens and the steered ones so far.

        prompt_means: gives the prompts' means [B, C] and numbers of tokens [B]; called once.
        """
        if self.total_BC is None or self.count_B1 is None:
            prompt_mean_BC, prompt_tokens_B = prompt_means()
            self.count_B1 = prompt_tokens_B[:, None].to(acts_BC.dtype)
            self.total_BC = prompt_mean_BC * self.count_B1
        self.total_BC, self.count_B1 = self.total_BC + acts_BC, self.count_B1 + 1
        return self.total_BC / self.count_B1

    def past(self, of_prompt: Callable[[], Tensor]) -> Tensor:
        """log Σ exp ‖logits‖ over the earlier tokens [B].

        of_prompt: gives it for the first, -inf where the prompt doesn't count; called once.
        """
        if self.past_B is None:
            self.past_B = of_prompt()
        return self.past_B

    def prompt_tokens(self, lengths: Callable[[], Tensor]) -> Tensor:
        """Tokens of the rows' prompts [B]. lengths: gives them; called once."""
        if self.prompt_tokens_B is None:
            self.prompt_tokens_B = lengths()
        return self.prompt_tokens_B

    def note(self, length_B: Tensor | None) -> None:
        """Take in what the stages noted at this token: ‖logits‖, where one asks for it later."""
        if length_B is not None:
            assert self.past_B is not None
            self.past_B = torch.logaddexp(self.past_B, length_B)

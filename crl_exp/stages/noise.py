"""Exploration noise. It changes which feature is chosen, never the probability recorded for it.

Every stage here is the identity unless `context.explore` is set. Shapes: B rows, C features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.stages.base import Stage, StageContext


@dataclass(eq=False)
class NoNoise(Stage):
    """No exploration beyond the policy's own sampling."""

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC


@dataclass(eq=False)
class Gaussian(Stage):
    """logits + std · N(0, 1)."""

    std: float

    def faults(self) -> list[str]:
        return [] if self.std >= 0 else [f"noise.std={self.std}: must be 0 or more"]

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        if not context.explore:
            return logits_BC
        noise_BC = torch.randn(
            logits_BC.shape, generator=context.generator, device=logits_BC.device
        )
        return logits_BC + self.std * noise_BC


@dataclass(eq=False)
class EpsilonGreedy(Stage):
    """With probability epsilon a row's logits are made equal, so that it chooses evenly.

    Stages after this one still apply: with the mask behind it, the choice is among unmasked ones.
    """

    epsilon: float

    def faults(self) -> list[str]:
        ok = 0 <= self.epsilon <= 1
        return [] if ok else [f"noise.epsilon={self.epsilon}: must be in [0, 1]"]

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        if not context.explore:
            return logits_BC
        draw_B1 = torch.rand(
            logits_BC.shape[:1], generator=context.generator, device=logits_BC.device
        )[:, None]
        return torch.where(draw_B1 < self.epsilon, 0.0, logits_BC)

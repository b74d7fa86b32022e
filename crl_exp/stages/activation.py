"""Activations of the policy's logits. Shapes: B rows, C allowed features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.stages.base import Stage, StageContext


@dataclass(eq=False)
class Identity(Stage):
    """logits as they are."""

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC


@dataclass(eq=False)
class JumpReLU(Stage):
    """z · 1[z > θ] (arXiv 2407.14435), with θ a constant or the critic's value.

    A logit at or below the threshold becomes 0, not -inf: the feature stays possible.
    threshold: θ, or null for the critic's value V(s) of the row.
    """

    threshold: float | None

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        if self.threshold is None:
            # The critic has its own loss; the policy's gradient must not move the threshold.
            theta_B1 = context.value_B.detach()[:, None]
        else:
            theta_B1 = torch.full_like(logits_BC[:, :1], self.threshold)
        return logits_BC * (logits_BC > theta_B1)

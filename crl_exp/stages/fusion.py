"""Fusion: how the correlation found in stage 1 enters the policy's logits.

Shapes: B rows, C allowed features. Source: CRL, arXiv 2602.10437.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crl_exp.stages.base import Stage, StageContext


@dataclass(eq=False)
class Add(Stage):
    """logits + weight · corr. With a zero policy the best correlated feature has the top logit."""

    weight: float

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC + self.weight * context.correlation_C


@dataclass(eq=False)
class Multiply(Stage):
    """logits × corr. No weight to set; a zero policy stays uniform."""

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC * context.correlation_C

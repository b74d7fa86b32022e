"""Adaptive feature masking: features that may not be chosen at this token get -inf.

Where a mask leaves nothing, nothing is added at that token. Shapes: B rows, C allowed features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.stages.base import Stage, StageContext


@dataclass(eq=False)
class NoMask(Stage):
    """Every allowed feature may be chosen."""

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC


@dataclass(eq=False)
class Active(Stage):
    """Only features active at this token."""

    needs_feature_acts = True

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        assert context.feature_acts_BC is not None
        return logits_BC.masked_fill(context.feature_acts_BC <= 0, -torch.inf)

"""Adaptive feature masking: features that may not be chosen at this token get -inf.

Where a mask leaves nothing, nothing is added at that token; such tokens are counted
(`unsteered_tokens` of the journal and the result). Shapes: B rows, C allowed features.
Source: CRL, arXiv 2602.10437.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.steering.stages.base import Shape, Stage, StageContext, check_left


@dataclass(eq=False)
class NoMask(Stage):
    """Every allowed feature may be chosen."""

    plain = True
    bars = False

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC


@dataclass(eq=False)
class Active(Stage):
    """Only features active at this token. Reported: an idea."""

    needs = frozenset({"feature_acts"})

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        assert context.at.feature_acts_BC is not None
        return logits_BC.masked_fill(context.at.feature_acts_BC <= 0, -torch.inf)


@dataclass(eq=False)
class Inactive(Stage):
    """Only features not active at this token. Reported: an idea."""

    needs = frozenset({"feature_acts"})

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        assert context.at.feature_acts_BC is not None
        return logits_BC.masked_fill(context.at.feature_acts_BC > 0, -torch.inf)


@dataclass(eq=False)
class Generation(Stage):
    """Only features active at this or an earlier steered token of the answer.

    The last prompt token counts, as it makes the answer's first: in an answer of one token this
    is `active`. Reported: 78 for masking and JumpReLU together.
    """

    needs = frozenset({"seen"})

    def cautions(self, n_tokens: int, k: int) -> list[str]:
        if n_tokens > 1:
            return []
        return ["mask=generation: in answers of one token it is mask=active"]

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        assert context.at.seen_BC is not None
        return logits_BC.masked_fill(~context.at.seen_BC, -torch.inf)


@dataclass(eq=False)
class Everything(Stage):
    """Only features of high mean activation over all tokens of the prompt and the answer so far.

    The prompt's first token is left out: its residual is an outlier in most models. Features with
    a mean of 0 are dropped in any case. keep: share of the allowed features that stays, those of
    the highest mean. Reported: 78 for masking and JumpReLU together.
    """

    keep: float
    needs = frozenset({"importance"})

    def faults(self) -> list[str]:
        ok = 0 < self.keep <= 1
        return [] if ok else [f"mask.keep={self.keep}: must be in (0, 1]"]

    def bind(self, shape: Shape) -> None:
        check_left(f"mask.keep={self.keep}", self._kept(shape.n_features), shape)

    def _kept(self, n_features: int) -> int:
        return max(1, round(self.keep * n_features))

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        importance_BC = context.at.importance_BC
        assert importance_BC is not None
        floor_B1 = importance_BC.topk(self._kept(importance_BC.shape[1]), dim=1).values[:, -1:]
        low_BC = (importance_BC < floor_B1) | (importance_BC <= 0)
        return logits_BC.masked_fill(low_BC, -torch.inf)

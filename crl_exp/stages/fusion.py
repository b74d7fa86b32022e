"""Fusion: how the score found in stage 1 (`corr`) enters the policy's logits.

Negative correlations are `warmup.negative`'s part: kept, clipped at 0, or steered with a negative
coefficient, in which case `corr` is the absolute value.
Shapes: B rows, C allowed features. Source: CRL, arXiv 2602.10437.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crl_exp.stages.base import Shape, Stage, StageContext, in_share, quantile


@dataclass(eq=False)
class Add(Stage):
    """logits + weight · corr. With a zero policy the best correlated feature has the top logit.
    Reported: baseline.
    """

    weight: float

    def faults(self) -> list[str]:
        return _finite("weight", self.weight)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC + self.weight * context.correlation_C


@dataclass(eq=False)
class Multiply(Stage):
    """logits × corr. No weight to set; a zero policy stays uniform. Reported: held (73)."""

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC * context.correlation_C


@dataclass(eq=False)
class OneOrCorr(Stage):
    """logits × (corr where the feature is selected by corr, else 1). Reported: an idea.

    quantile: selected are the features whose corr is at or above this quantile.
    """

    quantile: float

    def faults(self) -> list[str]:
        return in_share("fusion.quantile", self.quantile)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        corr_BC = context.correlation_C.expand_as(logits_BC)
        floor_B1 = quantile(corr_BC, torch.zeros_like(corr_BC).bool(), self.quantile)
        return logits_BC * torch.where(corr_BC >= floor_B1, corr_BC, 1.0)


@dataclass(eq=False)
class LearnableMix(Stage):
    """logits + m · corr, m learned with the policy. init: m at the start. Reported: same."""

    init: float

    def faults(self) -> list[str]:
        return _finite("init", self.init)

    def bind(self, shape: Shape) -> None:
        self.m = nn.Parameter(torch.tensor(float(self.init)))

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC + self.m * context.correlation_C


@dataclass(eq=False)
class ContextScale(Stage):
    """logits + weight · sigmoid(‖s‖) · corr, ‖s‖ standardised as raw lengths saturate the sigmoid.
    Reported: decreased.
    """

    weight: float
    needs = frozenset({"length"})

    def faults(self) -> list[str]:
        return _finite("weight", self.weight)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        assert context.length_B is not None
        share_B1 = context.length_B.sigmoid()[:, None]
        return logits_BC + self.weight * share_B1 * context.correlation_C


@dataclass(eq=False)
class PositionLinear(Stage):
    """logits + weight · linspace(start, end)[t] · corr over the answer's tokens t.

    The line ends at task.max_new_tokens; where that is 1 the factor is `start`. Reported: same;
    late emphasis lower.
    """

    weight: float
    start: float
    end: float

    def faults(self) -> list[str]:
        return [f for n in ("weight", "start", "end") for f in _finite(n, getattr(self, n))]

    def bind(self, shape: Shape) -> None:
        self.n_tokens = shape.n_tokens

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        step = (self.end - self.start) / max(self.n_tokens - 1, 1)
        share_B1 = (self.start + step * context.at.token_index_B)[:, None]
        return logits_BC + self.weight * share_B1 * context.correlation_C


@dataclass(eq=False)
class Attention(Stage):
    """logits + weight · softmax(‖logits‖)[t] · corr, over the answer's tokens up to this one.

    Later tokens can't be known; earlier tokens' lengths are taken as they were, without gradient.
    Reported: same.
    """

    weight: float
    needs = frozenset({"past"})

    def faults(self) -> list[str]:
        return _finite("weight", self.weight)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        assert context.at.past_B is not None
        length_B = logits_BC.norm(dim=1)
        context.noted["length_B"] = length_B.detach()
        # exp(n) / (exp(past) + exp(n)), where past is the log of the earlier tokens' sum.
        share_B1 = (length_B - context.at.past_B).sigmoid()[:, None]
        return logits_BC + self.weight * share_B1 * context.correlation_C


def _finite(name: str, value: float) -> list[str]:
    return [] if math.isfinite(value) else [f"fusion.{name}={value}: must be a finite number"]

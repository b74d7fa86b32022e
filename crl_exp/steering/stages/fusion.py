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
from torch.nn.functional import softplus

from crl_exp.config.errors import did_you_mean
from crl_exp.steering.stages.barred import quantile
from crl_exp.steering.stages.base import Shape, Stage, StageContext, in_share

NEGATIVES = ("raw", "softplus")
SELECTS = ("quantile", "active", "inactive")
SELECTED = ("one", "corr")
OVER = ("answer", "sequence")


@dataclass(eq=False)
class Add(Stage):
    """logits + weight · corr. With a zero policy the best correlated feature has the top logit.
    Reported: baseline.
    """

    weight: float

    bars = False

    def faults(self) -> list[str]:
        return _finite("weight", self.weight)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC + self.weight * context.correlation_C


@dataclass(eq=False)
class Multiply(Stage):
    """logits × corr. No weight to set; a zero policy stays uniform. Reported: held (73).

    negative: of logits below 0. raw, as published: −1 · −.5 = .5, two negatives make a preference.
        softplus: softplus(logits) × corr, −.157 there; then a negative corr always weighs against a
        feature, and a zero policy follows the correlation.
    """

    negative: str

    bars = False

    def faults(self) -> list[str]:
        return _one_of("negative", self.negative, NEGATIVES)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        kept_BC = softplus(logits_BC) if self.negative == "softplus" else logits_BC
        return kept_BC * context.correlation_C


@dataclass(eq=False)
class OneOrCorr(Stage):
    """logits × (1 or corr). Reported: an idea.

    A reading: the author's notes say "1 or corr" among ideas for masks, and no more. Here the
    selected features keep their logits and those of the others shrink to corr of them, so that of
    equal logits above 0 those selected are preferred.
    select: which features are selected: quantile, those of the highest corr; active, those active
        at this token; inactive, the others.
    quantile: with select=quantile, those whose corr is at or above this quantile.
    selected: what they are multiplied by. one, and the others by corr; or corr, and the others by
        1, which gives a selected feature *less* of the same logit (corr ≤ 1): what earlier versions
        did, kept for their runs.
    """

    quantile: float
    select: str
    selected: str

    bars = False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.select == "quantile" else frozenset({"feature_acts"})

    def faults(self) -> list[str]:
        found = in_share("fusion.quantile", self.quantile)
        found += _one_of("select", self.select, SELECTS)
        return found + _one_of("selected", self.selected, SELECTED)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        corr_BC = context.correlation_C.expand_as(logits_BC)
        if self.select == "quantile":
            everywhere_BC = torch.zeros_like(corr_BC).bool()
            selected_BC = corr_BC >= quantile(corr_BC, everywhere_BC, self.quantile)
        else:
            assert context.at.feature_acts_BC is not None
            active_BC = context.at.feature_acts_BC > 0
            selected_BC = active_BC if self.select == "active" else ~active_BC
        by_corr_BC = selected_BC if self.selected == "corr" else ~selected_BC
        return logits_BC * torch.where(by_corr_BC, corr_BC, 1.0)


@dataclass(eq=False)
class LearnableMix(Stage):
    """logits + m · corr, m learned with the policy. init: m at the start. Reported: same."""

    init: float

    bars = False

    def faults(self) -> list[str]:
        return _finite("init", self.init)

    def bind(self, shape: Shape) -> None:
        self.m = nn.Parameter(torch.tensor(float(self.init)))

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC + self.m * context.correlation_C


@dataclass(eq=False)
class ContextScale(Stage):
    """logits + weight · sigmoid(‖s‖) · corr. Reported: decreased.

    standardise: ‖s‖ by stage 1's mean and deviation. false, the author's (`context_scale_author`):
        the residual's own length, which is in the tens or hundreds, so that the sigmoid is 1 and
        this is `add`.
    """

    weight: float
    standardise: bool
    needs = frozenset({"length"})
    bars = False

    def faults(self) -> list[str]:
        return _finite("weight", self.weight)

    def cautions(self, n_tokens: int, k: int) -> list[str]:
        if self.standardise:
            return []
        return [
            "fusion=context_scale_author: the sigmoid of a residual's own length is 1, which makes "
            f"it fusion=add fusion.weight={self.weight:g}"
        ]

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        length_B = context.length_B if self.standardise else context.norm_B
        assert length_B is not None
        return logits_BC + self.weight * length_B.sigmoid()[:, None] * context.correlation_C


@dataclass(eq=False)
class PositionLinear(Stage):
    """logits + weight · linspace(start, end) · corr, the line over the tokens. Reported: same; late
    emphasis lower.

    start, end: .1 and 1 is late emphasis, 1 and .1 early emphasis.
    over: answer, the line runs over the answer's tokens and ends at task.max_new_tokens; where that
        is 1 the factor is `start`. sequence, the author's (`position_linear_author`): over all
        positions, the prompt's too, up to where the longest answer would be steered last; behind a
        long prompt a short answer has nearly `end` throughout.
    """

    weight: float
    start: float
    end: float
    over: str

    bars = False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"prompt_tokens"} if self.over == "sequence" else ())

    def faults(self) -> list[str]:
        found = [f for n in ("weight", "start", "end") for f in _finite(n, getattr(self, n))]
        return found + _one_of("over", self.over, OVER)

    def cautions(self, n_tokens: int, k: int) -> list[str]:
        if n_tokens > 1:
            return []
        weight = self.weight * (self.start if self.over == "answer" else self.end)
        return [
            "fusion=position_linear: in answers of one token it is fusion=add "
            f"fusion.weight={weight:g}"
        ]

    def bind(self, shape: Shape) -> None:
        self.n_tokens = shape.n_tokens

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        if self.over == "answer":
            step = (self.end - self.start) / max(self.n_tokens - 1, 1)
            share_B1 = (self.start + step * context.at.token_index_B)[:, None]
        else:
            assert context.at.prompt_tokens_B is not None
            before_B = context.at.prompt_tokens_B - 1
            last_B = (before_B + self.n_tokens - 1).clamp(min=1)
            passed_B = (before_B + context.at.token_index_B) / last_B
            share_B1 = (self.start + (self.end - self.start) * passed_B)[:, None]
        return logits_BC + self.weight * share_B1 * context.correlation_C


@dataclass(eq=False)
class Attention(Stage):
    """logits + weight · softmax(‖logits‖)[t] · corr over the tokens up to this one. Reported: same.

    Later tokens can't be known; earlier tokens' lengths are taken as they were, without gradient.
    over: answer, the answer's tokens; with one token the share is 1, and this is `add`. sequence,
        the author's (`attention_author`): the prompt's tokens too, by the lengths of the policy's
        own logits there, before any stage.
    """

    weight: float
    over: str

    bars = False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"past", "prompt_past"} if self.over == "sequence" else {"past"})

    def faults(self) -> list[str]:
        return _finite("weight", self.weight) + _one_of("over", self.over, OVER)

    def cautions(self, n_tokens: int, k: int) -> list[str]:
        if n_tokens > 1 or self.over == "sequence":
            return []
        return [
            "fusion=attention: in answers of one token it is fusion=add "
            f"fusion.weight={self.weight:g}"
        ]

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        assert context.at.past_B is not None
        length_B = logits_BC.norm(dim=1)
        context.noted["length_B"] = length_B.detach()
        # exp(n) / (exp(past) + exp(n)), where past is the log of the earlier tokens' sum.
        share_B1 = (length_B - context.at.past_B).sigmoid()[:, None]
        return logits_BC + self.weight * share_B1 * context.correlation_C


def _finite(name: str, value: float) -> list[str]:
    return [] if math.isfinite(value) else [f"fusion.{name}={value}: must be a finite number"]


def _one_of(name: str, value: str, known: tuple[str, ...]) -> list[str]:
    if value in known:
        return []
    near = did_you_mean(value, known)
    return [f"fusion.{name}={value}: must be one of {', '.join(known)}{near}"]

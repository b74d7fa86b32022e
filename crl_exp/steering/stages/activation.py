"""Activations of the policy's logits; those with a threshold are in `stages.threshold`.

Several of them turn logits into probabilities. These are used as the new logits, times `scale`:
softmax takes them once more, and probabilities alone would leave it nearly flat.
Shapes: B rows, C allowed features, D d_model. Source: CRL, arXiv 2602.10437.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crl_exp.config.errors import did_you_mean
from crl_exp.steering.policy.algorithms import Algorithm
from crl_exp.steering.policy.config import PolicyConfig
from crl_exp.steering.stages.barred import masked_softmax, quantile
from crl_exp.steering.stages.base import Shape, Stage, StageContext, check_left, in_share, positive

STE_VALUES = ("probability", "one_hot")


@dataclass(eq=False)
class Identity(Stage):
    """Logits as they are."""

    plain = True
    bars = False

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC


@dataclass(eq=False)
class Softmax(Stage):
    """scale · softmax(z / temperature).

    A reading: the author's notes say "loss softmax" and may mean a softmax in the loss, where ours
    always has one. As it keeps the order of the logits, the top features stay the same ones: it
    changes how a rollout samples. Reported: usually lower.
    """

    temperature: float
    scale: float

    bars = False

    def faults(self) -> list[str]:
        return _positive(self, "temperature", "scale")

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return self.scale * masked_softmax(logits_BC / self.temperature, context.barred_BC)


@dataclass(eq=False)
class GumbelTopK(Stage):
    """z / temperature: Gumbel top-k is sampling without replacement from softmax(z / temperature).

    A rollout adds Gumbel noise to the pipeline's last logits and takes the policy.k highest, which
    is a draw from Plackett-Luce (Kool et al. 2019, arXiv 1903.06059) with every activation; this
    one sets its temperature, and at 1 is `identity`. The probability recorded is that of the act.
    top: features that a draw keeps, null for policy.k. The first k of a longer draw are a draw of
        k, so more than policy.k changes nothing. Unlike the author's (`gumbel_topk_author`) an
        evaluation takes the highest logits. Reported: drops.
    """

    temperature: float
    top: int | None

    bars = False

    def faults(self) -> list[str]:
        found = _positive(self, "temperature")
        ok = self.top is None or self.top >= 1
        return found + ([] if ok else [f"activation.top={self.top}: must be 1 or more, or null"])

    def conflicts(self, policy: PolicyConfig, algorithm: Algorithm) -> list[str]:
        return [] if self.top is None else _too_few(self.top, policy)

    def cautions(self, n_tokens: int, k: int) -> list[str]:
        found = []
        if self.temperature == 1:
            found.append(
                "activation=gumbel_topk: with temperature 1 it is activation=identity, as every "
                "rollout samples by Gumbel top-k"
            )
        if self.top is not None and self.top > k:
            found.append(
                f"activation.top={self.top}: does nothing, as the first policy.k={k} of a longer "
                "draw are a draw of so many; set activation.top=null"
            )
        return found

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC / self.temperature


@dataclass(eq=False)
class STETopK(Stage):
    """Forward scale · v at the `top` highest, else 0; backward the gradient of scale · p at every
    feature, p = softmax(z / temperature) (straight-through, arXiv 1308.3432).

    value: v, `probability` for p itself, or `one_hot` for 1, the author's (`ste_topk_author`, with
        scale 1 and top 1; its logits, 1 and 0, leave a sampled choice nearly even). With
        `probability` the order among the top and how sure the policy is go on. Reported: held.
    """

    temperature: float
    scale: float
    top: int
    value: str

    bars = False

    def faults(self) -> list[str]:
        found = _positive(self, "temperature", "scale")
        if self.top < 1:
            found.append(f"activation.top={self.top}: must be 1 or more")
        if self.value not in STE_VALUES:
            near = did_you_mean(self.value, STE_VALUES)
            found.append(f"activation.value={self.value}: must be probability or one_hot{near}")
        return found

    def conflicts(self, policy: PolicyConfig, algorithm: Algorithm) -> list[str]:
        return _too_few(self.top, policy)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        soft_BC = masked_softmax(logits_BC / self.temperature, context.barred_BC)
        top_BC = top_mask(logits_BC, context.barred_BC, self.top)
        hard_BC = top_BC.to(soft_BC.dtype) if self.value == "one_hot" else soft_BC * top_BC
        return self.scale * straight_through(hard_BC, soft_BC)


@dataclass(eq=False)
class SparseGate(Stage):
    """z · 1[g > threshold], g = sigmoid(a learned number a feature); backward as if z · g.

    The step has no gradient, so it is passed straight through (arXiv 1308.3432); z gets that of
    the forward pass. Unlike the author's (`sparse_gate_author`) the gates learn, and they don't
    hold the correlation. init: g at the start. Reported: held.
    """

    threshold: float
    init: float

    bars = False

    def faults(self) -> list[str]:
        found = []
        for name in ("threshold", "init"):
            if not 0 < getattr(self, name) < 1:
                found.append(f"activation.{name}={getattr(self, name)}: must be between 0 and 1")
        return found

    def bind(self, shape: Shape) -> None:
        init = torch.tensor(self.init).logit()
        self.gate_C = nn.Parameter(init.expand(shape.n_features).clone())

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        soft_C = self.gate_C.sigmoid()
        hard_C = (soft_C > self.threshold).to(soft_C.dtype)
        return logits_BC * straight_through(hard_C, soft_C)


@dataclass(eq=False)
class SparseAttention(Stage):
    """z · n · softmax(W s + b) over the n features of the top correlation quantile; others barred.

    The weights' mean is 1, and they start even, so that an untrained attention changes no logit.
    Unlike the author's (`sparse_attention_author`) it weighs z in place of replacing it, reads the
    residual s, and bars. quantile: features whose score in stage 1 is below it are barred.
    Reported: held.
    """

    quantile: float

    def faults(self) -> list[str]:
        return in_share("activation.quantile", self.quantile)

    def bind(self, shape: Shape) -> None:
        kept = shape.n_features - math.floor(self.quantile * (shape.n_features - 1))
        check_left(f"activation.quantile={self.quantile}", kept, shape)
        self.attention = nn.Linear(shape.d_model, shape.n_features)
        nn.init.zeros_(self.attention.weight)
        nn.init.zeros_(self.attention.bias)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        scores_BC = context.correlation_C.expand_as(logits_BC)
        low_BC = scores_BC < quantile(scores_BC, torch.zeros_like(scores_BC).bool(), self.quantile)
        assert context.barred_BC is not None
        out_BC = low_BC | context.barred_BC
        weight_BC = masked_softmax(self.attention(context.at.obs_BD), out_BC)
        n_B1 = (~out_BC).sum(dim=1, keepdim=True)
        return (logits_BC * n_B1 * weight_BC).masked_fill(out_BC, -torch.inf)


def top_mask(values_BC: Tensor, barred_BC: Tensor | None, top: int) -> Tensor:
    """True at the `top` highest values of each row that aren't barred."""
    if barred_BC is not None:
        values_BC = values_BC.masked_fill(barred_BC, -torch.inf)
    index_BK = values_BC.topk(min(top, values_BC.shape[1]), dim=1).indices
    return torch.zeros_like(values_BC, dtype=torch.bool).scatter(1, index_BK, True)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft`."""
    return hard.detach() + (soft - soft.detach())


def _positive(stage: Stage, *names: str) -> list[str]:
    return [f for name in names for f in positive(f"activation.{name}", getattr(stage, name))]


def _too_few(top: int, policy: PolicyConfig) -> list[str]:
    if top >= policy.k:
        return []
    return [
        f"activation.top={top} leaves fewer features than policy.k={policy.k}; "
        f"set activation.top={policy.k}"
    ]

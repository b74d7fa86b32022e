"""Activations in the form in which the author wrote them; ours are in `stages.activation`.

Shapes: B rows, C allowed features. Source: CRL, arXiv 2602.10437, and its author's notes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crl_exp.config.errors import UserError
from crl_exp.steering.policy.algorithms import Algorithm
from crl_exp.steering.policy.config import PolicyConfig
from crl_exp.steering.stages.barred import masked_softmax, quantile
from crl_exp.steering.stages.base import Shape, Stage, StageContext, in_share

MOST_WEIGHTS = 2**28
"""Of one layer's attention: 1 GiB in float32, four times that with Adam and the mean."""


@dataclass(eq=False)
class AlwaysGumbel(Stage):
    """Of (z + Gumbel noise) / T the highest is kept, when the policy is evaluated too.

    That is a draw from softmax(z), whatever T, which changes no order and so isn't a value here;
    the probability recorded is that of the draw. Unlike `gumbel_topk` an evaluation samples too, by
    the run's seed. As one feature is kept, nothing after it in `order` could choose another: it
    has to be last, or be followed by noise=none and mask=none. Reported: drops.
    """

    samples = True
    bars = False

    def conflicts(self, policy: PolicyConfig, algorithm: Algorithm) -> list[str]:
        if policy.k == 1:
            return []
        return [
            f"activation=gumbel_topk_author keeps one feature, but policy.k={policy.k}; set "
            "policy.k=1, or choose activation=gumbel_topk"
        ]

    def conflicts_behind(self, later: dict[str, Stage]) -> list[str]:
        found = sorted(name for name, stage in later.items() if not stage.plain)
        if not found:
            return []
        return [
            "activation=gumbel_topk_author keeps one feature, which what comes behind it "
            f"({', '.join(found)}) can't change, only bar; set order=[fusion,noise,mask,activation]"
        ]

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC


@dataclass(eq=False)
class AdditiveGate(Stage):
    """z · 1[sigmoid(gate) + corr > threshold]; others 0.

    The comparison is hard and passes no gradient, so that gate and threshold, meant to be learned,
    stay as they start: here they are numbers. At gate 1 and threshold .5 a feature is closed where
    corr ≤ −.231. Unlike `sparse_gate`, whose gates learn straight through. Reported: held.
    """

    gate: float
    threshold: float

    bars = False

    def faults(self) -> list[str]:
        return [
            f"activation.{name}={getattr(self, name)}: must be a finite number"
            for name in ("gate", "threshold")
            if not abs(getattr(self, name)) < float("inf")
        ]

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        gate = torch.tensor(self.gate, dtype=logits_BC.dtype).sigmoid().to(logits_BC.device)
        return logits_BC * (gate + context.correlation_C > self.threshold)


@dataclass(eq=False)
class ReplacingAttention(Stage):
    """softmax(W z + b) · 1[corr > its quantile] in place of z; others 0.

    Unlike `sparse_attention` nothing is barred, and the new logits lie between 0 and 1, so that a
    sampled choice is nearly even. W [C, C] and b start at random, as a linear layer's do.
    quantile: of stage 1's scores. Reported: held.
    """

    quantile: float

    bars = False

    def faults(self) -> list[str]:
        return in_share("activation.quantile", self.quantile)

    def bind(self, shape: Shape) -> None:
        if shape.n_features**2 > MOST_WEIGHTS:
            raise UserError(
                "activation=sparse_attention_author has a weight for each pair of the features "
                f"that may be steered, {shape.n_features}² = {shape.n_features**2:.1e} a layer; "
                "raise warmup.min_frequency so that fewer are left, or choose "
                "activation=sparse_attention"
            )
        self.attention = nn.Linear(shape.n_features, shape.n_features)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        scores_BC = context.correlation_C.expand_as(logits_BC)
        floor_B1 = quantile(scores_BC, torch.zeros_like(scores_BC).bool(), self.quantile)
        weight_BC = masked_softmax(self.attention(logits_BC), context.barred_BC)
        return weight_BC * (scores_BC > floor_B1)

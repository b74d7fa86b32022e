"""JumpReLU, z · 1[z > θ] (arXiv 2407.14435), with θ from four sources.

A logit at or below the threshold becomes 0, not -inf: the feature stays possible. It gets no
gradient while it is there, so a policy whose logits all start below θ can't move them.
stage1: stage 1's scores pass the same threshold before the fusion reads them.
Shapes: B rows, C allowed features, X one value or C values a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crl_exp.steering.policy.algorithms import Algorithm
from crl_exp.steering.policy.config import PolicyConfig
from crl_exp.steering.stages.barred import quantile
from crl_exp.steering.stages.base import Shape, Stage, StageContext, in_share, positive


@dataclass(eq=False)
class JumpReLU(Stage):
    """z · 1[z > θ], θ a constant or the critic's value. Reported: slightly lower alone, 78 with
    masking.

    threshold: θ, or null for the critic's: V(s) of the row, or with a Q critic Q(s, j) of each
        feature. The author's is V(s) on noisy z: noise before it in `order`, and
        noise.on_policy=true so that the update has it too.
    """

    threshold: float | None
    stage1: bool

    bars = False

    def faults(self) -> list[str]:
        if self.threshold is None or math.isfinite(self.threshold):
            return []
        return [f"activation.threshold={self.threshold}: must be a finite number or null"]

    def conflicts(self, policy: PolicyConfig, algorithm: Algorithm) -> list[str]:
        if self.threshold is not None or algorithm.uses_critic:
            return []
        return [
            f"activation=jumprelu takes its threshold from the critic, but {algorithm.name} has "
            "none; set activation.threshold=0.1, or choose activation=jumprelu_quantile or "
            "algorithm=ppo"
        ]

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        if self.threshold is not None:
            return logits_BC * (logits_BC > self.threshold)
        assert context.value_BX is not None
        # The critic has its own loss; the policy's gradient must not move the threshold.
        return logits_BC * (logits_BC > context.value_BX.detach())


@dataclass(eq=False)
class QuantileJumpReLU(Stage):
    """z · 1[z > θ], θ the quantile of the row's logits that aren't barred; no gradient to θ."""

    quantile: float
    stage1: bool

    bars = False

    def faults(self) -> list[str]:
        return in_share("activation.quantile", self.quantile)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        assert context.barred_BC is not None
        theta_B1 = quantile(logits_BC.detach(), context.barred_BC, self.quantile)
        return logits_BC * (logits_BC > theta_B1)


@dataclass(eq=False)
class LearnableJumpReLU(Stage):
    """z · 1[z > θ_j], one θ a feature, learned as exp(log θ) like the thresholds of JumpReLU SAEs.

    Its gradient is the straight-through one of that paper (eq. 11): −(θ/ε) · 1[|z − θ| < ε/2].
    init: θ at the start. bandwidth: ε.
    """

    init: float
    bandwidth: float
    stage1: bool

    bars = False

    def faults(self) -> list[str]:
        init = positive("activation.init", self.init)
        return init + positive("activation.bandwidth", self.bandwidth)

    def bind(self, shape: Shape) -> None:
        self.log_theta_C = nn.Parameter(torch.full((shape.n_features,), math.log(self.init)))

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        theta_BC = self.log_theta_C.exp().expand_as(logits_BC)
        made = _Jump.apply(logits_BC, theta_BC, self.bandwidth)
        assert isinstance(made, Tensor)
        return made


class _Jump(torch.autograd.Function):
    """JumpReLU with the pseudo-derivative of arXiv 2407.14435 for the threshold."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z_BC: Tensor, theta_BC: Tensor, bandwidth: float) -> Tensor:  # type: ignore[override]
        return z_BC * (z_BC > theta_BC)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # type: ignore[override]
        z_BC, theta_BC, ctx.bandwidth = inputs
        ctx.save_for_backward(z_BC, theta_BC)

    @staticmethod
    def backward(ctx: Any, grad_BC: Tensor):  # type: ignore[override]
        z_BC, theta_BC = ctx.saved_tensors
        near_BC = (z_BC - theta_BC).abs() < ctx.bandwidth / 2
        return grad_BC * (z_BC > theta_BC), -grad_BC * theta_BC / ctx.bandwidth * near_BC, None

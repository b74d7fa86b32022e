"""Exploration noise: it changes which feature a rollout chooses, and nothing in an evaluation.

Off-policy by intent: the probability recorded for a choice is the policy's own, without the noise.
With `on_policy` it is that of the act, given the noise drawn at that token; the update draws the
same noise again, so that its ratio too is of the policy that acted.
The null action (`policy.null_action`) gets noise like any other, and an even choice has it in it.
Every stage here is the identity unless `context.explore` is set. Its strength follows a schedule
over the training: constant, linear to 0, or cosine to 0. Shapes: B rows, C features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.config.errors import did_you_mean
from crl_exp.steering.stages.base import Stage, StageContext

SCHEDULES = ("constant", "linear", "cosine")


def scheduled(schedule: str, progress: float | Tensor) -> float | Tensor:
    """Share of the strength left when this share of the training is done: 1, 1 − p, or
    (1 + cos πp) / 2. progress: a number, or a tensor [] or [B, 1]."""
    assert schedule in SCHEDULES
    if schedule == "linear":
        return 1 - progress
    if schedule == "constant":
        return 1.0
    turned = math.pi * progress
    return (1 + (turned.cos() if isinstance(turned, Tensor) else math.cos(turned))) / 2


def _schedule_faults(schedule: str) -> list[str]:
    if schedule in SCHEDULES:
        return []
    near = did_you_mean(schedule, SCHEDULES)
    return [f"noise.schedule={schedule}: must be one of {', '.join(SCHEDULES)}{near}"]


@dataclass(eq=False)
class NoNoise(Stage):
    """No exploration beyond the policy's own sampling."""

    plain = True
    bars = False

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        return logits_BC


@dataclass(eq=False)
class Gaussian(Stage):
    """logits + std · N(0, 1). Reported: open, where it goes in the order too.

    schedule: of std over the training: constant, linear or cosine.
    on_policy: false, off-policy by intent: the probability recorded is that without the noise, so
        that PPO's ratio isn't of the policy that acted. true: that of the act, given the noise.
    """

    std: float
    schedule: str
    on_policy: bool

    explores = True
    acts_on_null = True
    bars = False

    def faults(self) -> list[str]:
        found = [] if self.std >= 0 else [f"noise.std={self.std}: must be 0 or more"]
        return found + _schedule_faults(self.schedule)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        if not context.explore:
            return logits_BC
        assert context.draws is not None
        noise_BC = context.draws.normal(logits_BC.shape[1])
        return logits_BC + self.std * scheduled(self.schedule, context.progress) * noise_BC


@dataclass(eq=False)
class EpsilonGreedy(Stage):
    """With probability epsilon a row's logits are made equal, so that it chooses evenly.

    Stages after this one still apply: with the mask behind it, the choice is among unmasked ones.
    schedule: of epsilon over the training: constant, linear or cosine. Reported: open.
    on_policy: false, off-policy by intent: the probability recorded is the policy's own, which for
        an even choice may be far from that of the act. true: that of the act, given which of the
        two was drawn; even choices then teach the policy nothing.
    """

    epsilon: float
    schedule: str
    on_policy: bool

    explores = True
    acts_on_null = True
    bars = False

    def faults(self) -> list[str]:
        ok = 0 <= self.epsilon <= 1
        found = [] if ok else [f"noise.epsilon={self.epsilon}: must be in [0, 1]"]
        return found + _schedule_faults(self.schedule)

    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        if not context.explore:
            return logits_BC
        assert context.draws is not None
        draw_B1 = context.draws.uniform(1)
        epsilon = self.epsilon * scheduled(self.schedule, context.progress)
        return torch.where(draw_B1 < epsilon, 0.0, logits_BC)

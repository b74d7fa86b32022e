"""Correlations that go on being measured in stage 2 (`method.online_correlation`).

The moments of stage 1 are carried on, and every rollout's answers are merged into them. A chosen
feature counts at its added coefficient in place of its activation.
Shapes: B answers, C allowed features, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crl_exp.generation.results import Generation, Step
from crl_exp.steering.feature_statistics.config import WarmupConfig
from crl_exp.steering.feature_statistics.correlation import Moments
from crl_exp.steering.feature_statistics.scores import handle_negative
from crl_exp.steering.policy.actions import Actions


class OnlineCorrelation(nn.Module):
    """Moments of the allowed features as buffers, so that a checkpoint holds them."""

    origin_C: Tensor
    mean_C: Tensor
    m2_C: Tensor
    cov_C: Tensor

    def __init__(self, moments: Moments, allowed_C: Tensor, pooling: str, negative: str):
        super().__init__()
        self.pooling, self.negative = pooling, negative
        for name in ("origin", "mean", "m2", "cov"):
            self.register_buffer(f"{name}_C", getattr(moments, f"{name}_F")[allowed_C].double())
        for name in ("origin_y", "mean_y", "m2_y", "n"):
            value = torch.tensor(float(getattr(moments, name)), dtype=torch.float64)
            self.register_buffer(name, value)

    def moments(self) -> Moments:
        def scalar(name: str) -> float:
            return float(getattr(self, name))

        return Moments(
            int(scalar("n")), self.origin_C, scalar("origin_y"), self.mean_C, scalar("mean_y"),
            self.m2_C, scalar("m2_y"), self.cov_C,
        )  # fmt: skip

    def update(self, z_BC: Tensor, reward_B: Tensor) -> Tensor:
        """Merge a rollout's answers; returns the scores [C] as the fusion takes them."""
        merged = self.moments().merged(Moments.of(z_BC, reward_B))
        for name in ("mean", "m2", "cov"):
            getattr(self, f"{name}_C").copy_(getattr(merged, f"{name}_F"))
        for name in ("mean_y", "m2_y", "n"):
            getattr(self, name).fill_(float(getattr(merged, name)))
        return handle_negative(merged.correlation(), self.negative)


def online_conflicts(warmup: WarmupConfig, stage2: bool) -> list[str]:
    """What of the config can't go with `method.online_correlation`."""
    found = [] if stage2 else ["method.online_correlation=true needs method.stage2=true"]
    if warmup.score != "pearson":
        found.append(
            "method.online_correlation=true carries on Pearson's r, but "
            f"warmup.score={warmup.score}; set warmup.score=pearson"
        )
    if warmup.contrast != "reward":
        found.append(
            "method.online_correlation=true goes on measuring r with the reward, but "
            f"warmup.contrast={warmup.contrast} begins with another; set warmup.contrast=reward"
        )
    if warmup.negative == "steer":
        found.append(
            "method.online_correlation=true can't go with warmup.negative=steer, whose signs "
            "are fixed in stage 1; set warmup.negative=keep or clip"
        )
    return found


def pooled(steps: list[Step], n_answers: int, pooling: str, actions: Actions) -> Tensor:
    """Activations z [B, C] pooled over each answer's tokens, chosen features at their coefficient.

    steps: one layer's. pooling: max, mean or last_prompt, as in stage 1. actions: what was chosen
    between.
    """
    first = steps[0].action.notes["feature_acts_BC"]
    z_BC = first.new_zeros(n_answers, first.shape[1])
    count_B1 = first.new_zeros(n_answers, 1)
    for step in sorted(steps, key=lambda s: s.token_index):
        if pooling == "last_prompt" and step.token_index > 0:
            continue
        rows = torch.tensor(step.rows, device=z_BC.device)[step.alive_B]
        acts_BC = _as_steered(step, actions)[step.alive_B]
        if pooling == "max" and step.token_index > 0:
            z_BC[rows] = torch.maximum(z_BC[rows], acts_BC)
        else:
            count_B1[rows] += 1
            z_BC[rows] += (acts_BC - z_BC[rows]) / count_B1[rows]
    return z_BC


def _as_steered(step: Step, actions: Actions) -> Tensor:
    """This token's activations [B, C], those of chosen features replaced by the coefficient."""
    acts_BC = step.action.notes["feature_acts_BC"].clone()
    place_BK = actions.place(step.action.notes["choice_BK"])
    coefficient_BK = step.action.coefficient_BK
    for slot in range(place_BK.shape[1]):
        filled_B = place_BK[:, slot] >= 0
        rows = filled_B.nonzero()[:, 0]
        acts_BC[rows, place_BK[rows, slot]] = coefficient_BK[rows, slot].to(acts_BC.dtype)
    return acts_BC


def steps_of(played: Generation, layer: int) -> list[Step]:
    return [step for step in played.steps if step.layer == layer]

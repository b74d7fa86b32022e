"""What features are ranked by in stage 1, besides Pearson's r: baselines in the same slot.

Each score is signed by the difference of means, so that a feature that goes with failure is not
taken for one that goes with success. Pure. Shapes: B samples, F features, M kept values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from crl_exp.groups import Sums

SCORES = ("pearson", "mutual_information", "fisher", "mean_difference", "composite")
NEGATIVE = ("keep", "clip", "steer")


@dataclass
class KeptValues:
    """The non-zero activations of rewarded samples, for `composite`: one pass can't know the mean
    that they are compared with. Memory grows with the samples, but activations are mostly zero."""

    feature_M: list[Tensor] = field(default_factory=list)
    value_M: list[Tensor] = field(default_factory=list)

    def add(self, z_BF: Tensor) -> None:
        where = z_BF.nonzero(as_tuple=True)
        self.feature_M.append(where[1].int())
        self.value_M.append(z_BF[where].float())

    def above(self, floor_F: Tensor, n_samples: int) -> Tensor:
        """Share [F] of the samples whose value is above each feature's floor."""
        feature_M, value_M = torch.cat(self.feature_M).long(), torch.cat(self.value_M)
        over_M = (value_M > floor_F[feature_M]).double()
        count_F = torch.zeros_like(floor_F).index_add(0, feature_M, over_M)
        n_zero_F = n_samples - torch.bincount(feature_M, minlength=len(floor_F))
        return (count_F + n_zero_F * (floor_F < 0)) / max(n_samples, 1)


def mutual_information(rewarded: Sums, unrewarded: Sums) -> Tensor:
    """Between being active and being rewarded [F], in nats, from the four counts."""
    n = rewarded.n + unrewarded.n
    total_F = torch.zeros_like(rewarded.total_F)
    active_F = rewarded.active_F + unrewarded.active_F
    for group in (rewarded, unrewarded):
        for joint_F, margin_F in (
            (group.active_F, active_F),
            (group.n - group.active_F, n - active_F),
        ):
            ratio_F = joint_F * n / (margin_F * group.n).clamp(min=1e-300)
            total_F += joint_F / n * torch.where(joint_F > 0, ratio_F, 1.0).log()
    return total_F.clamp(min=0)


def fisher_ratio(rewarded: Sums, unrewarded: Sums) -> Tensor:
    """(μ₁ − μ₀)² / (σ₁² + σ₀²) [F]; 0 where the means are equal."""
    within_F = rewarded.variance() + unrewarded.variance()
    return (rewarded.mean() - unrewarded.mean()).square() / within_F.clamp(min=1e-12)


def all_scores(rewarded: Sums, unrewarded: Sums, kept: KeptValues | None) -> dict[str, Tensor]:
    """Every score but Pearson's [F], signed. `composite` (magnitude × consistency) only where the
    values were kept: |μ₁ − μ₀| times the share of rewarded samples above μ₀."""
    difference_F = rewarded.mean() - unrewarded.mean()
    sign_F = difference_F.sign()
    found = {
        "mutual_information": sign_F * mutual_information(rewarded, unrewarded),
        "fisher": sign_F * fisher_ratio(rewarded, unrewarded),
        "mean_difference": difference_F,
    }
    if kept is not None and kept.feature_M:
        found["composite"] = difference_F * kept.above(unrewarded.mean(), rewarded.n)
    return found


def scaled(score: str, values_F: Tensor) -> Tensor:
    """Pearson's r as it is; another score divided by its largest size, so that it has r's range."""
    if score == "pearson":
        return values_F
    return values_F / values_F.abs().max().clamp(min=1e-12)


def handle_negative(values_F: Tensor, negative: str) -> Tensor:
    """keep; clip: negative scores become 0; steer: |score|, with coefficients below 0."""
    if negative == "clip":
        return values_F.clamp(min=0)
    return values_F.abs() if negative == "steer" else values_F

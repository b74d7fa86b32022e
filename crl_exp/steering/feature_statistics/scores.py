"""What features are ranked by in stage 1, besides Pearson's r: baselines in the same slot.

Each score is signed, so that a feature that goes with failure is not taken for one that goes with
success: ours by the difference of means, those of CorrSteer's table by r, which its code filters
them by. Pure. Shapes: B samples, F features, M kept values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from crl_exp.analysis.histograms import LogHistogram
from crl_exp.analysis.moments import GroupSums

KEPT = {"composite": "values", "corrsteer_mutual_information": "histogram"}
"""What stage 1 has to keep of the activations, for scores that its sums aren't enough for."""


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


def mutual_information(rewarded: GroupSums, unrewarded: GroupSums) -> Tensor:
    """Between being active and being rewarded [F], in nats, from the four counts. Ours: what of the
    activation's size goes with the reward isn't in it, so no bins have to be chosen."""
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


def fisher_ratio(rewarded: GroupSums, unrewarded: GroupSums) -> Tensor:
    """(μ₁ − μ₀)² / (σ₁² + σ₀²) [F], Fisher's criterion (1936); 0 where the means are equal."""
    within_F = rewarded.variance() + unrewarded.variance()
    return (rewarded.mean() - unrewarded.mean()).square() / within_F.clamp(min=1e-12)


def corrsteer_fisher(rewarded: GroupSums, unrewarded: GroupSums) -> Tensor:
    """E[z² | rewarded] / E[z² | unrewarded] [F]: "Fisher" in CorrSteer's table (arXiv 2508.12535,
    after DSG), as its code has it. Above 1 where a feature is stronger in success; a feature never
    active in failure has a ratio without bound (the denominator is at least 1e-12)."""
    return rewarded.mean_square() / unrewarded.mean_square().clamp(min=1e-12)


def all_scores(
    rewarded: GroupSums, unrewarded: GroupSums, kept: KeptValues | None
) -> dict[str, Tensor]:
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


def published_scores(
    rewarded: GroupSums,
    unrewarded: GroupSums,
    correlation_F: Tensor,
    histograms: tuple[LogHistogram, LogHistogram] | None,
) -> dict[str, Tensor]:
    """The other scores of CorrSteer's table [F], signed by r; the one in bins only where these were
    counted (of rewarded and of unrewarded samples)."""
    from crl_exp.analysis.histograms import binned_mutual_information

    sign_F = correlation_F.sign()
    found = {"corrsteer_fisher": sign_F * corrsteer_fisher(rewarded, unrewarded)}
    if histograms is not None:
        binned_F = binned_mutual_information(*histograms)
        found["corrsteer_mutual_information"] = sign_F * binned_F
    return found


def handle_negative(values_F: Tensor, negative: str) -> Tensor:
    """keep, drop: as they are; clip: negative scores become 0; steer: |score|, with coefficients
    below 0."""
    if negative == "clip":
        return values_F.clamp(min=0)
    return values_F.abs() if negative == "steer" else values_F

"""Which samples count as rewarded, and what is summed over a group of them. Pure.

Shapes: B samples, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the config takes names from here, without torch
    from torch import Tensor

REWARDED = ("positive", "half")


def is_rewarded(reward_B: Tensor, rule: str) -> Tensor:
    """Whether each sample counts as rewarded [B]: positive, y > 0 (CorrSteer); half, y >= .5."""
    return reward_B > 0 if rule == "positive" else reward_B >= 0.5


@dataclass
class GroupSums:
    """Sums of z, centred second moments, and counts of z > 0, over a group of samples (rewarded,
    or unrewarded)."""

    n: int
    total_F: Tensor
    active_F: Tensor
    m2_F: Tensor

    @classmethod
    def of(cls, z_BF: Tensor) -> GroupSums:
        z_BF = z_BF.double()
        m2_F = (z_BF - z_BF.mean(0)).square().sum(0) if len(z_BF) else z_BF.sum(0)  # zeros
        return cls(len(z_BF), z_BF.sum(0), (z_BF > 0).sum(0).double(), m2_F)

    def merged(self, other: GroupSums) -> GroupSums:
        n = self.n + other.n
        weight = self.n * other.n / max(n, 1)
        between_F = (self.mean() - other.mean()).square() * weight
        return GroupSums(
            n, self.total_F + other.total_F, self.active_F + other.active_F,
            self.m2_F + other.m2_F + between_F,
        )  # fmt: skip

    def mean(self) -> Tensor:
        return self.total_F / max(self.n, 1)

    def variance(self) -> Tensor:
        """Of the population; 0 for an empty group."""
        return self.m2_F / max(self.n, 1)

    def mean_square(self) -> Tensor:
        """E[z²]; 0 for an empty group."""
        return self.variance() + self.mean().square()

    def mean_active(self) -> Tensor:
        return self.total_F / self.active_F.clamp(min=1)

    def frequency(self) -> Tensor:
        return self.active_F / max(self.n, 1)

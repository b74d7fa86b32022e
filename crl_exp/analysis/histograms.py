"""Counts of a feature's activations in bins evenly spaced in the logarithm, streamed.

For the mutual information of CorrSteer's table. Pure.
Shapes: B samples, F features, N bins, M non-zero values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EDGES = tuple(10.0 ** (decade + quarter / 4) for decade in range(-6, 1) for quarter in (1, 2, 3))
"""As in CorrSteer's code: three a decade, from 10^-5.75 to 10^0.75. (Its list ends with another
1.0, which a binary search never stops at.) All that is above the last is one bin."""
N_BINS = len(EDGES) + 1


@dataclass
class LogHistogram:
    """How many samples of a group have a feature's activation in each bin, int64 [F, N]; the first
    bin holds zeros."""

    count_FN: Tensor

    @classmethod
    def of(cls, z_BF: Tensor) -> LogHistogram:
        n_samples, n_features = z_BF.shape
        edges_E = torch.tensor(EDGES, dtype=torch.float32, device=z_BF.device)
        z_BF = z_BF.float()
        sample_M, feature_M = (z_BF > edges_E[0]).nonzero(as_tuple=True)  # most are zero
        bin_M = torch.bucketize(z_BF[sample_M, feature_M], edges_E)
        places_M = feature_M * N_BINS + bin_M
        count_FN = torch.bincount(places_M, minlength=n_features * N_BINS).view(-1, N_BINS)
        count_FN[:, 0] = n_samples - count_FN.sum(dim=1)
        return cls(count_FN)

    def merged(self, other: LogHistogram) -> LogHistogram:
        return LogHistogram(self.count_FN + other.count_FN)


def binned_mutual_information(rewarded: LogHistogram, unrewarded: LogHistogram) -> Tensor:
    """I(bin of z; rewarded) [F], in nats: Σ p(z, y) log(p(z, y) / p(z) p(y)), 0 log 0 being 0."""
    joint_FN2 = torch.stack([rewarded.count_FN, unrewarded.count_FN], dim=2).double()
    n_F11 = joint_FN2.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    joint_FN2 = joint_FN2 / n_F11
    independent_FN2 = joint_FN2.sum(dim=2, keepdim=True) * joint_FN2.sum(dim=1, keepdim=True)
    return torch.special.xlogy(joint_FN2, joint_FN2 / independent_FN2.clamp(min=1e-300)).sum((1, 2))

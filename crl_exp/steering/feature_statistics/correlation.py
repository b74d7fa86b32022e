"""Streaming statistics of features against reward, in O(F) memory and float64.

Pure: no model, no files. Moments are merged by Chan's formulas (Chan, Golub, LeVeque 1979), so the
order and the cutting into batches don't matter.
Shapes: B samples, F features, K features of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crl_exp.analysis.histograms import LogHistogram
from crl_exp.analysis.moments import GroupSums, is_rewarded
from crl_exp.steering.feature_statistics.scores import KeptValues, all_scores, published_scores

COLUMNS_TOGETHER = 2048


@dataclass
class Moments:
    """Count, mean and centred second moments of a sample of (z [F], y).

    `origin_F`, `origin_y` are subtracted from every value first: with them a large offset in the
    data doesn't eat the digits of the variance. Means are relative to them.
    """

    n: int
    origin_F: Tensor
    origin_y: float
    mean_F: Tensor
    mean_y: float
    m2_F: Tensor
    m2_y: float
    cov_F: Tensor

    @classmethod
    def of(cls, z_BF: Tensor, y_B: Tensor) -> Moments:
        """Moments of one batch, two passes over it, a block of columns at a time.

        The batch stays float32; float64 copies are of one block, so that they fit into a cache.
        """
        y_B = y_B.double()
        origin_y = float(y_B[0])
        y_B = y_B - origin_y
        mean_y = float(y_B.mean())
        dy_B = y_B - mean_y
        columns = []
        for block in z_BF.split(COLUMNS_TOGETHER, dim=1):
            z_BK = block.double()
            origin_K = z_BK[0].clone()
            z_BK = z_BK - origin_K
            mean_K = z_BK.mean(0)
            z_BK -= mean_K
            columns.append((origin_K, mean_K, z_BK.square().sum(0), dy_B @ z_BK))
        origin_F, mean_F, m2_F, cov_F = map(torch.cat, zip(*columns, strict=True))
        m2_y = float(dy_B.square().sum())
        return cls(len(y_B), origin_F, origin_y, mean_F, mean_y, m2_F, m2_y, cov_F)

    def merged(self, other: Moments) -> Moments:
        """Moments of both samples together."""
        n = self.n + other.n
        dz_F = other.mean_F - self.mean_F + (other.origin_F - self.origin_F)
        dy = other.mean_y - self.mean_y + (other.origin_y - self.origin_y)
        share, weight = other.n / n, self.n * other.n / n
        return Moments(
            n, self.origin_F, self.origin_y,
            self.mean_F + dz_F * share, self.mean_y + dy * share,
            self.m2_F + other.m2_F + dz_F.square() * weight,
            self.m2_y + other.m2_y + dy * dy * weight,
            self.cov_F + other.cov_F + dz_F * dy * weight,
        )  # fmt: skip

    @property
    def total_F(self) -> Tensor:
        """Sum of z."""
        return self.n * (self.origin_F + self.mean_F)

    def correlation(self) -> Tensor:
        """Pearson r [F]; 0 where z or y doesn't vary (where numpy.corrcoef gives nan)."""
        scale_F = self.m2_F.sqrt() * self.m2_y**0.5
        r_F = torch.where(scale_F > 0, self.cov_F / scale_F, 0.0)
        return r_F.clamp(-1, 1)


class StreamingCorrelation:
    """Pearson r of every feature with the reward, and what coefficients are made of.

    keep: what `scores.KEPT` says that a score needs besides: `values`, the rewarded samples'
        activations, or `histogram`, counts in bins of both groups. rewarded: which samples are in
        which group, `groups.REWARDED`.
    """

    def __init__(self, keep: str | None = None, rewarded: str = "positive") -> None:
        self.keep, self.rule = keep, rewarded
        self.kept = KeptValues() if keep == "values" else None
        self.histograms: tuple[LogHistogram, LogHistogram] | None = None
        self.moments: Moments | None = None
        self.rewarded: GroupSums | None = None
        self.unrewarded: GroupSums | None = None

    @property
    def n(self) -> int:
        return 0 if self.moments is None else self.moments.n

    def update(self, z_BF: Tensor, y_B: Tensor) -> None:
        """Take in a batch: pooled activations z [B, F] and rewards y [B]."""
        assert z_BF.shape[0] == y_B.shape[0]
        if len(y_B) == 0:
            return
        other = StreamingCorrelation()
        other.moments = Moments.of(z_BF, y_B)
        good_B = is_rewarded(y_B, self.rule)
        other.rewarded, other.unrewarded = GroupSums.of(z_BF[good_B]), GroupSums.of(z_BF[~good_B])
        if self.kept is not None:
            self.kept.add(z_BF[good_B])
        if self.keep == "histogram":
            other.histograms = LogHistogram.of(z_BF[good_B]), LogHistogram.of(z_BF[~good_B])
        self.merge(other)

    def merge(self, other: StreamingCorrelation) -> None:
        """Take in another stream's samples."""
        if other.moments is None:
            return
        if self.kept is not None and other.kept is not None:
            self.kept.feature_M += other.kept.feature_M
            self.kept.value_M += other.kept.value_M
        if self.histograms is None:
            self.histograms = other.histograms
        elif other.histograms is not None:
            good, bad = (
                a.merged(b) for a, b in zip(self.histograms, other.histograms, strict=True)
            )
            self.histograms = good, bad
        if self.moments is None:
            self.moments, self.rewarded, self.unrewarded = (
                other.moments, other.rewarded, other.unrewarded,
            )  # fmt: skip
            return
        assert self.rewarded and self.unrewarded and other.rewarded and other.unrewarded
        self.moments = self.moments.merged(other.moments)
        self.rewarded = self.rewarded.merged(other.rewarded)
        self.unrewarded = self.unrewarded.merged(other.unrewarded)

    def statistics(self) -> dict[str, Tensor]:
        """All per-feature statistics, each [F], float64."""
        assert self.moments and self.rewarded and self.unrewarded, "no samples yet"
        active_F = self.rewarded.active_F + self.unrewarded.active_F
        correlation_F = self.moments.correlation()
        return {
            "correlation": correlation_F,
            "mean": self.moments.origin_F + self.moments.mean_F,
            "frequency": active_F / self.n,
            "frequency_rewarded": self.rewarded.frequency(),
            "frequency_unrewarded": self.unrewarded.frequency(),
            "mean_positive": self.rewarded.mean(),
            "mean_active": self.rewarded.mean_active(),
            "mean_unrewarded": self.unrewarded.mean(),
            "mean_active_unrewarded": self.unrewarded.mean_active(),
            "contrastive": self.rewarded.mean() - self.unrewarded.mean(),
            **all_scores(self.rewarded, self.unrewarded, self.kept),
            **published_scores(self.rewarded, self.unrewarded, correlation_F, self.histograms),
        }
